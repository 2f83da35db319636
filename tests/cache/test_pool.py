"""Pools count who holds what."""

import random

import pytest

from opensala.cache import Pool, PoolExhausted


def test_places_are_taken_shared_and_given_back():
    pool = Pool(3, "pages")
    a, b = pool.take(2)
    assert pool.num_free == 1 and {a, b} <= {0, 1, 2}
    pool.share([a])
    pool.release([a])
    assert pool.references(a) == 1 and pool.num_free == 1
    pool.release([a, b])
    assert pool.num_free == 3
    pool.check_integrity([])


def test_what_is_not_there_is_not_given():
    pool = Pool(2, "state slots")
    (taken,) = pool.take()
    with pytest.raises(PoolExhausted, match="2 state slots are needed, 1 of 2 are free"):
        pool.take(2)
    assert pool.num_free == 1
    with pytest.raises(AssertionError, match="is free already"):
        pool.release([1 - taken])
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share([1 - taken])


def test_integrity_notices_what_is_wrong():
    pool = Pool(4, "pages")
    held = pool.take(2)
    pool.check_integrity([held])
    for holders in ([], [held, held[:1]], [[*held, 3]]):
        with pytest.raises(AssertionError):
            pool.check_integrity(holders)


def test_growth_adds_free_places():
    pool = Pool(1, "pages")
    pool.take()
    pool.grow(5)
    assert pool.size == 5 and pool.num_free == 4 and sorted(pool.take(4)) == [1, 2, 3, 4]


def test_a_place_is_taken_again():
    pool = Pool(3, "slots")
    a, b, c = pool.take(3)
    pool.release([a, c])
    assert pool.take_again(b) == c, "held: the one given back last"
    assert pool.take_again(a) == a and not pool.num_free
    with pytest.raises(PoolExhausted):
        pool.take_again(-1)
    pool.release([c, a, b])
    assert [pool.take_again(place) for place in (a, c, -1)] == [a, c, b]
    pool.check_integrity([[a, b, c]])


def test_ten_thousand_random_operations():
    rng, pool, holders = random.Random(0), Pool(50, "pages"), []
    for _ in range(10_000):
        action = rng.random()
        if action < 0.2 and pool.num_free:
            wanted = rng.randrange(-1, 50)
            free = wanted in pool.free
            holders.append([pool.take_again(wanted)])
            assert (holders[-1] == [wanted]) == free
        elif action < 0.4 and pool.num_free:
            holders.append(pool.take(rng.randint(1, min(4, pool.num_free))))
        elif action < 0.6 and holders:
            twin = list(rng.choice(holders))
            pool.share(twin)
            holders.append(twin)
        elif holders:
            pool.release(holders.pop(rng.randrange(len(holders))))
        pool.check_integrity(holders)
    for held in holders:
        pool.release(held)
    assert pool.num_free == 50
