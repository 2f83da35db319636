"""What a server does when nobody asks."""

import asyncio
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from opensala.engine.memory import release_free_memory
from opensala.server.idle import release_when_idle
from opensala.server.limits import Gate, ServerOptions


class Scene:
    """A gate, and what is done when nobody is inside."""

    def __init__(self, forget_seconds, seconds=0.0):
        self.gate, self.did, self.busy, self.seconds = Gate(ServerOptions()), [], False, seconds
        release = lambda: self.did.append("release")  # noqa: E731
        self.task = asyncio.create_task(
            release_when_idle(self.gate, lambda: self.busy, self.forget, forget_seconds, seconds, release)
        )

    async def forget(self):
        self.did.append("forget")

    async def until(self, expected):
        async with asyncio.timeout(60):
            while len(self.did) < len(expected):
                await asyncio.sleep(0.001)
        for _ in range(20):
            await asyncio.sleep(5 * self.seconds)
        assert self.did == expected

    def visit(self):
        self.gate.enter("a")
        self.gate.leave("a")


def test_memory_is_released_once_after_requests():
    async def scenario():
        scene = Scene(forget_seconds=0)
        for expected in (0, 1, 2):
            await scene.until(["release"] * expected)
            scene.gate.enter("a")
            scene.visit()
            await scene.until(["release"] * expected)  # one is under way
            scene.gate.leave("a")
        scene.task.cancel()

    asyncio.run(scenario())


def test_what_was_read_is_forgotten_once_nobody_came_for_long():
    async def scenario():
        scene = Scene(forget_seconds=0.02, seconds=0.001)
        await scene.until([])  # nothing was read yet
        for rounds in (1, 2):
            scene.visit()
            await scene.until(["release", "forget", "release"] * rounds)
        scene.task.cancel()

    asyncio.run(scenario())


def test_what_is_computed_behind_a_request_is_not_forgotten_meanwhile():
    """And its end counts as a request's."""

    async def scenario():
        scene = Scene(forget_seconds=0.02, seconds=0.001)
        scene.visit()
        await scene.until(["release", "forget", "release"])
        scene.busy = True
        await scene.until(["release", "forget", "release"])
        scene.busy = False
        await scene.until(["release", "forget", "release"] * 2)
        scene.task.cancel()

    asyncio.run(scenario())


def test_who_comes_in_time_finds_what_was_read():
    async def scenario():
        scene = Scene(forget_seconds=1e9)
        for expected in (1, 2, 3):
            scene.visit()
            await scene.until(["release"] * expected)
        scene.task.cancel()

    asyncio.run(scenario())


FREED = """
import ctypes, sys
import psutil
from opensala.engine.memory import release_free_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
pieces = [libc.malloc(50_000) for _ in range(2000)]
for piece in pieces:
    ctypes.memset(piece, 1, 50_000)
for piece in pieces[:-1]:  # the last one holds the end of the heap
    libc.free(piece)
before = psutil.Process().memory_info().rss
told = release_free_memory()
print(told, before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's business")
def test_freed_memory_goes_back_to_the_system():
    ran = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    told, fewer = ran.stdout.split()
    if told == "False":
        pytest.skip("another C library")
    assert int(fewer) > 80_000_000


def test_other_systems_and_c_libraries_are_let_be(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert not release_free_memory()
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert not release_free_memory()


def test_what_later_rounds_of_a_soak_add_is_found():
    path = Path(__file__).parents[2] / "scripts" / "soak_server.py"
    spec = importlib.util.spec_from_file_location("soak_server", path)
    soak = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = soak  # where dataclasses look for their module
    spec.loader.exec_module(soak)
    first = {soak.MEMORY: 5e8, soak.FILES: 20.0}
    for memory, files, grown in (
        (5e8 + 99, 20, {}),
        (5e8 + 101, 20, {soak.MEMORY: 101}),
        (4e8, 21, {soak.FILES: 1}),
    ):
        assert soak.growth([first, {soak.MEMORY: memory, soak.FILES: files}], 100) == grown
    assert soak.growth([first], 0) == {}
