"""The kernels by themselves, timed by events: whole sequences, the last chunk of long ones, decoding steps.

Everything runs on the `triton` backend. Queries are drawn independently (`random`), which is the worst case
for sharing blocks, and `correlated`: neighbours resemble each other, as in text.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...ops import (
    BlockSpec,
    alibi_slopes,
    extend_compressed,
    lightning_attention,
    norm_gate,
    norm_rope,
    select_blocks,
    sparse_attention,
)
from ...ops.backends import Backend, use_backend
from ...ops.sparse import num_windows
from .. import baselines, counts
from ..cases import Shape, check_rows, difference
from ..timing import Timing, Work
from ..verify import check_lists
from .sizes import Sizes
from .steps import Context, Step

BACKEND: Backend = "triton"
SEGMENT = 128  # tokens that resemble each other in correlated queries
ALIKE = 0.9  # their correlation
TILE = 8  # queries of which the shared blocks are counted


def steps(sizes: Sizes) -> list[Step]:
    """The steps, the most telling first: the last ones are those that may be left out."""
    found, lengths = [], sizes.lengths
    for tokens in lengths:
        least = 3 if tokens <= lengths[0] else 8
        for queries in ("correlated", "random"):
            found.append(_step(f"sparse, {tokens} tokens, {queries}", least, _sparse(tokens, queries)))
        for dtype in (torch.bfloat16, torch.float32):
            found.append(_step(f"lightning, {tokens} tokens, {dtype}", least, _lightning(tokens, dtype)))
        found.append(_step(f"dense attention, {tokens} tokens", least, _dense(tokens)))
    for tokens in sizes.decoding:
        found.append(_step(f"decoding step, {tokens} tokens", 2, _decoding(tokens)))
    found.append(_step("decoding step of lightning", 1, lightning_step))
    for tokens in sizes.far:
        found.append(_step(f"last chunk of {tokens} tokens", 3, _last_chunk(tokens)))
    found.append(_step("norms", 2, norms))
    found.append(_step(f"backward, {lengths[0]} tokens", 5, _backward(lengths[0])))
    return found


def _step(name: str, least: float, run: Callable[[Context], None]) -> Step:
    def on_triton(context: Context) -> None:
        with use_backend(BACKEND):
            run(context)

    return Step(name.replace("torch.", ""), "kernels", least, on_triton)


def shape_of(context: Context, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Shape:
    sizes = context.sizes
    return Shape(tokens, sizes.heads, sizes.kv_heads, sizes.dim, dtype, sizes.spec)


def draw(shape: Shape, device: torch.device, queries: str, length: int | None = None) -> list[Tensor]:
    """q `[1, T, Hq, D]`, k and v `[1, L, Hkv, D]` (L = T unless given)."""

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, shape.dim, device=device, dtype=shape.dtype)

    q = normal(shape.tokens, shape.heads)
    if queries == "correlated":
        anchors = normal(-(-shape.tokens // SEGMENT), shape.heads) * ALIKE**0.5
        q *= (1 - ALIKE) ** 0.5
        q += anchors.repeat_interleave(SEGMENT, 1)[:, : shape.tokens]
    length = length or shape.tokens
    return [q, normal(length, shape.kv_heads), normal(length, shape.kv_heads)]


def _sparse(tokens: int, queries: str) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        device, report = context.device, context.report
        shape = shape_of(context, tokens)
        spec, size = shape.spec, shape.spec.block_size
        q, k, v = draw(shape, device.torch, queries)
        with torch.no_grad():
            blocks = select_blocks(q, k, spec)
            check_lists(q, k, blocks, spec, {tokens // 3, tokens - 1})
            check_rows(q, k, v, blocks, size, sparse_attention(q, k, v, blocks, size))
            for op, work, flops in (
                ("select_blocks", partial(select_blocks, q, k, spec), counts.selection_flops),
                ("sparse_attention", partial(sparse_attention, q, k, v, blocks, size), counts.sparse_flops),
            ):
                timing, peak = timed_with_peak(context, work)
                report.add(
                    op,
                    BACKEND,
                    timing,
                    shape=f"{shape} {queries}",
                    dtype=shape.dtype,
                    flops=flops(tokens, shape.heads, shape.dim, spec),
                    peak=peak,
                )
        report.note(f"{shape} {queries}: {sharing(blocks):.1f} distinct blocks in {TILE} neighbours' lists")

    return run


def sharing(blocks: Tensor) -> float:
    """Distinct blocks in the lists of `TILE` queries that follow each other, on average (a sample)."""
    tiles = blocks[0, : blocks.shape[1] // TILE * TILE].view(-1, TILE, *blocks.shape[2:])
    tiles = tiles[:: max(1, tiles.shape[0] // 256)].transpose(1, 2).flatten(2).sort(-1).values
    return (1 + (tiles.diff(dim=-1) > 0).sum(-1)).double().mean().item()


def timed_with_peak(context: Context, work: Work, budget: float = 0.6) -> tuple[Timing, float]:
    """Timing of one work, and the most memory during it."""
    context.device.start_peak()
    timing = context.device.take_turns({"": work}, budget)[""]
    return timing, context.device.peak_bytes()


def _lightning(tokens: int, dtype: torch.dtype) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        device, report, heads, dim = context.device, context.report, *_lightning_sizes(context)
        q, k, v = draw(Shape(tokens, heads, heads, dim, dtype), device.torch, "random")
        decay = torch.tensor(alibi_slopes(heads), device=device.torch)
        works: dict[str, Work] = {BACKEND: lambda: lightning_attention(q, k, v, decay)}
        if baselines.fla_installed():
            works["fla simple_gla"] = baselines.simple_gla(q, k, v, decay)
        else:
            report.say("  fla is not installed: Lightning stands alone")
        with torch.no_grad():
            _check_lightning(q, k, v, decay)
            works = usable(context, works)
            if len(works) > 1:
                ours, theirs = lightning_attention(q, k, v, decay)[0], baselines.simple_gla(q, k, v, decay)()
                report.note(f"fla simple_gla differs from ours by {difference(theirs, ours):.1e}")
            for name, timing in device.take_turns(works, 0.6).items():
                report.add(
                    "lightning_attention",
                    name,
                    timing,
                    shape=f"T={tokens} H={heads} D={dim}",
                    dtype=dtype,
                    flops=counts.lightning_flops(tokens, heads, dim, dim),
                    moved=counts.lightning_bytes(tokens, heads, dim, q.element_size()),
                )

    return run


def _check_lightning(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> None:
    """The last of some thousand tokens against float64."""
    tokens, last = min(4096, q.shape[1]), slice(-64, None)
    q, k, v = (x[:, :tokens] for x in (q, k, v))
    got = lightning_attention(q, k, v, decay)[0][:, last].double()
    wide = (x.double() for x in (q, k, v, decay))
    error = difference(got, lightning_attention(*wide, backend="torch")[0][:, last])
    if not error < (1e-2 if q.dtype == torch.bfloat16 else 1e-4):
        raise ValueError(
            f"lightning_attention is not timed: in {q.dtype} it differs from float64 by {error:.1e}"
        )


def _lightning_sizes(context: Context) -> tuple[int, int]:
    return context.sizes.lightning_heads, context.sizes.dim


def usable(context: Context, works: dict[str, Work]) -> dict[str, Work]:
    """Those of the works that run; why not is noted for the others (ours must run)."""
    found = {}
    for name, work in works.items():
        try:
            work()
            context.device.synchronize()
        except (RuntimeError, ImportError, ValueError, AssertionError, TypeError) as error:
            if name == BACKEND:
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            context.report.note(f"{name} does not run here: {first}")
        else:
            found[name] = work
    return found


def _dense(tokens: int) -> Callable[[Context], None]:
    """Causal `scaled_dot_product_attention` on the same shape, in each form that torch has for it."""

    def run(context: Context) -> None:
        device, shape = context.device, shape_of(context, tokens)
        q, k, v = draw(shape, device.torch, "random")
        with torch.no_grad():
            names, refused = baselines.usable_kinds(q, k, v)
            for line in refused:
                context.report.note(f"dense attention, {line}")
            fast = [n for n in names if n in ("flash", "cudnn")] or names
            for name in fast:
                work = partial(baselines.dense_attention, q, k, v, name)
                timing = device.take_turns({name: work}, 1.0, most=5, least=1)[name]
                context.report.add(
                    "scaled_dot_product_attention",
                    name,
                    timing,
                    shape=str(shape),
                    dtype=shape.dtype,
                    flops=counts.dense_flops(tokens, shape.heads, shape.dim),
                )

    return run


def compressed(k: Tensor, spec: BlockSpec) -> tuple[Tensor, Tensor]:
    """Both levels of compressed keys of `[1, L, Hkv, D]`."""
    levels = []
    for size, stride in ((spec.kernel_size, spec.kernel_stride), (spec.coarse_size, spec.coarse_stride)):
        out = k.new_empty(1, num_windows(k.shape[1], size, stride), *k.shape[2:])
        extend_compressed(k, out, 0, k.shape[1], size, stride)
        levels.append(out)
    return levels[0], levels[1]


def _last_chunk(tokens: int) -> Callable[[Context], None]:
    """The last chunk of a context, as the engine's prefill asks for it: its share of a layer."""

    def run(context: Context) -> None:
        chunk, spec = context.sizes.chunk, context.sizes.spec
        shape = shape_of(context, chunk)
        for queries in ("correlated", "random"):
            q, k, v = draw(shape, context.device.torch, queries, tokens)
            with torch.no_grad():
                levels = compressed(k, spec)
                select = partial(select_blocks, q, k, spec, compressed=levels)
                blocks = select()
                check_lists(q, k, blocks, spec, {chunk - 1})
                attend = partial(sparse_attention, q, k, v, blocks, spec.block_size)
                for op, work, flops in (
                    ("select_blocks", select, counts.selection_flops),
                    ("sparse_attention", attend, counts.sparse_flops),
                ):
                    timing, peak = timed_with_peak(context, work, 0.4)
                    count = partial(flops, heads=shape.heads, dim=shape.dim, spec=spec)
                    context.report.add(
                        op,
                        BACKEND,
                        timing,
                        shape=f"{str(shape)} {queries} last of L={tokens}",
                        dtype=shape.dtype,
                        kind="chunk",
                        flops=count(tokens) - count(tokens - chunk),
                        peak=peak,
                    )

    return run


