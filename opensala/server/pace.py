"""How much of a long prompt to read beside sequences that are decoding, so that their streams do not stall.

A step takes as long as the tokens in it. What a stream is used to is told by steps that only decode; the
share of a prompt in a mixed step grows and shrinks so that such a step takes `stall` times as long. A prompt
takes longer to read for it.

Which steps tell it is not obvious. Those right before a long prompt may be slowed down by work for it (its
tokens have to be found). Those between two mixed steps find caches that hold the prompt's data: they take
half as long again on a CPU. But as long as prompts are read without a pause there are no others, and what
streams were used to an hour ago is no measure. So every eighth step only decodes while prompts are read, and
the lower of two medians counts: of those steps, and of the last ones in calm of as many sequences, for a
minute.
"""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

_LEAST, _FIRST = 8, 32  # tokens of a prompt in a mixed step
_EVERY = 8  # steps, of which one only decodes
_BETWEEN, _CALM = 9, 65  # steps that only decode, whose median counts: between mixed ones, and without any
_VALID = 60.0  # seconds of steps for which those without any count


@dataclass
class Pace:
    """Learns from the times of steps.

    Attributes:
        stall: how many times as long as a step without reading one with it may take; 0 for no limit.
        most: tokens of prompts in a step, whatever it takes.
        share: tokens of prompts to read in the next step that also decodes.
    """

    stall: float
    most: int
    share: int = _FIRST
    _between: deque[float] = field(default_factory=lambda: deque(maxlen=_BETWEEN))  # seconds of each
    _calm: "dict[int, _Calm]" = field(default_factory=dict)  # by the number of sequences
    _wanted: deque[float] = field(default_factory=lambda: deque(maxlen=3))  # shares, by the latest steps
    _mixed: int = 0  # steps since one that only decodes
    _now: float = 0.0  # seconds of all steps

    def limit(self, decoding: int, reading: bool) -> int | None:
        """Tokens of prompts in the next step, given how many sequences decode and whether any could read; 0
        for a step to learn from, None for no limit."""
        if not (self.stall and decoding and reading):
            return None
        learns = self._alone(decoding) is None or self._mixed >= _EVERY - 1
        return 0 if learns else self.share

    def note(self, decoding: int, reading: bool, read: int, seconds: float) -> None:
        """Learn from a step: what `limit` was asked, the tokens of prompts in it, and how long it took."""
        self._now += seconds
        if not decoding:
            return
        if not read:
            self._mixed = 0
            if reading:
                self._between.append(seconds)
            else:
                calm = self._calm.setdefault(decoding, _Calm())
                calm.times.append(seconds)
                calm.at = self._now
            return
        self._mixed += 1
        alone = self._alone(decoding)
        change = 1.0 if alone is None else self.stall * alone / seconds
        if change < 1 or read >= self.share:  # the end of a prompt does not say that more would do
            self._wanted.append(self.share * change)
            # It shrinks fast and grows slowly, and one step alone says little: steps differ in time by
            # chance, and one that was quick must not let the next one take half as much again.
            wanted = min(1.1 * self.share, max(0.5 * self.share, statistics.median(self._wanted)))
            self.share = min(self.most, max(_LEAST, int(wanted + 0.5)))

    def _alone(self, decoding: int) -> float | None:
        """Seconds of a step that only decodes so many sequences; None as long as there was none."""
        calm = self._calm.get(decoding)
        if calm is not None and self._now - calm.at > _VALID:
            del self._calm[decoding]
            calm = None
        found: Iterable[deque[float]] = (self._between, deque() if calm is None else calm.times)
        return min((statistics.median(times) for times in found if times), default=None)


@dataclass
class _Calm:
    """Seconds of steps while nothing was read, and when the last one was."""

    times: deque[float] = field(default_factory=lambda: deque(maxlen=_CALM))
    at: float = 0.0
