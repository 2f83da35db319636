"""PDFs of clients, each read in a process of its own.

pypdf is Python from end to end: in a thread of the server it would take turns with the engine and with every
stream for as long as it reads, and a file that was made to keep it busy, or to take all memory, would do so
for ever. A process can be bounded and ended.
"""

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import sys
import weakref
from dataclasses import dataclass, field

from .errors import ApiError, shutting_down

_log = logging.getLogger("opensala.server")
_MEMORY = (
    4 << 30
)  # bytes of address space; a file of 32 MiB whose streams are deflated tenfold needs 1 to 2 GiB
_AT_A_TIME = 2


@dataclass
class PdfReader:
    """Reads PDFs, two at a time, and of one owner one at a time.

    Attributes:
        seconds: of a processor that one of them may take.
        memory: bytes of address space, likewise.
    """

    seconds: int = 300
    memory: int = _MEMORY
    _places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_A_TIME))
    _turns: "weakref.WeakValueDictionary[str, asyncio.Lock]" = field(
        default_factory=weakref.WeakValueDictionary
    )
    _reading: set[asyncio.Task[tuple[str, list[str]]]] = field(default_factory=set)
    _closed: bool = False

    async def read(self, owner: str, data: bytes) -> tuple[str, list[str]]:
        """The text of a PDF, and remarks on what of it is missing. Its process ends with the caller's task.

        Raises:
            ValueError: see `engine.pdf.pdf_text`; it takes more than it may. The message is the reason alone.
            ApiError: 503, no process can be started, somebody else ended it, or the reader was closed.
        """
        if self._closed:
            raise shutting_down()
        task = asyncio.ensure_future(self._in_turn(owner, data))
        self._reading.add(task)
        try:
            await asyncio.wait({task})
            if task.cancelled():  # by `close`
                raise shutting_down()
            return task.result()
        finally:
            self._reading.discard(task)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def close(self) -> None:
        """End what is being read: without an engine that takes it, nobody has a use for it."""
        self._closed = True
        for task in self._reading:
            task.cancel()

    async def _in_turn(self, owner: str, data: bytes) -> tuple[str, list[str]]:
        turn = self._turns.setdefault(owner, asyncio.Lock())
        async with turn, self._places:
            try:
                return await self._read(data)
            # Of this machine: no memory, no processes left, or (RuntimeError) no threads, one of which waits
            # for the process in some versions of asyncio.
            except (OSError, RuntimeError) as error:
                _log.error("no process could be started to read a PDF: %s", error)
                text = "the server could not start to read the PDF; try again"
                raise ApiError(503, text, code="unavailable", retry_after=10) from None

    async def _read(self, data: bytes) -> tuple[str, list[str]]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", _program(), str(self.seconds), str(self.memory), str(os.getpid())),
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.DEVNULL,  # what pypdf warns of is among the remarks
            start_new_session=True,  # Ctrl-C is for the server, which lets requests come to their end
        )
        try:
            out, _ = await process.communicate(data)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        code = process.returncode
        if code == -signal.SIGXCPU:
            raise ValueError(f"a PDF that takes more than {self.seconds} s to read")
        if code == -signal.SIGKILL:  # not its own bounds: most likely the system ran out of memory
            _log.error("a process that was reading a PDF was killed from outside")
            text = "reading the PDF was ended from outside the server; try again"
            raise ApiError(503, text, code="unavailable", retry_after=10)
        if code:
            raise ValueError(f"not a readable PDF (reading it ended with code {code})")
        found = json.loads(out)
        if "error" in found:
            raise ValueError(found["error"])
        return found["text"], found["notes"]


def _program() -> str:
    spec = importlib.util.find_spec("opensala.engine.pdf")  # without importing it, which takes half a second
    assert spec is not None and spec.origin is not None, "it is part of this package"
    return spec.origin
