"""Values as people write them: prices, dates, times, measures, versions, addresses, codes, names.

Every maker draws one value as text, written in one of the several ways in which people write it, so that a
model learns to copy what stands there instead of the form it has seen most. It knows nothing of the sentences
that values stand in.
"""

import random
from collections.abc import Callable

from .words import invented_word


def listed(text: str) -> list[str]:
    """Entries that a bar separates: lists that are read at a glance."""
    return text.split("|")


_MONTHS = listed("January|February|March|April|May|June|July|August|September|October|November|December")
_DAYS = listed("Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday")
_FIRST = listed(
    "Ada|Agnes|Alan|Amara|Anders|Anita|Arjun|Beatrice|Boris|Carla|Chen|Clara|Dana|Dmitri|Edith|Elena|"
    "Emeka|Erik|Farah|Fatima|Felix|George|Greta|Hana|Harold|Hugo|Ines|Irene|Ivan|Jonas|Joyce|Kamal|"
    "Karin|Kofi|Laura|Leila|Lucas|Magnus|Maria|Mei|Mina|Nadia|Nikhil|Nora|Olga|Omar|Oscar|Paula|Pedro|"
    "Priya|Quentin|Rachel|Rosa|Ruth|Samir|Selma|Sofia|Stefan|Tariq|Thea|Tomas|Una|Vera|Viktor|Walter|"
    "Wanda|Yara|Yusuf|Zoe"
)
_LAST = listed(
    "Abbott|Adeyemi|Andersson|Baker|Barlow|Becker|Bianchi|Brandt|Calloway|Castillo|Chandra|Cole|Dahl|"
    "Dalton|Delgado|Doyle|Ekström|Farrow|Ferreira|Fischer|Gallagher|Garcia|Grant|Haddad|Hale|Hartmann|"
    "Hollis|Ibrahim|Ito|Jansen|Kapoor|Keller|Kim|Kowalski|Lang|Larsen|Lindqvist|Marrow|Mbeki|Meyer|"
    "Moreau|Nakamura|Novak|O'Brien|Okafor|Olsen|Ortega|Park|Pereira|Quill|Rahman|Reyes|Rossi|Sandoval|"
    "Sato|Schmidt|Silva|Stone|Tanaka|Thorne|Ueda|Vargas|Vogel|Walsh|Weber|Winter|Yilmaz|Zhang"
)
_STREETS = listed(
    "Alder|Baker|Bridge|Canal|Castle|Cedar|Chapel|Church|Elm|Foundry|Garden|Granary|Harbour|High|Hill|"
    "Kiln|King|Lake|Linden|Market|Mill|Moor|Oak|Orchard|Park|Quarry|Queen|River|Rope|School|Ship|"
    "Spring|Station|Tower|Union|Victoria|Wharf|Willow"
)
_WAYS = listed("Street|Road|Lane|Avenue|Court|Square|Close|Way|Terrace|Drive|Walk|Hill|Gate|Parade")
_TOWNS = listed(
    "Ashford|Belmont|Brixham|Calder|Dunmore|Eastport|Fairhaven|Glenrock|Halden|Inverley|Kingsbury|"
    "Lakewood|Marston|Newbury|Nordhaven|Oakdale|Penrith|Queensferry|Ravensburg|Stockholm|Tarvin|"
    "Uppsala|Valmere|Westbrook|Yarrow"
)
_HOSTS = listed(
    "alpha|backup|build|cache|db|gate|gw|lists|mail|media|mirror|node|ns|proxy|relay|repo|smtp|vault"
)
_TENS = listed("|ten|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety")
_ONES = listed(
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    "sixteen|seventeen|eighteen|nineteen"
)
_UNITS = {
    "weight": "kg|g|lb|tonnes|mg|ounces|kilograms",
    "length": "m|cm|km|mm|feet|inches|miles|metres|yards",
    "speed": "km/h|mph|m/s|knots|rpm",
    "temperature": "°C|°F|K|degrees Celsius|degrees",
    "voltage": "V|kV|mV|volts",
    "power": "W|kW|MW|horsepower",
    "frequency": "Hz|kHz|MHz|GHz",
    "capacity": "litres|ml|gallons|m³|cubic metres|barrels",
    "storage": "GB|MB|TB|MiB|GiB|KiB|bytes",
    "pressure": "bar|psi|kPa|hPa",
    "area": "m²|hectares|acres|square feet|km²",
}
MEASURES = tuple(_UNITS)


def _digits(rng: random.Random, count: int) -> str:
    """Digits, now and then of two or three kinds only: what repeats itself is hardest to copy."""
    of = "0123456789" if rng.random() < 0.75 else rng.choice(("09", "019", "27", "558", "364", "18"))
    return "".join(rng.choice(of) for _ in range(count))


