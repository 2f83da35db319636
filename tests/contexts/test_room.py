"""Contexts longer than an engine's pool: read, opened and extended in less memory than they take."""

import mmap
import sys

import pytest

from opensala.contexts import Context
from opensala.contexts import context as context_module
from opensala.contexts.room import with_room
from opensala.model.advice import give_back

from .files import content
from .tools import PAGE, PARAMS, documents, engine, model, outcome

QUESTION = "where are the red falcons near the old mill tower?"
PAGE_BYTES = 2 * PAGE * 2 * 8 * 4  # keys and values of a page in one layer
HOST = 24 * PAGE_BYTES
MEMORY = 1 << 20


def small(of):
    """An engine with far less memory than 6,000 tokens take."""
    return engine(of, max_cached_tokens=None, memory_bytes=MEMORY, max_snapshots=4, max_running=1)


def test_read_opened_and_extended(tmp_path, monkeypatch):
    """To the bytes of an engine with room for everything; what memory has to hold stays within it."""
    monkeypatch.setattr(context_module, "SEGMENT_PAGES", 20)
    of, docs, more = model(), documents(6000), documents(900, 5, "more.txt")
    with Context.ingest(engine(of, max_cached_tokens=8000), docs, tmp_path / "a.ctx") as context:
        context.extend(more)
        tokens, wanted = len(context.tokens), outcome(context.ask(QUESTION, PARAMS))
    running = small(of)
    with pytest.raises(ValueError, match="does not fit|of cache on cpu"):
        Context.ingest(running, docs, tmp_path / "b.ctx", host_memory=HOST)
    assert running.capacity < 0.6 * tokens
    roomy = with_room(running, tokens, HOST)
    assert roomy.capacity > tokens and roomy.model is of and roomy.options.host_memory == HOST
    with Context.ingest(roomy, docs, tmp_path / "c.ctx", host_memory=HOST) as context:
        context.extend(more)
        assert outcome(context.ask(QUESTION, PARAMS)) == wanted
        held = roomy.scheduler.pages
        alone = held.size - held.num_free - int(roomy.tiers().host.bound.sum())
        assert alone < 16 and roomy.tiers().resident_bytes <= HOST
        roomy.check_integrity()
    assert content(tmp_path / "c.ctx") == content(tmp_path / "a.ctx")
    roomy = with_room(small(of), tokens, HOST)
    with Context.open(roomy, tmp_path / "c.ctx", host_memory=HOST) as context:
        assert outcome(context.ask(QUESTION, PARAMS)) == wanted


def test_no_more_places_than_memory_can_fill(monkeypatch):
    monkeypatch.setattr(context_module, "SEGMENT_PAGES", 20)
    running = small(model())
    roomy = with_room(running, 6000, HOST)
    compressed = PAGE_BYTES * 5 // 2 // PAGE
    pages, others = 6000 // PAGE, roomy.scheduler.pages.size - 6000 // PAGE
    slots = roomy.scheduler.slots.size * roomy.sizes.slot
    filled = HOST + pages * 2 * compressed + (others - 1) * roomy.sizes.page + slots
    assert MEMORY - roomy.sizes.page < filled <= MEMORY
    with pytest.raises(ValueError, match="tokens with 49,152 bytes of their keys and values in memory need"):
        with_room(running, 600_000, HOST)


def test_a_page_that_gives_way_is_given_back_whole():
    """Nothing of it stays in memory, and nothing of its neighbours goes."""
    pages = engine(model(head_dim=128), max_cached_tokens=8000).storage.kv[0].keys
    assert pages[0].numel() * pages.itemsize % mmap.PAGESIZE == 0, "else a page shares one of the system's"
    pages[2:5] = 1.0
    if sys.platform != "linux":
        pytest.skip("only Linux takes memory back")
    give_back(pages[3])
    assert (pages[3] == 0).all() and (pages[2] == 1).all() and (pages[4] == 1).all()


def test_an_engine_with_places_enough_is_left_alone():
    running = engine(max_cached_tokens=8000)
    assert with_room(running, 2000, HOST) is running and with_room(running, 10**9, None) is running
