"""Which implementation runs an op: an explicit choice, said once, refused with a reason.

It knows the names of implementations and what each needs; it deliberately knows nothing about models.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["naive", "torch", "cpp", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)
VARIABLE = "OPENSALA_BACKEND"

logger = logging.getLogger("opensala")
_said: set[str] = set()
_override: ContextVar[Backend | None] = ContextVar("opensala_backend", default=None)


@contextmanager
def use_backend(name: Backend | None) -> Iterator[None]:
    """Within the block, ops run on this backend unless a call names another; None restores the choice by
    device.

    An op that does not have it (there is no `cpp` form of an op that plain PyTorch already does best) uses
    `torch`.
    """
    _known(name)
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


@contextmanager
def backend_everywhere(name: Backend | str | None) -> Iterator[None]:
    """`use_backend` for all threads of the process, those of the backward pass too: the variable is set."""
    _known(name)
    before = os.environ.get(VARIABLE)
    try:
        if name is not None:
            os.environ[VARIABLE] = name
        yield
    finally:
        if name is not None:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


def outside_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Within the block, PyTorch's products keep the dtypes that an op chose for them: autocast would round
    what is computed in float32 on purpose, and its backward pass runs without autocast."""
    return torch.autocast(like.device.type, enabled=False)


def choose_backend(
    op: str, like: Tensor, asked: Backend | None = None, special: Mapping[str, str | None] | None = None
) -> str:
    """Return the backend that runs `op` on tensors like `like`. Each new choice is logged once (INFO); a
    reason for which ops run slower than they could, once for all of them (WARNING).

    `naive` is the reference implementation (slow, for tests); `torch` is chunked PyTorch and runs everywhere;
    `cpp` is compiled on first use for the CPU; `triton` is for GPUs of compute capability 8.0 and later, or
    Triton's interpreter.

    Args:
        op: name of the op, for messages.
        like: a tensor of the call: its device and dtype decide.
        asked: the backend the caller wants; else `use_backend`, the variable OPENSALA_BACKEND, or the fastest
            one.
        special: of `cpp` and `triton`, those this op has, each with the reason why this call is beyond it, or
            None.

    Raises:
        ValueError: an unknown name, or a backend asked for that cannot run here.
    """
    name, because = _decide(op, like, asked, special or {})
    device = like.device.type
    if because and like.dtype != torch.float64:  # float64 is asked for to be exact, not to be fast
        _say(logging.WARNING, f"attention runs on the slower {name} backend on {device}: {because}")
    _say(logging.INFO, f"{op}: {name} backend on {device}{because and f' ({because})'}")
    return name


def _say(level: int, text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.log(level, text)


def planned_backend(like: Tensor) -> str:
    """The backend that ops with all four forms will choose for tensors like `like`, without logging it."""
    return _decide("this op", like, None, {"cpp": None, "triton": None})[0]


def _decide(
    op: str, like: Tensor, asked: Backend | None, special: Mapping[str, str | None]
) -> tuple[str, str]:
    """The backend, and why it is not the fastest kind ('' if it is, or if it was asked for)."""
    if asked is None:
        default = _override.get() or os.environ.get(VARIABLE) or None
        _known(default)
        if default in ("naive", "torch") or default in special:
            asked = default  # type: ignore[assignment]
        elif default:
            asked = "torch"
    _known(asked)
    if asked in ("naive", "torch"):
        return asked, ""
    if asked is not None:
        reason = special.get(asked, f"{op} has no such form: use torch") or why_not(asked, like)
        if reason:
            raise ValueError(f"backend {asked!r} cannot run {op} here: {reason}")
        return asked, ""
    best = "triton" if like.is_cuda else "cpp"
    if best not in special:
        return "torch", ""
    reason = special[best] or why_not(best, like)
    return ("torch", f"{best} cannot run it: {reason}") if reason else (best, "")


def why_not(name: str, like: Tensor) -> str | None:
    """Why `cpp` or `triton` cannot run on this device and dtype, or None if it can."""
    if like.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, and the tensors are {str(like.dtype).removeprefix('torch.')}"
    if name == "cpp":
        if like.device.type != "cpu":
            return f"the tensors are on {like.device}"
        from .native import library  # compiles at first use: only when it is wanted

        return library().reason
    return _why_not_triton(like.device)


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), which needs no GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'opensala[gpu]'"
    if device.type == "cpu":
        return (
            None
            if triton_interpreted()
            else "the tensors are on the cpu (TRITON_INTERPRET=1 runs the interpreter)"
        )
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return (
        None if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    )


def _known(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
