"""Which implementation runs an op: an explicit choice, said once, refused with a reason.

It knows the names of implementations and what each needs; it deliberately knows nothing about models.
"""

import logging
from typing import Literal, get_args

import torch

Backend = Literal["naive", "torch"]

logger = logging.getLogger("opensala")
_said: set[tuple[str, str, str]] = set()


def choose_backend(op: str, device: torch.device, asked: Backend | None = None) -> str:
    """Return the backend that runs `op` on `device`, and log each new choice once.

    `naive` is the plain statement (slow, for tests); `torch` is chunked PyTorch and runs everywhere.
    An unknown name raises ValueError.
    """
    name = asked or "torch"
    if name not in get_args(Backend):
        raise ValueError(f"backend {name!r} is not one of {', '.join(get_args(Backend))}")
    key = (op, name, device.type)
    if key not in _said:
        _said.add(key)
        logger.info("%s: %s backend on %s", op, name, device.type)
    return name
