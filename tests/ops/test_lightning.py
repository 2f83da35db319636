"""Lightning attention: every backend against the reference implementation, outputs and every gradient."""

import pytest
import torch

from opensala.ops import alibi_slopes, lightning_attention
from opensala.ops.lightning import chunk
from tests.ops.grid import BACKENDS, TRITON_DEVICE, assert_close


def run(backend, inputs, decay, cu_seqlens=None, scale=0.3):
    leaves = [x.clone().requires_grad_() for x in inputs]
    o, state = lightning_attention(
        *leaves[:3], decay, initial_state=leaves[3], scale=scale, cu_seqlens=cu_seqlens, backend=backend
    )
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)).sum()
        for x in (o, state)
    )
    loss.backward()
    return {"o": o, "state": state} | {
        f"d{n}": x.grad for n, x in zip(("q", "k", "v", "s0"), leaves, strict=True)
    }


def draw(batch, length, heads, dim, value_dim, sequences, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length * 31 + dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        normal(batch, length, heads, dim),
        normal(batch, length, heads, dim),
        normal(batch, length, heads, value_dim),
        normal(sequences, heads, dim, value_dim),
    ]


def assert_same(got, wanted, tolerance):
    for name in wanted:
        error = (got[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1)
        assert error < tolerance, f"{name}: {error:.2e}"


def compare(backend, inputs, decay, *rest):
    """Outputs and gradients of `backend` against the reference implementation in float64."""
    wanted = run("naive", [x.double() for x in inputs], decay.double(), *rest)
    got = run(
        backend.name, [backend.cast(x) for x in inputs], backend.cast(decay), *(backend.cast(x) for x in rest)
    )
    for name in wanted:
        assert_close(got[name], wanted[name], backend.tolerance, name)


SHAPES = [
    (1, 1, 2, 8, 8),
    (3, 1, 2, 40, 24),
    (2, 63, 3, 16, 16),
    (1, 128, 1, 4, 8),
    (2, 129, 2, 8, 4),
    (1, 500, 2, 60, 24),
    (3, 2, 5, 3, 7),
    (1, 70, 1, 20, 130),
]
TRITON = [x for x in BACKENDS if x.id == "triton"]
PACKED = [[0, 263], [0, 5, 70, 200, 263], [0, 1, 2, 130, 258, 263]]


@pytest.mark.parametrize(("batch", "length", "heads", "dim", "value_dim"), SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_naive(backend, batch, length, heads, dim, value_dim):
    decay = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    compare(backend, draw(batch, length, heads, dim, value_dim, batch), decay)


@pytest.mark.parametrize(
    "rates", [alibi_slopes(2), [3.0, 40.0], [0.0, 1e-4]], ids=["alibi", "strong", "weak"]
)
@pytest.mark.parametrize("bounds", PACKED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_naive(backend, bounds, rates):
    cu = torch.tensor(bounds, dtype=torch.int32 if len(bounds) % 2 else torch.int64)
    compare(
        backend, draw(1, bounds[-1], 2, 16, 8, len(bounds) - 1), torch.tensor(rates, dtype=torch.float64), cu
    )


@pytest.mark.parametrize(
    ("segment", "lengths"),
    [
        (128, [128]),
        (128, [129]),
        (64, [330]),
        (128, [127, 127, 1]),
        (128, [128, 128, 1]),
        (128, [129, 129, 1]),
        (64, [5, 65, 130, 1, 63, 66]),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", TRITON)
def test_segments_of_the_triton_kernels_join(backend, segment, lengths, monkeypatch):
    kernels = pytest.importorskip("opensala.ops.lightning.triton")
    monkeypatch.setattr(kernels, "SEGMENTS", (segment, segment))
    decay = torch.tensor(
        [0.02, 1.2, 30.0], dtype=torch.float64
    )  # reaches far, cut off within a segment, within a chunk
    documents = [] if len(lengths) == 1 else [torch.tensor([0, *lengths]).cumsum(0)]
    rows = 2 if len(lengths) == 1 else 1
    compare(backend, draw(rows, sum(lengths), 3, 8, 12, max(rows, len(lengths))), decay, *documents)


@pytest.mark.triton
def test_the_last_segment_leaves_no_state(monkeypatch):
    """There is no room for it. Here there is, and nobody writes there: memory nobody wrote reads as NaN."""
    kernels = pytest.importorskip("opensala.ops.lightning.triton")
    monkeypatch.setattr(kernels, "SEGMENTS", (64, 64))
    slots = kernels._Plan.slots.fget
    monkeypatch.setattr(kernels._Plan, "slots", property(lambda plan: slots(plan) + 1))
    _, k, v, _ = (x.to(TRITON_DEVICE) for x in draw(1, 128, 1, 8, 8, 1, torch.float32))
    decay = torch.tensor([0.1], device=TRITON_DEVICE)
    states = kernels._states(k, v, decay, None, kernels._plan(k, v, None), reverse=False, update_scale=1.0)
    assert states.isfinite().all((1, 2, 3)).tolist() == [True, False] and states[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    decay = torch.tensor(alibi_slopes(3), dtype=torch.float64)
    q, k, v, s = draw(2, 3, 70, 8, 12, 2)  # [B, H, T, D]
    s = torch.randn(2, 12, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).transpose(
        1, 3
    )
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    leaves = [backend.cast(x).requires_grad_() for x in (*turned, s)]
    assert not any(x.is_contiguous() for x in leaves)
    o, state = lightning_attention(
        *leaves[:3], backend.cast(decay), initial_state=leaves[3], scale=0.3, backend=backend.name
    )
    (o.sum() + state.sum()).backward()  # their gradients are one number, repeated with stride 0
    exact = [x.detach().double().requires_grad_() for x in (*turned, s)]
    wanted, wanted_state = lightning_attention(
        *exact[:3], decay, initial_state=exact[3], scale=0.3, backend="naive"
    )
    (wanted.sum() + wanted_state.sum()).backward()
    for a, b in zip(
        (o, state, *(x.grad for x in leaves)), (wanted, wanted_state, *(x.grad for x in exact)), strict=True
    ):
        assert_close(a, b, backend.tolerance)


@pytest.mark.parametrize("used", ["output", "state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_when_only_one_result_is_used(backend, used):
    decay = torch.tensor(alibi_slopes(2), dtype=torch.float64)

    def gradients(name, inputs, decay):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o, state = lightning_attention(*leaves, decay, backend=name)
        (o if used == "output" else state).square().sum().backward()
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]

    inputs = draw(1, 80, 2, 8, 12, 1)[:3]
    got = gradients(backend.name, [backend.cast(x) for x in inputs], backend.cast(decay))
    for a, b in zip(got, gradients("naive", inputs, decay), strict=True):
        assert_close(a, b, backend.tolerance)


@pytest.mark.triton
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize("dim", [24, 128])
def test_triton_in_low_precision(dim, dtype, tolerance, monkeypatch):
    # Factors are rounded to the inputs' dtype (2^-8, 2^-11), sums are float32. The interpreter computes
    # bfloat16 in float32.
    kernels = pytest.importorskip("opensala.ops.lightning.triton")
    monkeypatch.setattr(kernels, "SEGMENTS", (128, 128))
    decay = torch.tensor(alibi_slopes(2), dtype=torch.float64)
    inputs = draw(1, 200, 2, dim, dim, 1, dtype)
    wanted = run("naive", [x.double() for x in inputs], decay, scale=dim**-0.5)
    got = run("triton", [x.to(TRITON_DEVICE) for x in inputs], decay.to(TRITON_DEVICE), scale=dim**-0.5)
    assert got["o"].dtype == got["dq"].dtype == dtype and got["state"].dtype == torch.float32
    for name in wanted:
        assert_close(got[name], wanted[name], tolerance, name)


def as_the_kernel_rounds(q, k, v, decay, scale, dtype, chunk=64):
    """`output_kernel` in float64 but for the places at which it rounds to `dtype`, for inputs `[T, H, D]`
    and decay `[H]`: (o, state)."""
    place = torch.arange(chunk, dtype=torch.float64)
    apart = place[:, None] - place[None, :]
    rates = decay.double()[:, None, None]
    causal = torch.where(apart >= 0, torch.exp(-rates * apart.clamp(min=0)), 0.0) * scale
    reach = torch.exp(-rates * (place[:, None] + 1)) * scale
    left = torch.exp(-rates * (chunk - 1 - place[:, None]))
    state = torch.zeros(len(decay), q.shape[2], v.shape[2], dtype=torch.float64)
    out = []
    for a in range(0, len(q), chunk):
        x, y, z = (t[a : a + chunk].double().transpose(0, 1) for t in (q, k, v))
        scores = (x @ y.transpose(1, 2) * causal).to(dtype).double()
        out.append((scores @ z + x @ state.to(dtype).double() * reach).transpose(0, 1))
        added = y.transpose(1, 2) @ (z * left).to(dtype).double()
        state = state * torch.exp(-rates * chunk) + added
        state = state if dtype == torch.float64 else state.float().double()
    return torch.cat(out), state


def test_bfloat16_holds_at_128k_tokens():
    """Rounded factors, states in float32: the error does not grow with length, even at the slowest decay."""
    generator = torch.Generator().manual_seed(0)
    tokens, decay = 1 << 17, torch.tensor([0.84, 0.0039, 1e-5])
    q, k, v = (torch.randn(tokens, 3, 16, generator=generator).bfloat16() for _ in range(3))
    o, state = as_the_kernel_rounds(q, k, v, decay, 0.25, torch.bfloat16)
    wanted, wanted_state = as_the_kernel_rounds(q, k, v, decay, 0.25, torch.float64)
    for part in (slice(0, 8192), slice(-8192, None)):
        error = (o[part] - wanted[part]).pow(2).mean((0, 2)) / wanted[part].pow(2).mean((0, 2))
        assert error.sqrt().max() < 3e-3  # bfloat16 rounds by 2^-9 at most, sums of such factors by less
    assert (state - wanted_state).norm() / wanted_state.norm() < 2e-3


@pytest.mark.triton
def test_the_kernel_rounds_like_this():
    """What the test above stands on; in float16, as the interpreter cannot do bfloat16."""
    kernels = pytest.importorskip("opensala.ops.lightning.triton")
    config = kernels._output_config(16, 16, torch.float16, 90)
    decay = torch.tensor([0.5, 0.01])
    q, k, v = (x[0] for x in draw(1, 640, 2, 16, 16, 1, torch.float16)[:3])
    wanted, wanted_state = as_the_kernel_rounds(q, k, v, decay, 0.25, torch.float16, config["C"])
    exact, _ = as_the_kernel_rounds(q, k, v, decay, 0.25, torch.float64, config["C"])
    args = [x[None].to(TRITON_DEVICE) for x in (q, k, v)]
    o, state = lightning_attention(*args, decay.to(TRITON_DEVICE), scale=0.25, backend="triton")
    error = (o[0].cpu().double() - wanted).norm()
    # One rounding more, that of the result; float16 states are scaled before they are rounded.
    assert error < 0.7 * (wanted - exact).norm() + 2**-12 * wanted.norm()
    assert_close(state[0], wanted_state, 1e-4)


@pytest.mark.triton
def test_bfloat16_reaches_the_kernels_and_states_stay_float32(monkeypatch):
    kernels = pytest.importorskip("opensala.ops.lightning.triton")
    seen = []
    monkeypatch.setattr(kernels, "computable", lambda x: x)

    def forward(q, k, v, decay, initial, plan, scale):
        seen.append([x.dtype for x in (q, k, v, initial)])
        return torch.zeros_like(v), initial

    monkeypatch.setattr(kernels, "_forward", forward)
    q, k, v, state = draw(1, 70, 2, 16, 16, 1, torch.bfloat16)
    o, final = kernels.triton_lightning_attention(
        q, k, v, torch.ones(2), scale=1.0, initial_state=state.float()
    )
    assert seen == [[torch.bfloat16] * 3 + [torch.float32]]
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32


@pytest.mark.triton
def test_float16_states_may_pass_its_largest_number():
    pytest.importorskip("triton")
    q, k, v = (
        torch.full((1, 200, 1, 16), x, dtype=torch.float16, device=TRITON_DEVICE) for x in (0.01, 30.0, 30.0)
    )
    decay = torch.tensor([1e-3], device=TRITON_DEVICE)
    o, state = lightning_attention(q, k, v, decay, backend="triton")
    wanted, wanted_state = lightning_attention(
        q.cpu().double(), k.cpu().double(), v.cpu().double(), decay.cpu().double(), backend="naive"
    )
    assert state.max() > torch.finfo(torch.float16).max
    assert_close(o, wanted, 2e-3)
    assert_close(state, wanted_state, 2e-3)


def test_segments_of_a_long_input_join(monkeypatch):
    decay = torch.tensor(alibi_slopes(2), dtype=torch.float64)
    inputs = draw(1, 700, 2, 8, 8, 1)
    whole = run("torch", inputs, decay)
    monkeypatch.setattr(chunk, "SEGMENT_ELEMENTS", 2 * 128 * 128 * 2)
    assert_same(run("torch", inputs, decay), whole, 1e-12)
    cu = torch.tensor([0, 300, 700])
    packed_inputs = [*inputs[:3], inputs[3].repeat(2, 1, 1, 1)]
    assert_same(run("torch", packed_inputs, decay, cu), run("naive", packed_inputs, decay, cu), 1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_low_precision_stays_near_float64(dtype, tolerance):
    # compute and state are float32 whatever the dtype: what is left is rounding of inputs and output
    # (2^-8, 2^-11)
    decay = torch.tensor(alibi_slopes(4))
    inputs = draw(1, 300, 4, 16, 16, 1, dtype)
    wanted, wanted_state = lightning_attention(
        *(x.double() for x in inputs[:3]), decay.double(), initial_state=inputs[3].double(), backend="naive"
    )
    got, state = lightning_attention(*inputs[:3], decay, initial_state=inputs[3])
    assert got.dtype == dtype and state.dtype == torch.float32
    assert (got - wanted).abs().max() / wanted.abs().max() < tolerance
    assert (state - wanted_state).abs().max() / wanted_state.abs().max() < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_carries_across_calls(backend):
    decay = backend.cast(torch.tensor(alibi_slopes(3), dtype=torch.float64))
    q, k, v, s = (backend.cast(x) for x in draw(2, 200, 3, 8, 8, 2))
    whole, final = lightning_attention(q, k, v, decay, initial_state=s, backend=backend.name)
    parts, state = [], s
    for cut in (slice(0, 1), slice(1, 64), slice(64, 199), slice(199, 200)):
        o, state = lightning_attention(
            q[:, cut], k[:, cut], v[:, cut], decay, initial_state=state, backend=backend.name
        )
        parts.append(o)
    assert_close(torch.cat(parts, 1), whole.cpu(), backend.tolerance)
    assert_close(state, final.cpu(), backend.tolerance)


def test_gradients_by_finite_differences():
    decay = torch.tensor([0.05, 0.4], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in draw(1, 19, 2, 3, 4, 1)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: lightning_attention(q, k, v, decay, initial_state=s), inputs
    )


def test_strong_decay_leaves_no_denormals():
    o, state = lightning_attention(*draw(1, 400, 2, 8, 8, 1, torch.float32)[:3], torch.tensor([5.0, 40.0]))
    tiny = torch.finfo(torch.float32).tiny
    assert not ((state.abs() > 0) & (state.abs() < tiny)).any() and torch.isfinite(o).all()


def test_slopes_follow_the_alibi_series():
    assert alibi_slopes(8) == [2.0 ** -(h + 1) for h in range(8)]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 5, 1, 4)}, "Repeat k and v"),
        ({"decay": torch.zeros(3)}, "one rate for each of 2 heads"),
        ({"initial_state": torch.zeros(2, 2, 4, 4)}, "initial_state must have shape"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "rise from 0 to 5"),
        ({"backend": "fast"}, "'fast' is not one of"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "q": torch.zeros(1, 5, 2, 4),
        "k": torch.zeros(1, 5, 2, 4),
        "v": torch.zeros(1, 5, 2, 4),
        "decay": torch.zeros(2),
    } | change
    with pytest.raises(ValueError, match=message):
        lightning_attention(**arguments)