def _groups(rng: random.Random, make: Callable[[int], str], marks: str, most: int) -> str:
    """Two to `most` groups of one to five characters with the same mark between them."""
    lengths = [rng.randrange(1, 6) for _ in range(rng.randrange(2, most + 1))]
    return rng.choice(marks).join(make(length) for length in lengths)


def _mixed(rng: random.Random, count: int) -> str:
    """Digits, letters, or digits with letters behind or before."""
    cut = rng.choice((0, 0, count, count, rng.randrange(count + 1)))
    parts = [_digits(rng, cut), _letters(rng, count - cut)]
    rng.shuffle(parts)
    return "".join(parts)


def _place(rng: random.Random) -> str:
    """A town of the list, or a made-up one."""
    return rng.choice(_TOWNS) if rng.random() < 0.5 else invented_word(rng).capitalize()


def _surname(rng: random.Random) -> str:
    return rng.choice(_LAST) if rng.random() < 0.6 else invented_word(rng).capitalize()


def _first_name(rng: random.Random) -> str:
    return rng.choice(_FIRST) if rng.random() < 0.7 else invented_word(rng).capitalize()


def _domain(rng: random.Random) -> str:
    return f"{_place(rng).lower()}.{rng.choice(('example', 'example', 'org', 'net', 'com', 'test'))}"


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(count))


def in_words(number: int) -> str:
    """A number from 0 to 99 in words."""
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def number(rng: random.Random) -> str:
    """A count or a figure: whole, grouped, decimal, scientific, in words, a fraction, or very long."""
    large = rng.randrange(1000, 10 ** rng.randrange(4, 10))
    return rng.choice(
        (
            lambda: str(rng.randrange(10 ** rng.randrange(2, 7))),
            lambda: f"{large:,}",
            lambda: f"{large:,}",
            lambda: f"{large:,}".replace(",", " "),
            lambda: f"{rng.uniform(0, 1000):.{rng.randrange(1, 5)}f}",
            lambda: f"{rng.random() ** 2:.{rng.randrange(2, 6)}f}",
            lambda: f"-{rng.uniform(0, 100):.{rng.randrange(1, 3)}f}",
            lambda: f"{rng.uniform(1, 9.99):.2f}e{rng.choice(('', '-'))}{rng.randrange(2, 19)}",
            lambda: in_words(rng.randrange(3, 100)),
            lambda: f"{rng.randrange(1, 16)}/{rng.choice((2, 3, 4, 5, 6, 7, 8, 9, 12, 16))}",
            lambda: _digits(rng, rng.randrange(9, 19)),
        )
    )()


def price(rng: random.Random) -> str:
    """An amount of money."""
    amount = rng.uniform(0.5, 10 ** rng.randrange(1, 6))
    sign, name = rng.choice((("$", "dollars"), ("€", "euros"), ("£", "pounds"), ("$", "US dollars")))
    return rng.choice(
        (
            lambda: f"{sign}{amount:,.2f}",
            lambda: f"{sign}{amount:.2f}",
            lambda: f"{sign}{int(amount) + 1:,}",
            lambda: f"{amount:,.2f} {rng.choice(('EUR', 'USD', 'GBP', 'CHF', 'SEK', 'JPY'))}",
            lambda: f"{int(amount) + 2:,} {name}",
            lambda: f"{sign}{rng.uniform(1, 90):.1f} {rng.choice(('million', 'billion', 'thousand'))}",
            lambda: f"{in_words(rng.randrange(2, 100))} {name}",
        )
    )()


def date(rng: random.Random) -> str:
    """A day, or a month of a year."""
    day, month, year = rng.randrange(1, 29), rng.randrange(12), rng.randrange(1780, 2040)
    ending = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    name = _MONTHS[month]
    return rng.choice(
        (
            f"{day} {name} {year}",
            f"{name} {day}, {year}",
            f"{year}-{month + 1:02}-{day:02}",
            f"{day:02}/{month + 1:02}/{year}",
            f"{day}.{month + 1}.{year}",
            f"the {day}{ending} of {name} {year}",
            f"{rng.choice(_DAYS)}, {day} {name} {year}",
            f"{name} {year}",
            f"{name[:3]} {day}, {year}",
            f"{name} {day}{ending}",
        )
    )


def clock(rng: random.Random) -> str:
    """A time of day."""
    hour, minute = rng.randrange(24), rng.randrange(60)
    half = f"{hour % 12 or 12}:{minute:02}"
    return rng.choice(
        (
            f"{hour:02}:{minute:02}",
            f"{half} {'p.m.' if hour > 11 else 'a.m.'}",
            f"{half} {'PM' if hour > 11 else 'AM'}",
            f"{hour:02}:{minute:02} UTC",
            f"{hour:02}:{minute:02}:{rng.randrange(60):02}",
            f"{hour:02}{minute:02} hours",
            f"{rng.choice(('half past', 'quarter past', 'quarter to'))} {in_words(hour % 12 or 12)}",
            f"{in_words(hour % 12 or 12)} o'clock",
        )
    )


