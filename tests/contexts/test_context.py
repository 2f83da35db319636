"""A context that was kept answers as if the engine had never stopped: bit for bit, on a CPU in float32."""

import pytest

from opensala.contexts import Context, context
from opensala.contexts.folder import ContextFolder
from opensala.engine import Document, Engine, ask
from opensala.model import tiers

from .files import content
from .tools import DENSE_LEN, PAGE, PARAMS, documents, engine, model, outcome

QUESTIONS = ("what is the code?", "who?", "where are the red falcons near the old mill tower?")
LENGTHS = sorted({n + d for n in (DENSE_LEN, 10 * PAGE, 300) for d in (-40, -1, 0, 1, 7)} | {3, 20, 900})


def fresh(of, docs, question, **changes):
    """The answer of an engine that reads everything for it."""
    return ask(engine(of, **changes), docs, question, PARAMS, quiet=True)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_reopened_context_answers_as_a_fresh_reading(length, tmp_path):
    of, docs = model(), documents(length)
    Context.ingest(engine(of), docs, tmp_path / "a.ctx").close()
    running = engine(of)
    with Context.open(running, tmp_path / "a.ctx") as context:
        for question in QUESTIONS:
            found = context.ask(question, PARAMS)
            assert outcome(found) == outcome(fresh(of, docs, question))
            sparse = found.prompt_tokens >= DENSE_LEN
            if sparse == context.manifest.sparse:
                assert found.reused_tokens == len(context.tokens)
            if found.reused_tokens < len(context.tokens):
                assert "were read again: it was read in dense attention" in " ".join(found.notes)
            running.check_integrity()
    running.check_integrity()


@pytest.mark.parametrize("length", [30, 50, 60, 170, 500])
def test_extended_forked_rolled_back(length, tmp_path):
    of, first, second = model(), documents(length), documents(133, 5, "more.txt")
    running = engine(of)
    context = Context.ingest(running, first, tmp_path / "a.ctx")
    twin = context.fork(tmp_path / "b.ctx")
    twin.extend(second)
    joined = [Document("book.txt", f"{first[0].text}\n\n=== more.txt ===\n{second[0].text}")]
    for kept in (context, twin):
        kept.close()
    running.check_integrity()
    running = engine(of)
    for path, docs in (("a.ctx", first), ("b.ctx", joined)):
        with Context.open(running, tmp_path / path) as context:
            for question in QUESTIONS:
                assert outcome(context.ask(question, PARAMS)) == outcome(fresh(of, docs, question))
            running.check_integrity()


def test_extending_reads_no_text_of_before(tmp_path, monkeypatch):
    """Where the end of the text is known to be cut as before; all documents are there afterwards."""
    of, docs = model(), [documents(300), documents(133, 5, "more.txt"), documents(90, 6, "last.txt")]
    Context.ingest(engine(of), docs[0], tmp_path / "a.ctx").close()
    read, real = [], ContextFolder._text
    monkeypatch.setattr(ContextFolder, "_text", lambda *args: read.append(args) or real(*args))
    with Context.open(engine(of), tmp_path / "a.ctx", write=True) as kept:
        assert kept.tail.tokens
        kept.extend(docs[1])
        assert not read and kept.documents == docs[0] + docs[1]
        kept.extend(docs[2])
        assert len(read) == 2 and kept.documents == docs[0] + docs[1] + docs[2] and len(read) == 2
    with Context.open(engine(of), tmp_path / "a.ctx") as kept:
        joined = [Document("book.txt", kept._joined())]
        assert kept.documents == docs[0] + docs[1] + docs[2]
        assert outcome(kept.ask("who?", PARAMS)) == outcome(fresh(of, joined, "who?"))


