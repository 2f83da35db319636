"""A live server on loopback with the shipped model, for all tests of its APIs."""

import importlib.util
import threading
import time

import pytest

from opensala.contexts.prefixes import PrefixFolder
from opensala.engine import EngineOptions, load_engine

if importlib.util.find_spec("fastapi") is None:  # the extra `serve` is not installed
    collect_ignore_glob = ["test_*.py"]
else:
    from opensala.server import ServerOptions, Service, build_server

OPTIONS = EngineOptions(max_cached_tokens=60_000, max_running=8, max_batch_tokens=1024, max_snapshots=64)
FILLER = "Nothing of note happened that day.\n"
DOCUMENT = "The access code for the north gate is 48213.\n" + FILLER * 60
QUESTION = "What is the access code for the north gate?"


class Live:
    """A server in a thread of this process."""

    def __init__(self, engine, options=None, keys=None, contexts=None, prefixes=None):
        options = options or ServerOptions(grace_seconds=0.5)
        self.service = Service(engine, "small", options, keys, contexts, prefixes)
        self.server = build_server(self.service, port=0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.wait(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @staticmethod
    def wait(condition, seconds=30):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "what was waited for did not come"
            time.sleep(0.01)

    def wait_until_idle(self):
        self.wait(lambda: not self.service.loop.num_open and not self.service.loop.stats.running)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def model():
    return load_engine(options=EngineOptions(max_cached_tokens=4096))


@pytest.fixture
def start(model):
    """Start a server of one's own with the shipped model; it is stopped, and nothing may be held."""
    from opensala.engine import Engine

    started = []

    def one(options=None, keys=None, engine=OPTIONS, contexts=None, prefixes=None):
        running = Engine(model.model, model.tokenizer, engine)
        folder = None if prefixes is None else PrefixFolder(prefixes, running, 1 << 30)
        started.append(Live(running, options, keys, contexts, folder))
        return started[-1]

    yield one
    for live in started:
        if live.thread.is_alive():
            live.stop()
        engine = live.service.engine
        engine.check_integrity()
        assert not engine.num_requests
        engine.scheduler.tree.clear()
        assert engine.scheduler.pages.num_free == engine.scheduler.pages.size
        assert engine.scheduler.slots.num_free == engine.scheduler.slots.size


@pytest.fixture(scope="session")
def live(model):
    from opensala.engine import Engine

    server = Live(Engine(model.model, model.tokenizer, OPTIONS))
    yield server
    server.stop()
