"""Lightning attention of several sequences whose states lie in slots, against each sequence alone."""

import math

import pytest
import torch

from opensala.ops import alibi_slopes, lightning_attention, lightning_attention_slots
from tests.ops.grid import BACKENDS, HAS_TRITON, TRITON_DEVICE, assert_close, nothing_waits

SLOTS = 9
# New tokens of each sequence, the slots they read and write: another one, the same, none before, none new.
CALLS = {
    "one token each": ([1, 1, 1, 1], [3, 0, -1, 7], [4, 0, 1, 8]),
    "some tokens": ([5, 1, 0, 3], [3, 0, 6, -1], [4, 0, 1, 8]),
    "one of them long": ([70, 1, 2], [3, -1, 0], [4, 7, 0]),
}


def draw(counts, heads=2, dim=20, value_dim=12):
    generator = torch.Generator().manual_seed(sum(counts) + dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = sum(counts)
    inputs = [normal(tokens, heads, dim), normal(tokens, heads, dim), normal(tokens, heads, value_dim)]
    states = normal(SLOTS, heads, dim, value_dim)
    return inputs, torch.tensor(alibi_slopes(heads), dtype=torch.float64), states


def alone(inputs, decay, states, counts, read, write, scale):
    """Outputs and slots, sequence by sequence by the reference implementation."""
    outputs, after = [], states.clone()
    for pieces, source, target in zip(
        zip(*(x.split(counts) for x in inputs), strict=True), read, write, strict=True
    ):
        begin = states[source] if source >= 0 else torch.zeros_like(states[0])
        o, end = lightning_attention(
            *(x[None] for x in pieces), decay, scale=scale, initial_state=begin[None], backend="naive"
        )
        outputs.append(o[0])
        after[target] = end[0]
    return torch.cat(outputs), after


def places(counts, read, write, device):
    bounds = torch.tensor([0, *counts]).cumsum(0)
    return {
        name: torch.as_tensor(x).int().to(device)
        for name, x in (("cu_seqlens", bounds), ("read_slots", read), ("write_slots", write))
    }


@pytest.mark.parametrize("dims", [(20, 12), (32, 32), (60, 64)], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backend", [x for x in BACKENDS if x.id != "torch"])
def test_sequences_of_a_call_equal_each_alone(backend, call, dims):
    counts, read, write = call
    inputs, decay, states = draw(counts, 2, *dims)
    wanted, wanted_states = alone(inputs, decay, states, counts, read, write, 0.3)
    untouched = [n for n in range(SLOTS) if n not in (*read, *write)]
    states[untouched] = math.nan
    slots = backend.cast(states)
    out = lightning_attention_slots(
        *map(backend.cast, inputs), backend.cast(decay), slots, scale=0.3, backend=backend.name,
        **places(counts, read, write, backend.device),
    )  # fmt: skip
    assert_close(out, wanted, backend.tolerance)
    used = [n for n in range(SLOTS) if n not in untouched]
    assert_close(slots[used], wanted_states[used], backend.tolerance)
    assert slots[untouched].isnan().all()


@pytest.mark.triton
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("value_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wide_keys_and_narrow_values_as_the_model_has_them(value_dtype):
    counts, read, write = CALLS["some tokens"]
    inputs, decay, states = draw(counts, 3, 32, 40)
    q, k, v = inputs[0].float(), inputs[1].float(), inputs[2].to(value_dtype)
    wanted, wanted_states = alone((q, k, v), decay, states, counts, read, write, 0.2)
    args = [x.to(TRITON_DEVICE) for x in (q, k, v, decay.float(), states.float())]
    where = places(counts, read, write, TRITON_DEVICE)
    out = lightning_attention_slots(*args, scale=0.2, backend="triton", **where)
    assert out.dtype == value_dtype
    assert_close(out, wanted, 1e-2)  # rounding of the outputs, 2^-8 in bfloat16
    assert_close(args[-1][write], wanted_states[write], 2e-5)  # states stay float32


@pytest.mark.triton
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_triton_never_waits_for_the_device(call):
    counts, read, write = call
    inputs, decay, states = draw(counts)
    args = [x.to(TRITON_DEVICE, torch.float32) for x in (*inputs, decay, states)]
    where = places(counts, read, write, TRITON_DEVICE)
    with nothing_waits():
        lightning_attention_slots(*args, backend="triton", **where)


@pytest.mark.triton
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: int(x[0]),
        lambda x: bool(x[0]),
        lambda x: x[x > 0],
    ],
    ids=["tolist", "item", "int", "bool", "boolean index"],
)
def test_what_would_wait_is_noticed(read):
    x = torch.arange(3, device=TRITON_DEVICE)
    with pytest.raises((AssertionError, RuntimeError), match="wait|synchroniz"), nothing_waits():
        read(x)
