"""Lightning attention: the chunked form against the plain statement, outputs and every gradient."""

import pytest
import torch

from opensala.ops import alibi_slopes, lightning_attention
from opensala.ops.lightning import chunk


def run(backend, inputs, decay, cu_seqlens=None, scale=0.3):
    leaves = [x.clone().requires_grad_() for x in inputs]
    o, state = lightning_attention(*leaves[:3], decay, initial_state=leaves[3], scale=scale, cu_seqlens=cu_seqlens, backend=backend)
    generator = torch.Generator().manual_seed(7)
    loss = (o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=generator, dtype=state.dtype)).sum()
    loss.backward()
    return {"o": o, "state": state} | {f"d{n}": x.grad for n, x in zip(("q", "k", "v", "s0"), leaves, strict=True)}


def draw(batch, length, heads, dim, value_dim, sequences, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length * 31 + dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [normal(batch, length, heads, dim), normal(batch, length, heads, dim), normal(batch, length, heads, value_dim),
            normal(sequences, heads, dim, value_dim)]


def assert_same(got, wanted, tolerance):
    for name in wanted:
        error = (got[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1)
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("batch", "length", "heads", "dim", "value_dim"), [
    (1, 1, 2, 8, 8), (2, 63, 3, 16, 16), (1, 128, 1, 4, 8), (2, 129, 2, 8, 4), (1, 500, 2, 60, 24), (3, 2, 5, 3, 7),
], ids=str)
def test_chunked_equals_naive_in_float64(batch, length, heads, dim, value_dim):
    # float64: the two forms differ by rounding only, 1e-11 relative is two digits above what is seen
    decay = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    inputs = draw(batch, length, heads, dim, value_dim, batch)
    assert_same(run("torch", inputs, decay), run("naive", inputs, decay), 1e-11)


@pytest.mark.parametrize("bounds", [[0, 263], [0, 5, 70, 200, 263], [0, 1, 2, 130, 258, 263]], ids=str)
def test_packed_documents_equal_naive_in_float64(bounds):
    decay = torch.tensor(alibi_slopes(2), dtype=torch.float64)
    inputs = draw(1, bounds[-1], 2, 16, 8, len(bounds) - 1)
    cu = torch.tensor(bounds)
    assert_same(run("torch", inputs, decay, cu), run("naive", inputs, decay, cu), 1e-11)


def test_segments_of_a_long_input_join(monkeypatch):
    decay = torch.tensor(alibi_slopes(2), dtype=torch.float64)
    inputs = draw(1, 700, 2, 8, 8, 1)
    whole = run("torch", inputs, decay)
    monkeypatch.setattr(chunk, "SEGMENT_ELEMENTS", 2 * 128 * 128 * 2)
    assert_same(run("torch", inputs, decay), whole, 1e-12)
    cu = torch.tensor([0, 300, 700])
    packed_inputs = [*inputs[:3], inputs[3].repeat(2, 1, 1, 1)]
    assert_same(run("torch", packed_inputs, decay, cu), run("naive", packed_inputs, decay, cu), 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_stays_near_float64(dtype, tolerance):
    # compute and state are float32 whatever the dtype: what is left is rounding of inputs and output (2^-8, 2^-11)
    decay = torch.tensor(alibi_slopes(4))
    inputs = draw(1, 300, 4, 16, 16, 1, dtype)
    wanted, wanted_state = lightning_attention(*(x.double() for x in inputs[:3]), decay.double(),
                                               initial_state=inputs[3].double(), backend="naive")
    got, state = lightning_attention(*inputs[:3], decay, initial_state=inputs[3])
    assert got.dtype == dtype and state.dtype == torch.float32
    assert (got - wanted).abs().max() / wanted.abs().max() < tolerance
    assert (state - wanted_state).abs().max() / wanted_state.abs().max() < 2e-5


def test_state_carries_across_calls():
    decay = torch.tensor(alibi_slopes(3), dtype=torch.float64)
    q, k, v, s = draw(2, 200, 3, 8, 8, 2)
    whole, final = lightning_attention(q, k, v, decay, initial_state=s)
    parts, state = [], s
    for cut in (slice(0, 1), slice(1, 64), slice(64, 199), slice(199, 200)):
        o, state = lightning_attention(q[:, cut], k[:, cut], v[:, cut], decay, initial_state=state)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_gradients_by_finite_differences():
    decay = torch.tensor([0.05, 0.4], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in draw(1, 19, 2, 3, 4, 1)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: lightning_attention(q, k, v, decay, initial_state=s), inputs)


def test_strong_decay_leaves_no_denormals():
    o, state = lightning_attention(*draw(1, 400, 2, 8, 8, 1, torch.float32)[:3], torch.tensor([5.0, 40.0]))
    tiny = torch.finfo(torch.float32).tiny
    assert not ((state.abs() > 0) & (state.abs() < tiny)).any() and torch.isfinite(o).all()


def test_slopes_follow_the_alibi_series():
    assert alibi_slopes(8) == [2.0 ** -(h + 1) for h in range(8)]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


@pytest.mark.parametrize(("change", "message"), [
    ({"k": torch.zeros(1, 5, 1, 4)}, "Repeat k and v"),
    ({"decay": torch.zeros(3)}, "one rate for each of 2 heads"),
    ({"initial_state": torch.zeros(2, 2, 4, 4)}, "initial_state must have shape"),
    ({"cu_seqlens": torch.tensor([0, 3])}, "rise from 0 to 5"),
    ({"backend": "fast"}, "'fast' is not one of"),
])
def test_bad_input_is_refused(change, message):
    arguments = {"q": torch.zeros(1, 5, 2, 4), "k": torch.zeros(1, 5, 2, 4), "v": torch.zeros(1, 5, 2, 4),
                 "decay": torch.zeros(2)} | change
    with pytest.raises(ValueError, match=message):
        lightning_attention(**arguments)
