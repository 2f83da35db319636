"""Bad steps: which they are, and when to give up. See `recipe.Guard` for the policy."""

import math
from collections import deque
from statistics import median
from typing import Any

from .recipe import Guard


class StepGuard:
    """Checks steps by their loss and gradient norm; remembers the good ones."""

    def __init__(self, policy: Guard) -> None:
        self.policy, self.in_a_row = policy, 0
        self.losses: deque[float] = deque(maxlen=policy.window)
        self.norms: deque[float] = deque(maxlen=policy.window)

    def check(self, loss: float, norm: float) -> str:
        """Why the step must not be applied, or '' if it is good (and then remembered)."""
        reason = self._reason(loss, norm)
        self.in_a_row = self.in_a_row + 1 if reason else 0
        if not reason:
            self.losses.append(loss)
            self.norms.append(norm)
        return reason

    def _reason(self, loss: float, norm: float) -> str:
        for name, value, known in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if len(known) >= self.policy.least and value > self.policy.spike * median(known):
                return (
                    f"{name} {value:.4g} is more than {self.policy.spike:g} times the median "
                    f"{median(known):.4g}"
                )
        return ""

    @property
    def exhausted(self) -> bool:
        return self.in_a_row >= self.policy.patience

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "norms": list(self.norms), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
