"""What the machine can do at most: matrix products and copies through torch's own libraries."""

import torch

from .record import Report
from .timing import take_turns, timed

SIZES = (2048, 8192)
PROBE = 512
LONGEST = 10.0  # seconds: larger products are left out, and that is said
COPIED = 1 << 28  # bytes


def measure_roofline(report: Report, quick: bool) -> dict[str, float]:
    """Rows for matrix products and a copy; returns the most FLOP/s of each dtype, and `copy` in
    bytes/s."""
    report.say("roofline of this machine")
    best: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for size in SIZES[:1] if quick and report.device.type == "cpu" else SIZES:
            measured = _product(report, size, dtype)
            best[name] = max(best.get(name, 0.0), measured)
    source = torch.randn(COPIED // 4, device=report.device)
    target = torch.empty_like(source)
    timing = take_turns({"copy": lambda: target.copy_(source)}, report.device, 1.0)["copy"]
    report.add("copy", "torch", timing, shape=f"{COPIED >> 20} MiB", moved=2 * COPIED)
    best["copy"] = 2 * COPIED / timing.p50
    return best


def _product(report: Report, size: int, dtype: torch.dtype) -> float:
    probe = torch.randn(PROBE, PROBE, device=report.device).to(dtype)
    timed(lambda: probe @ probe, report.device)
    expected = timed(lambda: probe @ probe, report.device) * (size / PROBE) ** 3
    if expected > LONGEST * (4 if dtype == torch.float32 else 1):
        report.note(
            f"{dtype} product of {size}^3 left out: it would take about {expected:.0f} s; "
            f"the FLOP/s of {PROBE}^3 stand for it"
        )
        return 2 * PROBE**3 / (expected / (size / PROBE) ** 3)
    a, b = (torch.randn(size, size, device=report.device).to(dtype) for _ in range(2))
    timing = take_turns({"product": lambda: a @ b}, report.device, 2.0)["product"]
    flops = 2 * size**3
    report.add("matmul", "torch", timing, shape=f"{size}x{size}x{size}", dtype=dtype, flops=flops)
    return flops / timing.p50