def duration(rng: random.Random) -> str:
    """A length of time."""
    units = ("seconds", "minutes", "hours", "days", "weeks", "months", "years", "ms")
    unit, both = rng.choice(units), sorted(rng.sample(range(7), 2), reverse=True)
    return rng.choice(
        (
            f"{rng.randrange(2, 400)} {unit}",
            f"{rng.uniform(1, 60):.1f} {unit}",
            f"{in_words(rng.randrange(2, 60))} {unit if unit != 'ms' else 'milliseconds'}",
            f"{rng.randrange(1, 24)} hours {rng.randrange(2, 60)} minutes",
            f"{rng.randrange(2, 30)} {units[both[0]]} {rng.randrange(2, 60)} {units[both[1]]}",
            f"{rng.randrange(2, 12)} {units[both[0]]} and {rng.randrange(2, 12)} {units[both[1]]}",
            f"{rng.randrange(1, 48)}h{rng.randrange(60):02}",
        )
    )


def measure(rng: random.Random, kind: str | None = None) -> str:
    """A quantity with its unit; `kind` is one of MEASURES."""
    unit = rng.choice(listed(_UNITS[kind or rng.choice(MEASURES)]))
    sign = "-" if unit.startswith(("°", "degrees")) and rng.random() < 0.4 else ""
    value = rng.choice(
        (
            lambda: str(rng.randrange(2, 1000)),
            lambda: f"{rng.uniform(0.1, 500):.{rng.randrange(1, 4)}f}",
            lambda: f"{rng.randrange(1000, 90000):,}",
        )
    )()
    space = "" if unit.startswith("°") and rng.random() < 0.5 or rng.random() < 0.06 else " "
    return f"{sign}{value}{space}{unit}"


def percentage(rng: random.Random) -> str:
    """A share."""
    return rng.choice(
        (
            f"{rng.randrange(1, 100)}%",
            f"{rng.uniform(0.1, 99):.{rng.randrange(1, 3)}f}%",
            f"{rng.randrange(1, 100)} percent",
            f"{rng.uniform(0.1, 99):.{rng.randrange(1, 3)}f} percent",
            f"{in_words(rng.randrange(2, 100))} per cent",
        )
    )


def version(rng: random.Random) -> str:
    """A version of software."""
    major, minor, patch = rng.randrange(30), rng.randrange(40), rng.randrange(60)
    return rng.choice(
        (
            f"{major}.{minor}.{patch}",
            f"{major}.{minor}",
            f"v{major}.{minor}.{patch}",
            f"{major}.{minor}.{patch}-rc{rng.randrange(1, 9)}",
            f"{major}.{minor}.{patch}-{rng.randrange(1, 9)}+deb{rng.randrange(9, 14)}u{rng.randrange(1, 9)}",
            f"{rng.randrange(1998, 2040)}.{rng.randrange(1, 13)}",
            f"{major}.{minor}.{patch}.{rng.randrange(10000, 30000)}",
            f"{major}.{minor}b{rng.randrange(1, 9)}",
            f"{major}.{minor}.{patch}-{rng.choice(('alpha', 'beta', 'dev', 'pre'))}{rng.randrange(1, 20)}",
        )
    )


def address(rng: random.Random) -> str:
    """Where somebody lives or works."""
    house = f"{rng.randrange(1, 400)}{rng.choice(('', '', '', 'a', 'b'))}"
    named = rng.choice(_STREETS) if rng.random() < 0.6 else invented_word(rng).capitalize()
    street, town = f"{named} {rng.choice(_WAYS)}", _place(rng)
    postcode = f"{_letters(rng, 2)}{rng.randrange(1, 20)} {_digits(rng, 1)}{_letters(rng, 2)}"
    return rng.choice(
        (
            f"{house} {street}",
            f"{house} {street}, {town}",
            f"{house} {street}, {town} {_digits(rng, 5)}",
            f"{house} {street}, {town} {postcode}",
            f"Flat {rng.randrange(1, 60)}, {house} {street}",
            f"P.O. Box {rng.randrange(100, 9999)}, {town}",
        )
    )