def test_only_what_is_touched_is_read(tmp_path):
    of, docs = model(), documents(3000)
    Context.ingest(engine(of), docs, tmp_path / "a.ctx").close()
    running = engine(of)
    with Context.open(running, tmp_path / "a.ctx") as context:
        opened = running.storage.backing.counter.bytes
        pages = 2 * running.storage.backing.num_absent
        assert opened < 0.45 * context.manifest.num_bytes and running.storage.backing.counter.pages == 0
        found = context.ask("who?", PARAMS)
        assert 0 < running.storage.backing.counter.pages < 0.7 * pages
    assert outcome(found) == outcome(fresh(of, docs, "who?"))


def turns(context, running):
    said = []
    for question in QUESTIONS:
        said.append(outcome(context.ask(question, PARAMS, keep=True)))
        running.check_integrity()
    return said


@pytest.mark.parametrize("length", [0, 20, 50, 300])
@pytest.mark.parametrize("chat", [False, True])
def test_a_conversation_that_was_saved_goes_on(length, chat, tmp_path):
    """Saved and opened between any two turns; undone, and asked again."""
    of = model()

    def start(where):
        if chat:
            where.tokenizer.chat_template = (
                "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n\n{% endfor %}"
                "{% if add_generation_prompt %}<a>{% endif %}"
            )
        return where

    running = start(engine(of))
    context = Context.ingest(running, documents(length)) if length else Context.empty(running)
    said, whole = turns(context, running), context.tokens
    running = start(engine(of))
    context = Context.ingest(running, documents(length)) if length else Context.empty(running)
    for n, question in enumerate(QUESTIONS):
        assert outcome(context.ask(question, PARAMS, keep=True)) == said[n]
        context.save(tmp_path / "a.ctx" if n == 0 else None)
        context.close()
        running.check_integrity()
        running = start(engine(of))
        context = Context.open(running, tmp_path / "a.ctx", write=True)
        assert [t.question for t in context.turns] == list(QUESTIONS[: n + 1])
    assert context.tokens == whole
    context.undo(2)
    context.save()
    context.close()
    running = start(engine(of))
    context = Context.open(running, tmp_path / "a.ctx", write=True)
    assert [outcome(context.ask(q, PARAMS, keep=True)) for q in QUESTIONS[1:]] == said[1:]
    assert context.tokens == whole
    context.save()
    context.close()
    running.check_integrity()


