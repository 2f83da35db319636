"""How much of a long prompt to read beside sequences that are decoding, so that their streams do not stall.

A step takes as long as the tokens in it. Steps in which only decoding happens say what a stream is used to;
the share of a prompt in a mixed step grows and shrinks so that such a step takes `stall` times as long. A
prompt takes longer to read for it.
"""

from dataclasses import dataclass

_LEAST, _FIRST = 16, 64  # tokens of a prompt in a mixed step
_WEIGHT = 0.1  # of the latest step in the mean


@dataclass
class Pace:
    """Learns from the times of steps.

    Attributes:
        stall: how many times as long as a step without reading one with it may take; 0 for no limit.
        share: tokens of prompts to read in the next step that also decodes.
    """

    stall: float
    most: int
    share: int = _FIRST
    _alone: float = 0.0  # seconds of a step that only decodes, the mean of late; 0 as long as there was none

    def limit(self, decoding: int, reading: bool) -> int | None:
        """Tokens of the next step, given how many it decodes at most (drafts included); None for no limit."""
        if not (self.stall and decoding and reading):
            return None
        return min(self.most, decoding + self.share)

    def note(self, decoding: int, reading: bool, seconds: float) -> None:
        """Learn from a step; what `limit` was asked, and how long it took."""
        if not decoding:
            return
        if not reading:
            self._alone += (seconds - self._alone) * (_WEIGHT if self._alone else 1.0)
        elif self._alone:
            # It shrinks fast and grows slowly: steps differ in time by chance, and one that was quick must
            # not let the next one take half as much again.
            change = min(1.1, max(0.5, self.stall * self._alone / seconds))
            self.share = int(min(self.most, max(_LEAST, self.share * change + 0.5)))
