"""How much one key, and all together, may ask for at a time: requests in flight, and requests per minute."""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .errors import ApiError


@dataclass(frozen=True)
class ServerOptions:
    """Bounds of a server.

    Attributes:
        max_body_bytes: of one request.
        max_prompt_tokens: of one prompt; None for what the model and the memory hold.
        max_new_tokens: that a request may ask for.
        default_new_tokens: for a chat or response that does not say; fewer where the context ends.
        max_requests: in flight for all keys together.
        max_requests_per_key: in flight for one key.
        requests_per_minute: for one key; 0 for no limit.
        request_seconds: a request that takes longer is ended.
        body_seconds: without another byte of a body that is being sent.
        write_seconds: for a client to take what it was sent, before it is cut off.
        ping_seconds: between signs of life on a stream while a long prompt is read.
        grace_seconds: for requests under way when the server is told to stop.
        stall: how many times as long a step may take that reads a prompt beside streams, than one without; 0
            for no limit (see `Pace`).
        max_contexts_per_key: kept for one key (see `Keeper`).
        max_context_bytes_per_key: on disk, of the kept contexts of one key.
        context_seconds: that a context is kept if its request does not say; 0 for until it is deleted.
        forget_seconds: without a request, after which what was read is forgotten and its memory given back to
            the system; 0 for never.
        stable_prefix: lines of a system prompt that change from call to call are left out or moved behind the
            documents (see `engine.chat`).
    """

    max_body_bytes: int = 32 << 20
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 32_768
    default_new_tokens: int = 1024
    max_requests: int = 512
    max_requests_per_key: int = 128
    requests_per_minute: int = 0
    request_seconds: float = 3600.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    ping_seconds: float = 10.0
    grace_seconds: float = 10.0
    stall: float = 2.5
    max_contexts_per_key: int = 64
    max_context_bytes_per_key: int = 16 << 30
    context_seconds: int = 7 * 86_400
    forget_seconds: float = 3600.0
    stable_prefix: bool = True

    def __post_init__(self) -> None:
        for name, least in (
            ("requests_per_minute", 0),
            ("max_prompt_tokens", 1),
            ("grace_seconds", 0),
            ("stall", 0),
            ("context_seconds", 0),
            ("forget_seconds", 0),
            ("max_contexts_per_key", 1),
            ("max_context_bytes_per_key", 1),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("max_body_bytes", "max_new_tokens", "default_new_tokens", "max_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("request_seconds", "body_seconds", "write_seconds", "ping_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class Gate:
    """Lets requests in, and refuses them beyond the limits.

    Args:
        options: the limits.
        clock: seconds that only grow.

    Attributes:
        num_entered: requests let in so far.
    """

    def __init__(self, options: ServerOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self._clock = options, clock
        self.num_entered = 0
        self._inside: Counter[str] = Counter()
        self._allowance: dict[str, tuple[float, float]] = {}  # of each key: requests left, and when that was

    @property
    def num_inside(self) -> int:
        return self._inside.total()

    def enter(self, owner: str) -> None:
        """Count a request in; `leave` must follow.

        Raises:
            ApiError: 429 with the seconds after which to try again.
        """
        options = self.options
        if self._inside[owner] >= options.max_requests_per_key:
            raise _too_many(
                f"{options.max_requests_per_key} requests of this key are in flight, its limit", 1
            )
        if self.num_inside >= options.max_requests:
            raise _too_many(f"the server has {options.max_requests} requests in flight, its limit", 2)
        self._spend(owner)
        self._inside[owner] += 1
        self.num_entered += 1

    def leave(self, owner: str) -> None:
        self._inside[owner] -= 1
        if not self._inside[owner]:
            del self._inside[owner]

    def _spend(self, owner: str) -> None:
        """A bucket that holds a minute's requests and fills evenly."""
        rate = self.options.requests_per_minute
        if not rate:
            return
        now = self._clock()
        left, since = self._allowance.get(owner, (float(rate), now))
        left = min(float(rate), left + (now - since) * rate / 60)
        if left < 1:
            self._allowance[owner] = (left, now)
            raise _too_many(
                f"this key may make {rate} requests per minute", math.ceil((1 - left) * 60 / rate)
            )
        self._allowance[owner] = (left - 1, now)


def _too_many(message: str, seconds: int) -> ApiError:
    text = f"Rate limit reached: {message}; try again in {seconds} s"
    return ApiError(429, text, code="rate_limit_exceeded", retry_after=seconds)
