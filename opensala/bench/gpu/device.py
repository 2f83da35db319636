"""What only a CUDA device can be asked, behind one object; and the form of it on a CPU, for the rehearsal.

Everything else of the run is the same on both. Times are in seconds, memory in bytes.
"""

import gc
import time
import warnings
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity

from ..timing import Timing, Work, quantiles

LONG = 0.5  # seconds of a call from which one before it is enough of a warm-up


class Device:
    """A CUDA device: events, memory, graphs.

    Args:
        device: `cuda`, or `cpu` in `Rehearsal`.
    """

    name = "cuda"
    dtype = torch.bfloat16  # of the whole model, as the engine chooses it

    def __init__(self) -> None:
        self.torch = torch.device(self.name)

    def synchronize(self) -> None:
        """Wait until everything that was launched is done."""
        torch.cuda.synchronize(self.torch)

    def time(self, work: Work) -> float:
        """Seconds of one call on the device, by events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch)[0]

    def release(self) -> None:
        """Give memory that nothing refers to back to the device."""
        gc.collect()
        torch.cuda.empty_cache()

    def start_peak(self) -> None:
        """Count the peak of `peak_bytes` from here."""
        torch.cuda.reset_peak_memory_stats(self.torch)

    def peak_bytes(self) -> int:
        """The most bytes that tensors held since `start_peak`."""
        return torch.cuda.max_memory_allocated(self.torch)

    def reserved_bytes(self) -> int:
        """The most bytes that the allocator held since `start_peak`, fragments included."""
        return torch.cuda.max_memory_reserved(self.torch)

    def recorder(self) -> Any:
        """What captures the engine's decoding steps; None for its own choice."""
        return None

    def record(self, work: Work) -> Work:
        """A CUDA graph of one call, to be replayed; `work` was called before, so that nothing compiles."""
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = work()

        def replay(kept: object = kept) -> None:  # the graph's results must outlive it
            graph.replay()

        return replay

    def activities(self) -> list[ProfilerActivity]:
        """What the profiler is to follow."""
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]

    def count_waits(self, work: Work) -> int:
        """How often the host waits for the device in one call, by torch's own warnings."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in caught)

    def is_well(self) -> bool:
        """Whether the device still computes: after an illegal access nothing does until the process ends."""
        try:
            return bool((torch.ones(8, device=self.torch) + 1).sum().item() == 16)
        except RuntimeError:
            return False

    def properties(self) -> dict[str, Any]:
        """Name, capability, processors and memory, for the record."""
        p = torch.cuda.get_device_properties(self.torch)
        return {
            "device": p.name,
            "capability": f"{p.major}.{p.minor}",
            "processors": p.multi_processor_count,
            "memory": p.total_memory,
            "cuda": torch.version.cuda,
        }

    def warm_up(self, work: Work) -> float:
        """Call a work before it counts: compilation, then caches; seconds of the last call."""
        first = self.time(work)  # compiles
        return first if first > 4 * LONG else min(first, self.time(work))

    def take_turns(
        self, works: Mapping[str, Work], budget: float = 1.0, most: int = 20, least: int = 2
    ) -> dict[str, Timing]:
        """Call every work once a round, in turn, for about `budget` seconds, behind calls that do not count.

        If a warm-up takes longer than half the budget, one round has to do.
        """
        longest = max(self.warm_up(work) for work in works.values())
        least = 1 if longest > budget / 2 else least
        seconds: dict[str, list[float]] = {name: [] for name in works}
        start, rounds = time.perf_counter(), 0
        while rounds < least or (rounds < most and least > 1 and time.perf_counter() - start < budget):
            for name, work in works.items():
                seconds[name].append(self.time(work))
            rounds += 1
        return {name: quantiles(s) for name, s in seconds.items()}


class Rehearsal(Device):
    """The CPU in its place: the host's clock, resident memory, calls instead of graphs; each work is timed
    once."""

    name = "cpu"
    dtype = torch.float32  # the interpreter gets bfloat16 wrong, and layers are merged in this one alone

    def synchronize(self) -> None:
        pass

    def time(self, work: Work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def warm_up(self, work: Work) -> float:
        return float("inf")  # nothing is compiled: every work is called once

    def free_bytes(self) -> int:
        return psutil.virtual_memory().available

    def release(self) -> None:
        gc.collect()

    def start_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return psutil.Process().memory_info().rss

    def reserved_bytes(self) -> int:
        return self.peak_bytes()

    def recorder(self) -> Any:
        from ...engine.capture import CallAgain

        return CallAgain()

    def record(self, work: Work) -> Work:
        return work

    def activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU]

    def count_waits(self, work: Work) -> int:
        work()
        return 0

    def properties(self) -> dict[str, Any]:
        return {"device": "cpu", "capability": "", "processors": 0, "memory": 0, "cuda": None}
