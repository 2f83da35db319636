"""How far scores of layers can be told apart: standard errors by leaving out one document after the other.

Pure functions from what each document gave to numbers. The jackknife serves quotients as well as means, and
differences between layers that were measured on the same documents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Values = list[float]


@dataclass(frozen=True)
class Estimate:
    """A value for each layer, with those that result when one document is left out."""

    values: Values
    without: list[Values]

    @property
    def errors(self) -> Values:
        """The standard error of each layer's value; not a number where there is one document only."""
        return [_spread([left[i] for left in self.without]) for i in range(len(self.values))]

    def error_between(self, a: int, b: int) -> float:
        """The standard error of the difference between two layers."""
        return _spread([left[a] - left[b] for left in self.without])


def estimate(documents: int, statistic: Callable[[int | None], Values]) -> Estimate:
    """`statistic(n)` gives each layer's value without document n, or with all of them (None)."""
    return Estimate(statistic(None), [statistic(n) for n in range(documents)])


def ratio(part: Sequence[float], whole: Sequence[float], left_out: int | None) -> float:
    """Sum of part over sum of whole, without one document."""
    kept = [n for n in range(len(part)) if n != left_out]
    return sum(part[n] for n in kept) / max(sum(whole[n] for n in kept), 1e-30)


def mean(values: Sequence[float], left_out: int | None) -> float:
    """The mean without one document."""
    return ratio(values, [1.0] * len(values), left_out)


def _spread(values: Sequence[float]) -> float:
    """The jackknife's standard error from the values that leave one out."""
    count = len(values)
    if count < 2:
        return math.nan
    middle = sum(values) / count
    return math.sqrt((count - 1) / count * sum((value - middle) ** 2 for value in values))


def unresolved(scores: Estimate, kept: Sequence[int], fixed: Sequence[int]) -> tuple[int, int] | None:
    """The kept layer that lies lowest and the other one that lies highest, if two standard errors are more
    than their distance: other documents might have chosen the other one. None if the choice is clear.

    Args:
        scores: higher is kept. fixed: kept whatever their score.
    """
    chosen = [i for i in kept if i not in fixed]
    others = [i for i in range(len(scores.values)) if i not in kept]
    if not chosen or not others:
        return None
    low = min(chosen, key=scores.values.__getitem__)
    high = max(others, key=scores.values.__getitem__)
    apart = scores.values[low] - scores.values[high]
    return (low, high) if apart < 2 * scores.error_between(low, high) else None