def _decoding(length: int) -> Callable[[Context], None]:
    """One token against a context, launched from Python and replayed as a graph."""

    def run(context: Context) -> None:
        device, spec, shape = context.device, context.sizes.spec, shape_of(context, 1)
        q, k, v = draw(shape, device.torch, "random", length)
        lengths = torch.tensor([length], device=device.torch)
        levels = ((spec.kernel_size, spec.kernel_stride), (spec.coarse_size, spec.coarse_stride))
        with torch.no_grad():
            windows = compressed(k, spec)

            def step() -> Tensor:
                for level, (size, stride) in zip(windows, levels, strict=True):
                    extend_compressed(k, level, lengths - 1, 1, size, stride)
                blocks = select_blocks(q, None, spec, compressed=windows, lengths=lengths)
                return sparse_attention(q, k, v, blocks, spec.block_size, lengths=lengths)

            _time_step(context, "sparse step", step, f"{shape} L={length}", shape.dtype)

    return run


def lightning_step(context: Context) -> None:
    """One token of Lightning attention."""
    device, (heads, dim) = context.device.torch, _lightning_sizes(context)
    q, k, v = draw(Shape(1, heads, heads, dim, torch.bfloat16), device, "random")
    state = torch.randn(1, heads, dim, dim, device=device)
    decay = torch.tensor(alibi_slopes(heads), device=device)
    with torch.no_grad():
        work = partial(lightning_attention, q, k, v, decay, initial_state=state)
        _time_step(context, "lightning_attention", work, f"T=1 H={heads} D={dim}", torch.bfloat16)