def network(rng: random.Random) -> str:
    """An address of a machine, of a page or of a mailbox, or a path."""
    host = f"{rng.choice(_HOSTS)}{rng.choice(('', rng.randrange(1, 40)))}.{_domain(rng)}"
    street, word = rng.choice(_STREETS).lower(), invented_word(rng)
    few = rng.choice((255, 255, 100, 30))  # 10.20.0.20 repeats itself, and is copied worse
    octets = ".".join(str(rng.randrange(few)) for _ in range(4))
    surname = _surname(rng).lower().replace("'", "")
    return rng.choice(
        (
            octets,
            octets,
            f"{octets}:{rng.randrange(1024, 65536)}",
            f"{octets}/{rng.randrange(8, 31)}",
            host,
            f"{host}:{rng.randrange(80, 9999)}",
            f"{_first_name(rng).lower()}.{surname}@{_domain(rng)}",
            f"{word[0]}.{surname}@{_domain(rng)}",
            f"{rng.choice((word, street))}@{_domain(rng)}",
            f"https://{host}/{street}/{rng.randrange(9999)}",
            f"https://{rng.choice((word, street, 'www'))}.{_domain(rng)}/{rng.choice((street, word))}",
            f"/{rng.choice(('srv', 'var', 'opt'))}/{rng.choice(_HOSTS)}/{street}-{rng.randrange(99)}",
            f"fe80::{rng.randrange(65536):x}:{rng.randrange(65536):x}",
        )
    )


def code(rng: random.Random) -> str:
    """An identifier of letters and digits, mixed."""
    return rng.choice(
        (
            lambda: f"{_letters(rng, 2)}-{_digits(rng, 4)}",
            lambda: f"{_letters(rng, 3)}-{_digits(rng, 3)}-{_letters(rng, 1)}",
            lambda: f"{_letters(rng, 1)}{_digits(rng, 2)}{_letters(rng, 2)}{_digits(rng, 3)}",
            lambda: f"{rng.randrange(16**8):08x}",
            lambda: f"{rng.randrange(16**4):04x}-{rng.randrange(16**4):04x}-{rng.randrange(16**4):04x}",
            lambda: f"{_digits(rng, 3)}-{_digits(rng, 2)}-{_digits(rng, 4)}",
            lambda: f"978-{rng.randrange(10)}-{_digits(rng, 3)}-{_digits(rng, 5)}-{rng.randrange(10)}",
            lambda: f"{_digits(rng, 4)} {_digits(rng, 4)} {_digits(rng, 4)} {_digits(rng, 4)}",
            lambda: f"#{_digits(rng, rng.randrange(3, 7))}",
            lambda: f"{_letters(rng, 2)}{_digits(rng, 2)} {_letters(rng, 3)}",
            lambda: f"{_digits(rng, 2)}/{_digits(rng, 4)}-{_letters(rng, 1)}",
            lambda: _groups(rng, lambda count: _mixed(rng, count), "--- /.", 4),
            lambda: _groups(rng, lambda count: _mixed(rng, count), "--- /.", 4),
            lambda: _mixed(rng, rng.randrange(4, 10)),
        )
    )()


def phone(rng: random.Random) -> str:
    """A telephone number."""
    return rng.choice(
        (
            f"+{rng.randrange(1, 99)} {_digits(rng, 2)} {_digits(rng, 4)} {_digits(rng, 4)}",
            f"({_digits(rng, 3)}) {_digits(rng, 3)}-{_digits(rng, 4)}",
            f"0{_digits(rng, 3)} {_digits(rng, 3)} {_digits(rng, 3)}",
            f"{_digits(rng, 3)}-{_digits(rng, 3)}-{_digits(rng, 4)}",
            f"extension {_digits(rng, 4)}",
            f"{_digits(rng, 3)}-{_digits(rng, 4)}",
            _groups(rng, lambda count: _digits(rng, count + 1), "-  ", 4),
        )
    )


def person(rng: random.Random) -> str:
    """A person's name."""
    first, last = _first_name(rng), _surname(rng)
    title = rng.choice(("Dr.", "Mr.", "Mrs.", "Ms.", "Prof.", "Professor", "Captain", "Sister", "Sir", "St."))
    return rng.choice(
        (
            f"{first} {last}",
            f"{first} {last}",
            f"{first} {rng.choice('ABCDEFGHJKLMNPRST')}. {last}",
            f"{title} {last}",
            f"{title} {first} {last}",
            f"{first} {last}-{_surname(rng)}",
            f"{first} {rng.choice(('von', 'van', 'de', 'bin'))} {last}",
        )
    )


def town(rng: random.Random) -> str:
    """The name of a town, of which half are made up."""
    return _place(rng)


KINDS: dict[str, Callable[[random.Random], str]] = {
    "number": number,
    "price": price,
    "date": date,
    "time": clock,
    "duration": duration,
    "measure": measure,
    "percentage": percentage,
    "version": version,
    "address": address,
    "network": network,
    "code": code,
    "phone": phone,
    "person": person,
}
