"""Frames of a tier: random wishes, each kept, within the bound; the least recently wanted give way."""

import random

import numpy as np
import pytest

from opensala.cache.frames import Frames


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("limit", [6, 9, 40])
def test_random_wishes_are_kept_within_the_bound(limit, numbered):
    draw = random.Random(limit)
    frames = Frames(3, 30, limit, numbered=numbered)
    last = {}
    for clock in range(400):
        if draw.random() < 0.1:
            page = draw.randrange(30)
            frames.drop(page)
            last = {key: when for key, when in last.items() if key[1] != page}
            frames.check_integrity()
        layer, pages = draw.randrange(3), np.array(sorted(draw.sample(range(30), draw.randint(1, 6))))
        frames.bound[pages] = True
        here = {key for key in last if frames.of[key] >= 0}
        missing = frames.want(layer, pages)
        assert missing.tolist() == [p for p in pages.tolist() if (layer, p) not in here]
        gone = frames.make_room(len(missing))
        frames.put(layer, missing)
        frames.check_integrity()
        last |= {(layer, page): clock for page in pages.tolist()}
        assert (frames.of[layer, pages] >= 0).all()
        assert set(gone) <= here and not {(layer, p) for p in pages.tolist()} & set(gone)
        kept = here - set(gone) - {(layer, p) for p in pages.tolist()}
        assert not gone or not kept or max(last[k] for k in gone) <= min(last[k] for k in kept)
    assert limit == 40 or (frames.of >= 0).sum() == limit


def test_a_smaller_bound_is_kept_at_once():
    frames = Frames(1, 10, None)
    frames.bound[:9] = True
    frames.put(0, frames.want(0, np.arange(10)))  # the last one does not count: it is nowhere else
    frames.limit = 4
    assert len(frames.shrink()) == 5 and frames.of[0, 9] == 9
    frames.check_integrity()
