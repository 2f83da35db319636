"""The most likely token of each row of logits, and what its probability is measured by."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend, choose_backend
from .cpp import cpp_likeliest
from .plain import plain_likeliest

__all__ = ["Likeliest", "likeliest"]


class Likeliest(NamedTuple):
    """Of one row of logits.

    Attributes:
        token: the most likely one, the lowest number where several are.
        lse: logarithm of the sum of exponentials: a logit minus this is a log-probability.
        lowest, highest: of the logits.
    """

    token: int
    lse: float
    lowest: float
    highest: float


def likeliest(logits: Tensor, *, backend: Backend | None = None) -> list[Likeliest]:
    """Look at each row of logits `[N, V]` once; waits for the device.

    A row in which a number is NaN has an `lse` of NaN; its token means nothing. With `cpp` a row has the same
    bits whatever other rows there are, and however many threads.

    Raises:
        ValueError: not `[N, V]` with V of at least 1, or an unavailable backend.
    """
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [N, V], got {list(logits.shape)}")
    compiled = logits.device.type == "cpu" and logits.dtype == torch.float32
    name = choose_backend("likeliest", logits, backend, {"cpp": None} if compiled else None)
    rows = cpp_likeliest(logits) if name == "cpp" else plain_likeliest(logits)
    return [Likeliest(int(token), *rest) for token, *rest in rows.tolist()]
