"""Learning rates by step: a linear warm-up, then constant, exponential, linear or cosine."""

import math
from dataclasses import dataclass

from ..model.config import check_choice

KINDS = ("constant", "exponential", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The rate rises over `warmup` steps to `peak` and ends at `last` with the stage's last step.

    `constant` stays at `peak`. Counted in optimizer steps, from 0.
    """

    kind: str
    peak: float
    last: float | None = None
    warmup: int = 0

    def rate(self, step: int, steps: int) -> float:
        """The rate of step `step` of `steps`."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "constant" or self.last is None:
            return self.peak
        done = min(1.0, (step - self.warmup) / max(1, steps - 1 - self.warmup))
        if self.kind == "exponential":
            return self.peak * (self.last / self.peak) ** done
        left = 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.last + (self.peak - self.last) * left

    def check(self, stage: str) -> None:
        """Raise ValueError for a kind that does not exist or a rate that is none."""
        check_choice(f"{stage}.kind", self.kind, KINDS)
        for name, value in (("peak", self.peak), ("last", self.last)):
            needed = name == "peak" or self.kind != "constant"
            if needed and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{stage}.{name}: a learning rate must be a number above 0, got {value!r}")
        if self.warmup < 0:
            raise ValueError(f"{stage}.warmup must be 0 or more steps, got {self.warmup}")
