"""The prefix tree: matches end at snapshots, pages and slots are counted, what was not used is forgotten."""

import random

import pytest

from opensala.cache import Pool, PrefixTree

PAGE = 4


@pytest.fixture
def tree():
    return PrefixTree(Pool(100, "pages"), Pool(20, "state slots"), PAGE)


def read(tree, tokens, slot=True, sparse=False, namespace=""):
    """Remember a text as a sequence would that read it, and let go of it."""
    pages = tree.pages.take(-(-len(tokens) // PAGE))
    slots = tree.slots.take(1) if slot else []
    swapped = tree.insert(tokens, sparse, pages, slots[0] if slots else None, namespace)
    tree.pages.release(pages)
    tree.slots.release(slots)
    tree.check_integrity()
    tree.pages.check_integrity([list(tree.held_pages())])
    tree.slots.check_integrity([list(tree.held_slots())])
    return pages, swapped


def test_a_text_matches_up_to_its_deepest_snapshot(tree):
    text = list(range(12))
    pages, _ = read(tree, text)
    match = tree.match([*text, 99], False, 12)
    assert match.length == 12 and match.pages == pages and match.slot is not None
    assert tree.match(text, False, 11).length == 0  # the snapshot lies behind what may be reused
    assert tree.match(text, False, 11).paged == 8  # but two whole pages are there
    assert tree.match([*text[:5], 77, *text[6:]], False, 12).length == 0


def test_pages_without_a_snapshot_are_only_counted(tree):
    text = list(range(12))
    read(tree, text, slot=False)
    match = tree.match([*text, 99], False, 12)
    assert match.length == 0 and match.pages == [] and match.slot is None and match.paged == 12


def test_a_snapshot_within_a_page_is_a_tail(tree):
    text = list(range(10))
    pages, _ = read(tree, text)
    match = tree.match([*text, 50, 51, 52], False, 12)
    assert match.length == 10 and match.pages == pages and match.paged == 8
    assert tree.match([*text[:9], 60, 61], False, 10).length == 0
    read(tree, text[:9])
    assert tree.match([*text[:9], 60, 61], False, 10).length == 9
    assert tree.match([*text, 50], False, 10).length == 10  # the longer one first


def test_modes_do_not_share(tree):
    text = list(range(8))
    read(tree, text, sparse=True)
    assert tree.match([*text, 1], False, 8).length == 0 and tree.match([*text, 1], True, 8).length == 8


def test_what_was_there_is_not_held_twice(tree):
    first, _ = read(tree, list(range(8)))
    second, swapped = read(tree, [*range(8), 20, 21, 22, 23])
    assert swapped == {second[0]: first[0], second[1]: first[1]}
    assert sorted(tree.held_pages()) == sorted([*first, second[2]])


def test_the_least_recently_used_goes_first(tree):
    for start in (0, 100, 200):
        read(tree, list(range(start, start + 8)))
    tree.match([*range(8), 1], False, 8)  # used again
    tree.evict_pages(tree.pages.num_free + 2)
    assert tree.match([*range(8), 1], False, 8).length == 8
    assert tree.match([*range(100, 108), 1], False, 8).length == 0
    tree.evict_slots(tree.slots.num_free + 1)
    assert tree.match([*range(200, 208), 1], False, 8).length == 0
    assert tree.match([*range(200, 208), 1], False, 8).paged == 8  # the pages outlive their snapshot


def test_what_a_sequence_holds_is_kept(tree):
    pages, _ = read(tree, list(range(8)))
    tree.pages.share(pages)
    tree.evict_pages(100)
    assert tree.match([*range(8), 1], False, 8).length == 8
    tree.pages.release(pages)
    tree.evict_pages(100)
    assert tree.pages.num_free == 100 and tree.slots.num_free == 20


def test_clear_forgets_everything(tree):
    read(tree, list(range(10)))
    read(tree, list(range(7)), sparse=True)
    tree.clear()
    tree.check_integrity()
    assert tree.pages.num_free == 100 and tree.slots.num_free == 20
    assert tree.match(list(range(10)), False, 9).paged == 0


def test_random_texts_against_a_plain_list(tree):
    """The longest snapshot that begins a text, found by comparing it with all of them."""
    rng, known = random.Random(0), []
    for _ in range(300):
        text = [rng.randint(0, 1) for _ in range(rng.randint(1, 14))]
        if tree.slots.num_free and tree.pages.num_free > 4:
            read(tree, text)
            known.append(text)
        asked = [rng.randint(0, 1) for _ in range(rng.randint(2, 18))]
        limit = len(asked) - 1
        wanted = max((len(t) for t in known if len(t) <= limit and asked[: len(t)] == t), default=0)
        assert tree.match(asked, False, limit).length == wanted


def test_namespaces_do_not_share_and_do_not_tell(tree):
    """Neither what can be continued nor how much was read: another key must not learn what one read."""
    text = list(range(10))
    read(tree, text, namespace="a")
    here, there = tree.match([*text, 9], False, 10, "a"), tree.match([*text, 9], False, 10, "b")
    assert here.length == 10 and here.paged == 8
    assert there.length == there.paged == 0 and tree.match([*text, 9], False, 10).paged == 0
    pages, swapped = read(tree, text, namespace="b")  # held again, not handed over
    assert not swapped and tree.match([*text, 9], False, 10, "b").pages == pages


def test_a_namespace_that_was_forgotten_leaves_nothing(tree):
    for n in range(15):
        read(tree, [n] * 8, namespace=f"key-{n}")
        read(tree, [n] * 3, slot=False, namespace=f"short-{n}")
    tree.evict_pages(tree.pages.size)
    tree.check_integrity()
    assert not tree._roots and tree.pages.num_free == tree.pages.size