def _time_step(context: Context, op: str, work: Work, shape: str, dtype: torch.dtype) -> None:
    device = context.device
    eager = device.take_turns({"": work}, 0.3, most=100)[""]
    context.report.add(op, BACKEND, eager, shape=shape, dtype=dtype, kind="decode")
    timing = device.take_turns({"": device.record(work)}, 0.3, most=100)[""]
    context.report.add(op, f"{BACKEND} graph", timing, shape=shape, dtype=dtype, kind="decode")


def norms(context: Context) -> None:
    """The fused norms on one chunk of the model's widths."""
    sizes, device = context.sizes, context.device.torch
    x = torch.randn(1, sizes.chunk, sizes.heads, sizes.dim, device=device).to(torch.bfloat16)
    weight = torch.ones(sizes.dim, device=device, dtype=x.dtype)
    angles = torch.rand(1, sizes.chunk, sizes.dim // 2, device=device)
    cos, sin, flat = angles.cos(), angles.sin(), x.flatten(2)
    wide, gate = torch.ones(flat.shape[-1], device=device, dtype=x.dtype), torch.randn_like(flat)
    forms: dict[str, tuple[Work, int]] = {
        "norm_rope": (partial(norm_rope, x, weight, cos, sin, 1e-6), 2),
        "norm_gate": (partial(norm_gate, flat, wide, gate, 1e-6), 3),
    }
    with torch.no_grad():
        for op, (work, times) in forms.items():
            timing = context.device.take_turns({"": work}, 0.2, most=50)[""]
            shape = f"T={sizes.chunk} W={flat.shape[-1]}"
            context.report.add(op, BACKEND, timing, shape=shape, dtype=x.dtype, moved=times * x.nbytes)


def _backward(tokens: int) -> Callable[[Context], None]:
    """The backward passes alone: the graph of autograd is made once and kept."""

    def run(context: Context) -> None:
        device, shape = context.device, shape_of(context, tokens)
        heads, dim = _lightning_sizes(context)
        q, k, v = draw(shape, device.torch, "correlated")
        blocks = select_blocks(q, k, shape.spec)
        decay = torch.tensor(alibi_slopes(heads), device=device.torch)
        inputs = draw(Shape(tokens, heads, heads, dim, shape.dtype), device.torch, "random")
        forms: list[tuple[str, Callable[..., Tensor], list[Tensor], str]] = [
            (
                "sparse_attention",
                lambda q, k, v: sparse_attention(q, k, v, blocks, shape.spec.block_size),
                [q, k, v],
                f"{shape} correlated",
            ),
            (
                "lightning_attention",
                lambda q, k, v: lightning_attention(q, k, v, decay)[0],
                inputs,
                f"T={tokens} H={heads} D={dim}",
            ),
        ]
        for op, call, tensors, name in forms:
            leaves = [x.detach().requires_grad_() for x in tensors]
            with torch.enable_grad():
                out = call(*leaves)
            work = partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
            timing = device.take_turns({"": work}, 0.6, most=10)[""]
            context.report.add(op, BACKEND, timing, shape=name, dtype=shape.dtype, kind="backward")

    return run
