"""Tokenizers in threads of their own, so that a long text stops no stream."""

import asyncio
import copy
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import shutting_down

T = TypeVar("T")
_THREADS = 2  # a very long text keeps one of them busy for seconds


class Encoders:
    """Threads with a tokenizer each: transformers' are not made for two at a time.

    Args:
        tokenizer: that is copied.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(_THREADS):
            self._tokenizers.put(copy.deepcopy(tokenizer))
        self._threads = ThreadPoolExecutor(_THREADS, "encoder")
        self._closed = False

    async def run(self, work: Callable[[Any], T]) -> T:
        """The result of `work(tokenizer)`.

        Raises:
            ApiError: 503, closed.
            Exception: what `work` raised.
        """
        if self._closed:
            raise shutting_down()
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._with_tokenizer, work)
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if future.cancelled() and task is not None and not task.cancelling():  # by `close`
                raise shutting_down() from None
            raise

    def _with_tokenizer(self, work: Callable[[Any], T]) -> T:
        tokenizer = self._tokenizers.get()
        try:
            return work(tokenizer)
        finally:
            self._tokenizers.put(tokenizer)

    def close(self) -> None:
        """Begin nothing more; what waits for a thread is told so, what has one goes on."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
