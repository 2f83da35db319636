"""The cache: growth, rollback, reordering, forks, interruption, bytes."""

import pytest
import torch
from transformers import DynamicCache

from opensala import SALACache
from opensala.model.cache import text_bytes as cache_bytes
from opensala.model.cache import _Store

from ..conftest import tiny_model
from .test_equality import TOLERANCE, tokens


@torch.no_grad()
def filled(model, ids, **options):
    cache = SALACache(model.config, **options)
    model(ids, past_key_values=cache)
    return cache


@torch.no_grad()
def following(model, cache, ids):
    return model(ids, past_key_values=cache).logits


def test_growth_copies_a_bounded_number_of_times():
    store, copies, last = _Store(), 0, None
    for needed in range(1, 20_000):
        data = store.reserve(torch.empty(1, 1, 1, 1), 1, needed)
        copies += data is not last
        last = data
    assert copies < 15


def test_an_announced_prompt_is_allocated_once():
    model, cache = tiny_model(), None
    cache = SALACache(model.config)
    cache.begin_prompt([200], new_tokens=10)
    ids, storages = tokens(200), set()
    with torch.no_grad():
        for part in ids.split(33, 1):
            model(part, past_key_values=cache)
            storages.add(cache.layers[0].keys.data.data_ptr())
    assert len(storages) == 1 and cache.layers[0].keys.data.shape[1] == 210


def test_bytes_are_those_of_the_tensors():
    model = tiny_model()
    cache = filled(model, tokens(200))
    windows = (200 - 8) // 4 + 1 + (200 - 32) // 16 + 1
    per_layer = (2 * 200 + windows) * 2 * 8 * 4
    assert (
        cache.num_bytes()
        == 2 * per_layer + 2 * 4 * 8 * 8 * 4
        == cache_bytes(model.config, 200, torch.float32)
    )
    assert cache.num_bytes(allocated=True) >= cache.num_bytes()


def test_crop_refuses_without_recording_and_leaves_the_cache_alone():
    model, ids = tiny_model(), tokens(150)
    cache = filled(model, ids)
    with pytest.raises(ValueError, match="record_past=True"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="crop takes -150"):
        cache.crop(-151)
    with pytest.raises(ValueError, match="removes the last n"):
        cache.crop(3)
    assert not cache.is_croppable
    torch.testing.assert_close(
        following(model, cache, ids[:, :5]), following(model, filled(model, ids), ids[:, :5])
    )
    cache.crop(0)
    cache.crop(-155)
    assert cache.columns == 0 and cache.num_bytes() == 0


@pytest.mark.parametrize("dropped", [1, 7, 20])
def test_crop_within_the_last_call_is_exact(dropped):
    model, ids = tiny_model(), tokens(170)
    cache = filled(model, ids[:, :150], record_past=True)
    following(model, cache, ids[:, 150:170])
    cache.crop(-dropped)
    assert cache.lengths == [170 - dropped] and cache.get_seq_length() == 170 - dropped
    more = tokens(12, seed=9)
    expected = SALACache(model.config)
    expected.begin_prompt([150])
    with torch.no_grad():
        model(ids[:, :150], past_key_values=expected)
        if dropped < 20:
            model(ids[:, 150 : 170 - dropped], past_key_values=expected)
    torch.testing.assert_close(following(model, cache, more), following(model, expected, more), **TOLERANCE)
    cache.crop(-5)  # and again, within the newest call
    assert cache.lengths == [177 - dropped]


def test_crop_beyond_the_recorded_call_refuses():
    model, ids = tiny_model(), tokens(170)
    cache = filled(model, ids[:, :150], record_past=True)
    following(model, cache, ids[:, 150:])
    with pytest.raises(ValueError, match="the last call was shorter"):
        cache.crop(-21)


def test_reorder_and_repeat_move_whole_rows():
    model, ids = tiny_model(), tokens(140, batch=3)
    cache = filled(model, ids)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    more = tokens(6, seed=3, batch=3)
    wanted = following(model, filled(model, ids[[2, 0, 2]]), more)
    torch.testing.assert_close(following(model, cache, more), wanted, **TOLERANCE)
    cache = filled(model, ids[:2])
    cache.batch_repeat_interleave(2)
    more = tokens(6, seed=3, batch=4)
    torch.testing.assert_close(
        following(model, cache, more), following(model, filled(model, ids[[0, 0, 1, 1]]), more), **TOLERANCE
    )


def test_fork_is_independent():
    model, ids = tiny_model(), tokens(150)
    cache = filled(model, ids)
    twin, other = cache.fork(), cache.fork()
    a, b = tokens(20, seed=1), tokens(20, seed=2)
    first = following(model, twin, a)
    following(model, other, b)
    torch.testing.assert_close(following(model, cache, a), first)
    assert other.lengths == [170]


def test_snapshots_of_overwritten_tokens_are_refused():
    model, ids = tiny_model(), tokens(100)
    cache = filled(model, ids, record_past=True)
    early = cache.snapshot()
    following(model, cache, tokens(50, seed=1))
    late = cache.snapshot()
    cache.restore(early)
    following(model, cache, tokens(80, seed=2))  # longer than `late`, but other tokens
    with pytest.raises(ValueError, match="take a new one"):
        cache.restore(late)
    cropped = cache.snapshot()
    cache.crop(-10)
    following(model, cache, tokens(20, seed=3))
    with pytest.raises(ValueError, match="take a new one"):
        cache.restore(cropped)
    cache.restore(early)
    cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(ValueError, match="take a new one"):
        cache.restore(early)


def test_a_cache_may_cross_inference_mode():
    model, ids = tiny_model(), tokens(150)
    cache = SALACache(model.config)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    got = following(model, cache, tokens(300, seed=1))
    torch.testing.assert_close(got, following(model, filled(model, ids), tokens(300, seed=1)))


def test_restore_goes_back_exactly():
    model, ids = tiny_model(), tokens(150)
    cache = filled(model, ids)
    point = cache.snapshot()
    first = following(model, cache, tokens(40, seed=1))
    following(model, cache, tokens(3, seed=2))
    cache.restore(point)
    assert cache.lengths == [150] and cache.get_seq_length() == 150
    assert torch.equal(following(model, cache, tokens(40, seed=1)), first)
    cache.restore(point)
    with pytest.raises(ValueError, match="taken from another cache"):
        cache.restore(filled(model, tokens(200)).snapshot())


def test_an_interrupted_call_changes_nothing(monkeypatch):
    model, ids = tiny_model(), tokens(150)
    cache = filled(model, ids)
    expected = following(model, cache.fork(), ids[:, :9])

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        following(model, cache, tokens(30, seed=8))
    handle.remove()
    assert cache.lengths == [150] and cache.columns == 150
    torch.testing.assert_close(following(model, cache, ids[:, :9]), expected)


def test_wrong_caches_are_refused():
    model, ids = tiny_model(), tokens(20)
    with pytest.raises(ValueError, match=r"must be an opensala.SALACache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="holds 1 rows, but the call has 2"):
        model(tokens(4, batch=2), past_key_values=filled(model, ids))
