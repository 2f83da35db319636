"""Keys and values on tiers far smaller than a context: the bits are those of memory without bounds."""

import math
import shutil

import pytest
import torch

from opensala.contexts import Context, DamagedContext
from opensala.contexts import context as context_module
from opensala.contexts.prefixes import PrefixFolder
from opensala.contexts.segment import SegmentFile
from opensala.engine import Engine, EngineOptions, ask
from opensala.model import tiers as tiers_module

from .files import content
from .tools import PAGE, PARAMS, documents, engine, model, outcome, tokenizer

QUESTIONS = ("what is the code?", "where are the red falcons near the old mill tower?", "who?")
SIZES = {"auto": 1, "bfloat16": 1 / 2, "int8": 3 / 8}  # of keys and values, heads of 8
PAGE_BYTES = 2 * PAGE * 2 * 8 * 4  # keys and values of a page in one layer
LONG = 6000


def in_frames(of, frames, **changes):
    """An engine with a device tier of so many frames, whose memory is main memory that begins as NaN."""

    def allocate(shape, dtype):
        return torch.full(shape, math.nan if dtype.is_floating_point else -1, dtype=dtype)

    options = {"max_batch_tokens": 50, "max_running": 4, "max_cached_tokens": 8000, "max_snapshots": 12}
    compressed = PAGE_BYTES * 5 // 2 // PAGE
    bounds = EngineOptions(**{**options, "device_memory": frames * (PAGE_BYTES + compressed), **changes})
    return Engine(of, tokenizer(), bounds, allocate=allocate)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A model, a context of it, its documents, and the answers of an engine with room for everything."""
    of, docs = model(), documents(LONG)
    folder = tmp_path_factory.mktemp("kept") / "a.ctx"
    Context.ingest(engine(of, max_cached_tokens=8000), docs, folder).close()
    free = engine(of, max_cached_tokens=8000)
    with Context.open(free, folder) as context:
        return of, folder, docs, [outcome(context.ask(q, PARAMS)) for q in QUESTIONS]


@pytest.fixture(autouse=True)
def what_gave_way_is_gone(monkeypatch):
    monkeypatch.setattr(tiers_module, "give_back", lambda memory: memory.view(torch.uint8).fill_(255))


@pytest.mark.parametrize("pages", [24, 100])
def test_host_and_disk(kept, pages):
    of, folder, _, wanted = kept
    running = engine(of, max_cached_tokens=8000, host_memory=pages * PAGE_BYTES)
    with Context.open(running, folder) as context:
        tiers = running.tiers()
        assert 2 * len(context._hold.pages) > 3 * pages, "far more than the budget"
        for _ in range(2):
            assert [outcome(context.ask(q, PARAMS)) for q in QUESTIONS] == wanted
            assert tiers.resident_bytes <= pages * PAGE_BYTES
            tiers.check_integrity()
            running.check_integrity()
        assert tiers.traffic.evictions > 50 and 0 < tiers.traffic.hit_rate < 1
        assert tiers.counter.pages >= tiers.traffic.misses - tiers.ahead.used
        said, n = context.traffic(), tiers.stats()
        assert (
            f"{n['disk_bytes_read']:,} bytes read from disk" in said and "pages wanted were at hand" in said
        )
        assert n["host_bytes"] == tiers.resident_bytes and n["host_misses"] == tiers.traffic.misses
        if pages == 24:
            assert tiers.ahead.used > 0, "the last step's choice is read before it is wanted"


def test_what_was_read_before_a_restart_comes_whole(kept, tmp_path):
    """Its files go: it counts as computed, whatever the budget."""
    of, _, docs, wanted = kept
    running = engine(of, max_cached_tokens=8000)
    with PrefixFolder(tmp_path / "p", running, 1 << 30) as running.prefixes:
        assert outcome(ask(running, docs, QUESTIONS[0], PARAMS, quiet=True)) == wanted[0]
    running = engine(of, max_cached_tokens=8000, host_memory=24 * PAGE_BYTES)
    with PrefixFolder(tmp_path / "p", running, 1 << 30) as running.prefixes:
        found = ask(running, docs, QUESTIONS[0], PARAMS, quiet=True)
    assert outcome(found) == wanted[0] and found.restored_tokens > 0.9 * found.prompt_tokens
    assert running.tiers().resident_bytes == 0
    running.tiers().check_integrity()


@pytest.mark.parametrize("kv_dtype", ["auto", "bfloat16", "int8"])
@pytest.mark.parametrize(("frames", "pages"), [(20, None), (33, 24), (200, 60)])
def test_device_host_and_disk(frames, pages, kv_dtype, tmp_path, kept):
    of, folder, docs, wanted = kept
    size = SIZES[kv_dtype]
    if kv_dtype != "auto":
        folder, free = tmp_path / "a.ctx", engine(of, max_cached_tokens=8000, kv_dtype=kv_dtype)
        with Context.ingest(free, docs, folder) as context:
            wanted = [outcome(context.ask(q, PARAMS)) for q in QUESTIONS]
    host = None if pages is None else int(pages * PAGE_BYTES * size)
    running = in_frames(of, frames, host_memory=host, kv_dtype=kv_dtype)
    with Context.open(running, folder) as context:
        tiers = running.tiers()
        for _ in range(2):
            assert [outcome(context.ask(q, PARAMS)) for q in QUESTIONS] == wanted
            tiers.check_integrity()
            running.check_integrity()
        assert tiers.copied == tiers.device_traffic.misses * tiers.page_bytes > 0
        if frames < 100 and kv_dtype == "auto":
            assert tiers.device_traffic.evictions > 50


@pytest.mark.parametrize("host", [None, 24])
def test_reading_answering_and_keeping_on_a_small_device(host, kept, tmp_path, monkeypatch):
    """A document of many times the device tier (and the host's) is read, several sequences at a time go on
    from it, and the context that is kept is the same to the byte."""
    of, folder, docs, wanted = kept
    if host is not None:
        monkeypatch.setattr(context_module, "SEGMENT_PAGES", 20)
    running = in_frames(of, 30, host_memory=host and host * PAGE_BYTES)
    with Context.ingest(running, docs, tmp_path / "b.ctx") as context:
        prompts = [list(context._prompt(q)) for q in QUESTIONS]
        found = running.generate(prompts, PARAMS)
        assert [c.text.strip() for c in found] == [text for text, *_ in wanted]
        assert running.tiers().device_traffic.evictions > 1000
        assert host is None or running.tiers().traffic.evictions > 1000
        running.tiers().check_integrity()
    assert content(tmp_path / "b.ctx") == content(folder)


def test_short_texts_attend_densely_on_a_small_device(kept):
    docs = documents(40)
    small = ask(in_frames(kept[0], 20), docs, "who?", PARAMS, quiet=True)
    assert outcome(small) == outcome(ask(engine(kept[0]), docs, "who?", PARAMS, quiet=True))


@pytest.mark.parametrize("kv_dtype", ["auto", "bfloat16", "int8"])
def test_a_text_is_read_in_far_less_memory_than_it_takes(kv_dtype, kept, tmp_path, monkeypatch):
    """What is in a segment gives way while the rest is read, and while it is extended: to the same bytes."""
    of, _, docs, _ = kept
    size, more = SIZES[kv_dtype], documents(700, 5, "more.txt")
    free = engine(of, max_cached_tokens=8000, kv_dtype=kv_dtype)
    with Context.ingest(free, docs, tmp_path / "a.ctx") as context:
        context.extend(more)
        wanted = [outcome(context.ask(q, PARAMS)) for q in QUESTIONS]
    monkeypatch.setattr(context_module, "SEGMENT_PAGES", 20)
    budget = int(24 * PAGE_BYTES * size)
    running = engine(of, max_cached_tokens=8000, host_memory=budget, kv_dtype=kv_dtype)
    tiers, pool, real, alone = running.tiers(), running.scheduler.pages, Engine.step, []

    def step(self):
        events = real(self)
        assert tiers.resident_bytes <= budget
        tiers.check_integrity()
        alone.append(pool.size - pool.num_free - int(tiers.host.bound.sum()))
        return events

    monkeypatch.setattr(Engine, "step", step)
    with Context.ingest(running, docs, tmp_path / "b.ctx") as context:
        assert 2 * len(context._hold.pages) > 20 * 24, "far more than the budget"
        context.extend(more)
        assert [outcome(context.ask(q, PARAMS)) for q in QUESTIONS] == wanted
        assert tiers.traffic.evictions > 1000 and len(alone) > 100
        assert max(alone) < 20 + 2 * 4 + 12, "a segment, a step, and what the engine keeps besides"
        running.check_integrity()
    assert content(tmp_path / "b.ctx") == content(tmp_path / "a.ctx")


def test_damage_is_seen_when_a_page_comes_up(kept, tmp_path):
    """Also of a page that was read ahead."""
    of, folder, _, wanted = kept
    shutil.copytree(folder, tmp_path / "c.ctx")
    running = engine(of, max_cached_tokens=8000, host_memory=24 * PAGE_BYTES)
    with Context.open(running, tmp_path / "c.ctx") as context:
        assert outcome(context.ask(QUESTIONS[0], PARAMS)) == wanted[0]
        for path in (tmp_path / "c.ctx").glob("segment*"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2 :] = bytes(b ^ 1 for b in data[len(data) // 2 :])
            with open(path, "r+b") as file:
                file.write(data)
        with pytest.raises(DamagedContext, match="page .* of layer .* checksum"):
            for question in QUESTIONS * 2:
                context.ask(question, PARAMS)
    running.check_integrity()


def test_of_a_choice_only_what_was_checked_is_at_hand(kept, tmp_path):
    """A damaged page, and those behind it, stay absent, and come when the file is whole again."""
    of, folder, *_ = kept
    shutil.copytree(folder, tmp_path / "c.ctx")
    free, running = (engine(of, max_cached_tokens=8000) for _ in range(2))
    with Context.open(free, folder) as whole, Context.open(running, tmp_path / "c.ctx") as context:
        tiers, pages = running.tiers(), context._hold.pages[40:50]
        absent = tiers.host.of[0, pages] < 0
        assert absent.all()
        source, index = tiers._sources[pages[4]]
        place, size = source._page_place(tiers.layers[0], index)
        with open(source.path, "r+b") as file:
            file.seek(place + size - 1)
            last = file.read(1)[0]
            file.seek(place + size - 1)
            file.write(bytes([last ^ 1]))
            file.flush()
            for _ in range(2):
                with pytest.raises(DamagedContext, match=f"page {index} of layer 0"):
                    tiers.bring(pages, tiers.layers[0])
                assert (tiers.host.of[0, pages] >= 0).tolist() == [True] * 4 + [False] * 6
            file.seek(place + size - 1)
            file.write(bytes([last]))
            file.flush()
            tiers.bring(pages, tiers.layers[0])
        assert (tiers.host.of[0, pages] >= 0).all()
        free.tiers().bring(whole._hold.pages)
        for found, wanted in zip(running.storage.kv[0][:2], free.storage.kv[0][:2], strict=True):
            assert torch.equal(found[pages], wanted[whole._hold.pages[40:50]])


def test_the_disk_is_told_of_neighbours_together(kept, monkeypatch):
    """Once for each run of pages, of absent ones only, before any of them is read."""
    of, folder, *_ = kept
    running = engine(of, max_cached_tokens=8000)
    told, read, real = [], [], SegmentFile.read_page
    monkeypatch.setattr(SegmentFile, "hint", lambda *args: told.append(args[1:]))
    with Context.open(running, folder) as context:
        tiers, pages = running.tiers(), context._hold.pages
        assert len(tiers._sources) == len(pages) and tiers._sources[pages[0]][1] == 0
        tiers.bring([pages[12]], 0)
        told.clear()

        def reading(file, layer, index, *memory):
            read.append((len(told), layer, index))
            real(file, layer, index, *memory)

        monkeypatch.setattr(SegmentFile, "read_page", reading)
        tiers.bring([pages[n] for n in (10, 11, 12, 13, 14, 40)], 0)
        assert told == [(0, 10, 2), (0, 13, 2), (0, 40, 1)]
        assert read == [(3, 0, n) for n in (10, 11, 13, 14, 40)]


def test_a_page_that_is_given_to_others_is_not_found_read_ahead(kept):
    of, folder, *_ = kept
    running = engine(of, max_cached_tokens=8000)
    with Context.open(running, folder) as context:
        tiers, page = running.tiers(), context._hold.pages[9]
        tiers.ahead.ask(0, [(page, *tiers._sources[page])])
        tiers.forget(page)
        assert tiers.ahead.take(0, page) is None


def test_budgets_that_hold_no_step_are_refused(kept):
    of, folder, docs, _ = kept
    said = "one step needs 16 pages of .* bytes at a time, and {} are allowed: allow at least .* bytes, or"
    for make, allowed in (
        (lambda: engine(of, host_memory=10 * PAGE_BYTES), 9),
        (lambda: Context.open(engine(of, max_cached_tokens=8000), folder, host_memory=PAGE_BYTES), 1),
        (lambda: in_frames(of, 15), 15),
    ):
        with pytest.raises(ValueError, match=said.format(allowed)):
            make()
    dense = model(attention_mode="dense")
    with pytest.raises(ValueError, match="attend densely: a layer needs .* and device memory holds 30"):
        ask(in_frames(dense, 30), docs, "who?", PARAMS, quiet=True)
    with pytest.raises(ValueError, match="bounds what lies on one GPU, and this model is on cpu"):
        engine(of, device_memory=1 << 20)
    with pytest.raises(ValueError, match="host_memory must be a whole number of at least 1, got 0"):
        engine(of, host_memory=0)
