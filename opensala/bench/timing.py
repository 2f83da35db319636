"""Timing that can be trusted on a shared machine: things compared take turns, and quantiles are kept.

It knows nothing of what it times.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Work = Callable[[], object]
SHORT = 1.0  # seconds: a first call that took longer is a measurement, a shorter one was the warm-up


@dataclass(frozen=True)
class Timing:
    """Quantiles of the seconds one call took, and over how many calls."""

    p20: float
    p50: float
    p80: float
    runs: int


def quantiles(seconds: list[float]) -> Timing:
    """p20, p50 and p80 of at least one measurement."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(cuts[1], statistics.median(seconds), cuts[7], len(seconds))


def timed(work: Work, device: torch.device) -> float:
    """Seconds of one call, the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    works: Mapping[str, Work], device: torch.device, budget: float = 4.0, most: int = 20, least: int = 1
) -> dict[str, Timing]:
    """Call every work once a round, in turn, for about `budget` seconds: rounds from `least` to `most`.

    The first call of each is its warm-up if it took less than a second; longer ones count, since what a
    warm-up removes (compilation is not among it: call once before) is then below what the clock's neighbours
    cost.
    """
    seconds: dict[str, list[float]] = {}
    for name, work in works.items():
        first = timed(work, device)
        seconds[name] = [first] if first >= SHORT else []
    start = time.perf_counter()
    rounds = min((len(s) for s in seconds.values()), default=0)
    while rounds < least or (rounds < most and time.perf_counter() - start < budget):
        for name, work in works.items():
            seconds[name].append(timed(work, device))
        rounds += 1
    return {name: quantiles(s) for name, s in seconds.items()}
