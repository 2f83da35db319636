"""What the device can do at most, and whether the ops are right on it before they are timed."""

from collections.abc import Callable
from functools import partial

import torch

from ...ops.backends import use_backend
from ..verify import verify_ops
from .steps import Context, Step


def steps() -> list[Step]:
    return [Step("ceilings", "ceilings", 1, measure)]


def checks() -> list[Step]:
    """All ops on odd shapes with their gradients. They compile kernels that nothing else here uses, and what
    is timed is checked at its own sizes: they come when there is time left."""
    return [
        Step(f"right results, {name}", "kernels", 10, check(name))
        for name in ("bfloat16", "float32", "float16")
    ]


def measure(context: Context) -> None:
    """A copy, matrix products of 8192^3, and those of a chunk of the model."""
    device, report, sizes = context.device, context.report, context.sizes
    report.say("  " + ", ".join(f"{name} {value}" for name, value in device.properties().items()))
    source = torch.randn(sizes.copied // 4, device=device.torch)
    copy = partial(torch.empty_like(source).copy_, source)
    timing = device.take_turns({"copy": copy}, 0.3)["copy"]
    report.add("copy", "torch", timing, shape=f"{sizes.copied >> 20} MiB", moved=2 * source.nbytes)
    del source, copy
    n, chunk = sizes.product, sizes.chunk
    for dtype, shapes in (
        (torch.bfloat16, ((n, n, n), (chunk, sizes.hidden, 2 * sizes.intermediate))),
        (torch.float32, ((n, n, n),)),
    ):
        for m, k, columns in shapes:
            a = torch.randn(m, k, device=device.torch).to(dtype)
            b = torch.randn(columns, k, device=device.torch).to(dtype).t()
            timing = device.take_turns({"": partial(torch.mm, a, b)}, 0.5)[""]
            flops = 2.0 * m * k * columns
            report.add("matmul", "torch", timing, shape=f"{m}x{k}x{columns}", dtype=dtype, flops=flops)


def check(name: str) -> Callable[[Context], None]:
    """A step that compares all ops in one dtype with their reference implementations in float64."""

    def run(context: Context) -> None:
        with use_backend("triton"):
            shorten = context.sizes.shorten
            for line in verify_ops(context.device.torch, getattr(torch, name), ("triton",), shorten):
                context.report.say(f"  {line}")

    return run
