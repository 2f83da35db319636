"""Drafts by prompt lookup: what followed the last words the last time they stood in the text.

A draft costs nothing to make and is verified together with the next token, in one step. It pays where answers
repeat the document; where guesses fail, fewer tokens are guessed, and after a while none for some steps.
"""

from array import array

import numpy as np

LONGEST, SHORTEST = 4, 2  # tokens of the last words that are looked up, long ones first


def look_up(tokens: np.ndarray, count: int) -> list[int]:
    """Up to `count` tokens that followed the last occurrence of the text's last tokens; empty if there is
    none.

    Args:
        tokens: the whole text, integers.
    """
    if count < 1 or len(tokens) <= SHORTEST:
        return []
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])  # where the last token stood before
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        found = ends[ends >= length - 1]
        for back in range(1, length):
            found = found[tokens[found - back] == tokens[-1 - back]]
        if len(found):
            start = int(found[-1]) + 1
            return tokens[start : start + count].tolist()
    return []


class Drafter:
    """How many tokens to guess for one sequence, from how its guesses fared.

    Attributes:
        proposed, accepted: tokens guessed and of them taken, so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.proposed = self.accepted = 0
        self._size = min(most, 4)
        self._fails = 0
        self._pause = 0

    def propose(self, tokens: array, room: int) -> list[int]:
        """Guesses for the next tokens, `room` at most."""
        if self._pause:
            self._pause -= 1
            return []
        return look_up(np.frombuffer(tokens, np.int32), min(self._size, room))

    def learn(self, proposed: int, accepted: int) -> None:
        """Note how a draft fared: guess twice as many after a full success, half as many after a failure."""
        if not proposed:
            return
        self.proposed += proposed
        self.accepted += accepted
        if accepted == proposed:
            self._size, self._fails = min(self.most, 2 * self._size), 0
        elif accepted == 0:
            self._size, self._fails = max(1, self._size // 2), self._fails + 1
            if self._fails >= 4:  # each failed step costs its extra tokens and a rollback
                self._pause, self._fails = 32, 0
        else:
            self._fails = 0
