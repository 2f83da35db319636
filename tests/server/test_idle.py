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


def test_memory_is_released_once_after_requests():
    released = []

    async def looks():
        for _ in range(20):  # without a pause each of them lets the task look once
            await asyncio.sleep(0)

    async def scenario():
        gate = Gate(ServerOptions())
        task = asyncio.create_task(release_when_idle(gate, 0, lambda: released.append(1)))
        for expected in (0, 1, 2):
            async with asyncio.timeout(60):
                while len(released) < expected:
                    await asyncio.sleep(0.001)
            await looks()
            assert len(released) == expected
            gate.enter("a")
            gate.enter("b")
            gate.leave("a")
            await looks()
            assert len(released) == expected  # one is under way
            gate.leave("b")
        task.cancel()

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