def test_far_less_memory_than_the_context(tmp_path, monkeypatch):
    """Selected blocks come and go; the answer is that of an engine with room for everything."""
    monkeypatch.setattr(tiers, "give_back", lambda memory: memory.fill_(float("nan")))
    of, docs = model(), documents(6000)
    Context.ingest(engine(of, max_cached_tokens=8000), docs, tmp_path / "a.ctx").close()
    wanted = fresh(of, docs, QUESTIONS[2], max_cached_tokens=8000)
    running = engine(of, max_cached_tokens=8000)
    pages = 2 * (wanted.prompt_tokens // PAGE)  # in both sparse layers
    budget = pages * 2 * PAGE * 2 * 8 * 4 // 8
    with Context.open(running, tmp_path / "a.ctx", host_memory=budget) as context:
        disk = running.storage.backing
        for _ in range(2):
            assert outcome(context.ask(QUESTIONS[2], PARAMS)) == outcome(wanted)
        assert disk.traffic.evictions > 50 and 0 < disk.traffic.hit_rate < 1
        assert disk.resident_bytes <= budget
        running.check_integrity()
    with pytest.raises(ValueError, match="host_memory must be at least 1 byte, got 0"):
        Context.open(running, tmp_path / "a.ctx", host_memory=0)


@pytest.mark.parametrize("budget", [20, 28, 60])
def test_several_sequences_in_too_little_memory(budget, tmp_path, monkeypatch):
    """No sequence of a step makes room with what another needs, nor a layer with what another reads."""
    monkeypatch.setattr(tiers, "give_back", lambda memory: memory.fill_(float("nan")))
    of = model()
    running, apart = (engine(of, max_cached_tokens=9000) for _ in range(2))
    contexts, prompts = [], []
    for seed in range(3):
        path = tmp_path / f"{seed}.ctx"
        Context.ingest(engine(of), documents(1500 + seed, seed), path).close()
        contexts.append(Context.open(running, path, host_memory=budget * 2 * PAGE * 2 * 8 * 4))
        prompts.append(list(contexts[-1]._prompt(QUESTIONS[seed])))
    found, wanted = running.generate(prompts, PARAMS), apart.generate(prompts, PARAMS)
    assert [(c.tokens, c.logprobs) for c in found] == [(c.tokens, c.logprobs) for c in wanted]
    assert [c.reuse.reused for c in found] == [len(c.tokens) for c in contexts]
    assert running.storage.backing.traffic.evictions > 0
    for pool in running.storage.kv.values():  # windows reach back into pages that came from disk
        assert not pool.k1.isnan().any() and not pool.k2.isnan().any()
    running.check_integrity()


def early():
    """A model whose sparse attention leaves blocks out from its first sparse token on."""
    return model(sparse_config={**model().config.sparse_config, "dense_len": 150, "topk": 2})


@pytest.mark.parametrize(("stopped", "pages"), [(False, 8), (True, 8), (False, 1000)])
def test_an_extension_across_dense_len_reads_everything_sparsely(stopped, pages, tmp_path, monkeypatch):
    """What was read densely stays no part of it, on disk neither; also if it was interrupted."""
    monkeypatch.setattr(context, "SEGMENT_PAGES", pages)
    of, first, second = early(), documents(140), documents(900, 5, "more.txt")
    joined = [Document("book.txt", f"{first[0].text}\n\n=== more.txt ===\n{second[0].text}")]
    kept = Context.ingest(engine(of), first, tmp_path / "a.ctx")
    assert not kept.manifest.sparse and len(kept.tokens) < 150
    if stopped:
        real, steps = Engine.step, iter(range(100))

        def step(self):
            if next(steps) == 7:
                raise KeyboardInterrupt
            return real(self)

        monkeypatch.setattr(Engine, "step", step)
        with pytest.raises(KeyboardInterrupt):
            kept.extend(second)
        monkeypatch.setattr(Engine, "step", real)
        kept.close()
        kept = Context.open(engine(of), tmp_path / "a.ctx", write=True)
        assert kept.manifest.sparse and len(kept.tokens) == 350 and not kept.is_whole
    kept.extend(second)
    kept.close()
    with Context.open(engine(of), tmp_path / "a.ctx") as kept:
        assert kept.manifest.sparse and kept.is_whole
        for question in QUESTIONS:
            assert outcome(kept.ask(question, PARAMS)) == outcome(fresh(of, joined, question))
    Context.ingest(engine(of), joined, tmp_path / "b.ctx").close()
    assert content(tmp_path / "a.ctx")[:3] == content(tmp_path / "b.ctx")[:3]


def test_another_question_after_an_undo(tmp_path):
    """What was saved of the question that was taken back is replaced."""
    of, answers = early(), {}
    for path in ("a.ctx", "b.ctx"):
        with Context.ingest(engine(of), documents(300), tmp_path / path) as kept:
            if path == "a.ctx":
                for question in QUESTIONS:
                    kept.ask(question, PARAMS, keep=True)
                    kept.save()
                kept.undo(2)
            else:
                kept.ask(QUESTIONS[0], PARAMS, keep=True)
            kept.ask("what of the blue otters by the tower of the north?", PARAMS, keep=True)
            kept.save()
        with Context.open(engine(of), tmp_path / path) as kept:
            answers[path] = kept.tokens, kept.turns, outcome(kept.ask("who?", PARAMS))
    assert answers["a.ctx"] == answers["b.ctx"]
    assert content(tmp_path / "a.ctx") == content(tmp_path / "b.ctx")
