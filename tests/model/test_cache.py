"""The cache: growth, rollback, reordering, forks, interruption, bytes."""

import copy
import gc
import pickle

import pytest
import torch
from transformers import DynamicCache

from opensala import SALACache
from opensala.model.storage import text_bytes as cache_bytes

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
    """A cache whose prompt is not announced grows by a constant factor."""
    model = tiny_model(attention_mode="sparse", num_hidden_layers=1, mixer_types=["minicpm4"])
    cache, storages = SALACache(model.config), set()
    for part in tokens(20_000).split(500, 1):
        following(model, cache, part)
        storages.add(cache.storage.kv[0].keys.data_ptr())
    assert len(storages) <= 6 and cache.storage.num_pages < 4 * 20_000 // 16


def test_an_announced_prompt_is_allocated_once():
    model = tiny_model()
    cache = SALACache(model.config)
    cache.begin_prompt([200], new_tokens=10)
    ids, storages = tokens(200), set()
    with torch.no_grad():
        for part in ids.split(33, 1):
            model(part, past_key_values=cache)
            storages.add(cache.storage.kv[0].keys.data_ptr())
    assert len(storages) == 1 and cache.storage.num_pages == -(-210 // 16) + 1  # and one for a page to copy


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
    assert cache.padded_length == 0 and cache.num_bytes() == 0


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


def test_snapshots_survive_whatever_comes_after():
    """A snapshot holds its pages and states: other texts, a crop or a reordering in between change
    nothing."""
    model, ids = tiny_model(), tokens(100)
    cache = filled(model, ids, record_past=True)
    early = cache.snapshot()
    following(model, cache, tokens(50, seed=1))
    late = cache.snapshot()
    more = tokens(20, seed=5)
    wanted = following(model, cache.fork(), more)
    cache.restore(early)
    following(model, cache, tokens(80, seed=2))  # longer than `late`, but other tokens
    cache.crop(-10)
    following(model, cache, tokens(20, seed=3))
    cache.reorder_cache(torch.tensor([0]))
    cache.restore(late)
    assert torch.equal(following(model, cache, more), wanted)
    first = following(model, filled(model, ids), more)
    cache.restore(early)
    assert torch.equal(following(model, cache, more), first)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_a_cache_can_be_copied_and_stored(how, tmp_path):
    model, ids = tiny_model(), tokens(120)
    cache = filled(model, ids)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(cache))
    elif how == "deepcopy":
        twin = copy.deepcopy(cache)
    else:
        torch.save(cache, tmp_path / "cache.pt")
        twin = torch.load(tmp_path / "cache.pt", weights_only=False)
    more = tokens(30, seed=1)
    assert torch.equal(following(model, twin, more), following(model, cache, more))
    assert twin.lengths == [150]


def test_pages_come_back_when_nobody_holds_them():
    model, ids = tiny_model(), tokens(150)
    cache = filled(model, ids)
    points = [cache.snapshot(), cache.fork()]
    for seed in range(3):
        following(model, cache, tokens(40, seed=seed))
        cache.restore(points[0])
    del points
    cache.reset()
    gc.collect()
    pools = cache._store.pages, cache._store.slots
    assert all(pool.num_free == pool.size for pool in pools)
    for pool in pools:
        pool.check_integrity([])


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
    assert cache.lengths == [150] and cache.padded_length == 150
    torch.testing.assert_close(following(model, cache, ids[:, :9]), expected)


def test_wrong_caches_are_refused():
    model, ids = tiny_model(), tokens(20)
    with pytest.raises(ValueError, match=r"must be an opensala.SALACache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    other = tiny_model(num_key_value_heads=1)
    with pytest.raises(ValueError, match="its num_key_value_heads is 1, this model's is 2"):
        model(ids, past_key_values=filled(other, ids))
    with pytest.raises(ValueError, match="other tokens than the beginning of the prompt"):
        model.generate(tokens(30, seed=1), past_key_values=filled(model, ids), max_new_tokens=2)
    with pytest.raises(ValueError, match="holds 1 rows, but the call has 2"):
        model(tokens(4, batch=2), past_key_values=filled(model, ids))
