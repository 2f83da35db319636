"""The four reference cases (an independent float64 implementation), one-shot, chunked and token by token."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import opensala.model.attention as attention
from opensala import MiniCPMSALAForCausalLM, SALACache
from opensala.ops import exact_ties, use_backend
from tests.ops.grid import HAS_TRITON, TRITON_DEVICE

FOLDER = Path(__file__).parents[1] / "vectors"
TOLERANCE = 1e-4  # float32; logits are of order 1, 5e-6 is seen
CASES = ["dense_short", "sparse_long", "grow", "options"]


def load(case):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / case, dtype=torch.float32)
    assert isinstance(model, MiniCPMSALAForCausalLM)
    expected = load_file(FOLDER / case / "expected.safetensors")
    return model.eval(), expected, expected["input_ids"][None].long()


@torch.no_grad()
def read(model, ids, cuts):
    cache, outputs, start = SALACache(model.config), [], 0
    for cut in cuts:
        if start >= ids.shape[1]:
            break
        outputs.append(model(ids[:, start : start + cut], past_key_values=cache).logits)
        start += cut
    return torch.cat(outputs, 1)[0], cache


def check(logits, cache, expected):
    assert (logits - expected["logits"]).abs().max() < TOLERANCE
    for i, layer in enumerate(cache.layers):
        if f"state.{i}" in expected:
            assert (layer.state[0] - expected[f"state.{i}"]).abs().max() < 2e-3  # states are of order 100


@pytest.mark.parametrize("case", ["dense_short", "sparse_long", "options"])
@pytest.mark.parametrize("chunk", [1, 63, 64, 500, 5000])
def test_every_chunking_gives_the_reference_logits(case, chunk):
    model, expected, ids = load(case)
    logits, cache = read(model, ids, itertools.repeat(chunk))
    check(logits, cache, expected)
    if chunk == 5000:
        with torch.no_grad():
            assert (model(ids, use_cache=False).logits[0] - expected["logits"]).abs().max() < TOLERANCE


def test_grow_turns_sparse_at_dense_len():
    model, expected, ids = load("grow")
    check(*read(model, ids, [200, *[1] * 200]), expected)


@pytest.mark.parametrize("case", ["sparse_long", "grow", "options"])
def test_selected_blocks(case, monkeypatch):
    model, expected, ids = load(case)
    seen: dict[int, list[torch.Tensor]] = {}
    order = itertools.cycle([i for i in range(model.config.num_hidden_layers) if model.config.is_sparse(i)])
    select = attention.select_blocks

    def watch(*args, **kwargs):
        blocks = select(*args, **kwargs)
        seen.setdefault(next(order), []).append(blocks[0])
        return blocks

    monkeypatch.setattr(attention, "select_blocks", watch)
    read(model, ids, [200, *[1] * 200] if case == "grow" else [5000])
    for layer, parts in seen.items():
        wanted = expected[f"selected.{layer}"]
        got = torch.cat(parts)[-len(wanted) :]
        assert (got != wanted).any(-1).float().mean() <= 0.001, f"layer {layer}"


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # a part without keys: -inf is meant
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_the_triton_kernels_give_the_reference_logits():
    """Every op in its Triton form; rows of blocks that tie are decided by the reference rule."""
    model, expected, ids = load("sparse_long")
    with use_backend("triton"), exact_ties():
        logits, cache = read(model.to(TRITON_DEVICE), ids.to(TRITON_DEVICE), [5000])
    for layer in cache.layers:
        if getattr(layer, "state", None) is not None:
            layer.state = layer.state.cpu()
    check(logits.cpu(), cache, expected)
