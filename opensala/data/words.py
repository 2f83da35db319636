"""The words that facts, keys and noise are made of: real ones in lists, invented ones from syllables.

Order and length of a list are part of what a seed means: whoever changes one changes all texts made so far.
"""

import random


def _listed(text: str) -> list[str]:
    """Items of a text, which commas part and lines may break anywhere."""
    return [" ".join(item.split()) for item in text.split(",")]


ONSETS = _listed(
    """
    b, br, c, ch, cl, d, dr, f, fl, g, gr, h, j, k, kl, l, m, n, p, pr, qu, r, s, sh, st, t, th, tr, v, w, z
    """
)
VOWELS = _listed("a, e, i, o, u, ai, ea, ee, ia, io, oa, ou")
CODAS = ["", "", *_listed("n, r, l, s, x, m, nd, rk, st, th, ck")]
ADJECTIVES = _listed(
    """
    amber, ancient, blue, bold, brave, bright, broken, calm, clever, cold, copper, crimson, curious, dark,
    deep, distant, dry, eager, early, empty, fancy, fast, final, gentle, giant, golden, grand, gray, green,
    happy, hidden, hollow, honest, humble, icy, inner, iron, jolly, keen, large, late, lazy, little, lonely,
    long, lost, loud, lucky, magic, mellow, mighty, misty, narrow, new, noble, northern, odd, old, olive,
    orange, outer, pale, patient, plain, polite, proud, purple, quick, quiet, rapid, rare, red, rough,
    royal, rusty, secret, shiny, short, silent, silver, simple, slow, small, smooth, soft, southern, spare,
    stale, steady, still, strange, strong, sunny, sweet, swift, tall, tame, tiny, upper, vivid, warm, weary,
    western, white, wide, wild, winter, wise, wooden, young
    """
)
NOUNS = _listed(
    """
    anchor, apple, arrow, badger, barrel, basin, beacon, bell, bird, boat, book, bottle, branch, bridge,
    brook, bucket, cabin, camel, candle, canyon, castle, cellar, chair, circle, cliff, clock, cloud, coin,
    comet, corner, cottage, crane, creek, crown, desert, dolphin, door, dragon, eagle, engine, falcon, farm,
    feather, fern, field, finch, fire, forest, fountain, fox, garden, gate, glacier, grove, hammer, harbor,
    hawk, hill, horse, house, island, jacket, jungle, kettle, key, kite, ladder, lake, lamp, lantern, leaf,
    library, lion, maple, market, meadow, mill, mirror, monkey, moon, mountain, needle, oak, ocean, otter,
    owl, palace, panda, paper, pearl, pencil, phoenix, piano, pine, planet, pond, portal, rabbit, rain,
    raven, ridge, river, road, rocket, root, rose, saddle, sail, school, shadow, shell, ship, shore, signal,
    sky, snow, spider, spring, star, station, stone, storm, stream, summit, sun, table, temple, thunder,
    tiger, tower, train, tree, tunnel, valley, violet, wagon, wall, water, wave, whale, wheel, willow, wind,
    window, wolf
    """
)
NUMBER_ATTRIBUTES = _listed(
    """
    access code, account number, badge number, batch number, budget, case number, catalog number, code,
    combination, confirmation number, contract number, control number, customer number, door code, employee
    number, entry code, file number, flight number, gate code, id, invoice number, job number, key, key
    code, license number, locker number, lot number, lucky number, magic number, member number, order
    number, page number, part number, passcode, password, phone number, pin, population, port, postal code,
    price, product number, protocol number, quota, reference number, registration number, release number,
    room number, routing number, secret code, secret number, security code, serial number, service number,
    ticket number, timeout, tracking number, unlock code, vault code, verification code, version number,
    weight
    """
)
NAME_ATTRIBUTES = _listed(
    """
    author, captain, chief engineer, city, codename, color, coordinator, director, editor, favorite animal,
    founder, guardian, home town, inspector, keeper, language, leader, location, manager, mascot, mayor,
    meeting place, middle name, mother, name, nickname, owner, partner, password, pilot, president, project
    lead, secret word, sponsor, supervisor, supplier, teacher, tutor, winner
    """
)
CODE_PARTS = _listed(
    """
    max, min, default, base, cache, retry, limit, size, count, timeout, buffer, thread, worker, queue,
    session, token, user, page, block, chunk, window, batch, rate, port, offset, width, height, depth,
    level, index, seed, version, flag, mode, state, error, status, memory, disk, node, cluster, shard,
    replica, stream, socket, client, server, request, response, upload, download, backup, archive, report,
    invoice, order, price, tax, discount, alpha, beta, gamma, delta, sigma, omega, north, south, east, west,
    primary, secondary, internal, external, legacy
    """
)
TITLES = _listed(
    """
    Dr., Captain, Professor, Mr., Mrs., Agent, Lady, Sir, Operation, Camp, Port, Mount, Team, Lake, Fort,
    Building, Model, Class
    """
)
# Attributes of NAME_ATTRIBUTES that ask who, not what.
WHO = set(
    _listed(
        """
        author, captain, chief engineer, coordinator, director, editor, founder, guardian, inspector, keeper,
        leader, manager, mayor, mother, owner, partner, pilot, president, project lead, sponsor, supervisor,
        supplier, teacher, tutor, winner
        """
    )
)


def invented_word(rng: random.Random) -> str:
    """A pronounceable word of two or three syllables that means nothing."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))


def compound(rng: random.Random) -> str:
    """An adjective and a noun, as keys are written: `amber-falcon`."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def plain_words() -> list[str]:
    """All adjectives and nouns the facts are made of."""
    return sorted({*ADJECTIVES, *NOUNS})
