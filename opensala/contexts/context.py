"""A context: documents that were read once, kept with everything a model remembers of them, and asked again.

A context in memory is pages and states of the engine that stay at hand, and the tokens they belong to. On
disk it is a folder (see `folder`). Answers are those of an engine that never stopped, on a CPU in float32 bit
for bit.
"""

import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..engine import Document, Engine, Generation, SamplingParams, TokenEvent
from ..engine.ask import answer_prompt
from ..engine.decode import check_text
from ..engine.documents import join_documents
from ..engine.holds import Hold
from ..engine.progress import token_progress
from ..engine.request import Sequence, common_length
from .checks import DamagedContext
from .folder import ContextFolder, link_files
from .identity import check_identity, identity
from .manifest import MANIFEST, Manifest, Turn
from .merge import merge_if_worth_it
from .pages import hand_over, load, pages_of, read_tokens, states_of
from .segment import Written
from .wording import Tail, Wording

SEGMENT_PAGES = 1000  # pages of a segment at most
SEGMENT_SECONDS = 60.0  # of reading that a kill may cost


class Context:
    """Documents at hand, in memory and, with `folder`, on disk. Make one with `ingest` or `open`; close
    it."""

    def __init__(self, engine: Engine, manifest: Manifest, folder: ContextFolder | None) -> None:
        if engine.tokenizer is None:
            raise ValueError("this engine has no tokenizer: a context needs one")
        self.engine, self.folder = engine, folder
        self.manifest = manifest  # what is on disk, or what would be
        self.wording = Wording(engine.tokenizer)
        self.tokens = array("i")
        self.turns: list[Turn] = list(manifest.turns)
        self.tail = Tail(manifest.tail, manifest.tail_tokens)
        self._hold: Hold | None = None
        self._saved = array("i")
        self._batches: list[list[Document]] | None = None

    # --- making one ---

    @classmethod
    def ingest(
        cls,
        engine: Engine,
        documents: list[Document],
        path: str | Path | None = None,
        *,
        quiet: bool = True,
        host_memory: int | None = None,
    ) -> "Context":
        """Read documents and keep them, in the folder `path` if one is given; an interrupted reading goes on
        from what the folder holds. `host_memory` as in `open`: what is in the folder gives way.

        Raises:
            ValueError: no documents, a path that holds something else, another text or another model's
            context;
                a text that does not fit into memory; a disk that cannot be written.
        """
        if not documents:
            raise ValueError("no document given")
        context = cls._begun(engine, documents, path, host_memory)
        try:
            context._read_on(context._text(), f"reading {context.manifest.planned:,} tokens", quiet)
        except BaseException:
            context.close()
            raise
        return context

    @classmethod
    def _begun(
        cls, engine: Engine, documents: list[Document], path: str | Path | None, host_memory: int | None
    ) -> "Context":
        if path is not None and (Path(path) / MANIFEST).exists():
            context = cls.open(engine, path, write=True, host_memory=host_memory)
            if context._joined() != Wording.joined([documents]) or context.turns:
                context.close()
                raise ValueError(
                    f"{path}: a context of other documents is there ({context.describe()}): give a new "
                    f"folder, or remove it with opensala contexts rm {path}"
                )
            return context
        _bound(engine, host_memory)
        context = cls(engine, _manifest(engine), None)
        context._batches = [documents]
        tokens, context.tail = context.wording.document(join_documents(documents))
        context.manifest = replace(
            context.manifest,
            planned=len(tokens),
            document_tokens=len(tokens),
            sparse=engine.config.attends_sparsely(len(tokens)),
            tail=context.tail.text,
            tail_tokens=context.tail.tokens,
        )
        if path is not None:
            context.folder = ContextFolder.create(path, context.manifest)
            try:
                texts = [context.folder.add_texts(documents)]
                context.manifest = replace(context.manifest, texts=texts)
                context.folder.put(context.manifest)
            except BaseException:
                context.close()
                raise
        return context

    @classmethod
    def empty(cls, engine: Engine) -> "Context":
        """A context without documents: a conversation from its beginning, in memory."""
        context = cls(engine, _manifest(engine), None)
        context._batches = []
        return context

    @classmethod
    def open(
        cls, engine: Engine, path: str | Path, *, write: bool = False, host_memory: int | None = None
    ) -> "Context":
        """Put a kept context at hand, for asking; with `write` also for changing it on disk.

        `host_memory` bounds the bytes of keys and values that the engine has in memory from all its contexts
        on disk, as `EngineOptions.host_memory`; what is wanted beyond it is read again when it is wanted.

        Raises:
            ValueError: it is no context, damaged, in use by another process (`write`), of another model (what
                differs is named), or too long for the engine's memory; a budget that holds no step.
        """
        folder = ContextFolder.open(path, write=write)
        try:
            return cls._opened(engine, folder, host_memory)
        except DamagedContext:
            folder.close()
            again = ContextFolder.open(path, write=write)
            if again.manifest == folder.manifest:
                again.close()
                raise
        return cls._opened(engine, again, host_memory)  # another process replaced files in the meantime

    @classmethod
    def _opened(cls, engine: Engine, folder: ContextFolder, host_memory: int | None) -> "Context":
        try:
            check_identity(folder.path, folder.manifest.identity, identity(engine))
            context = cls(engine, folder.manifest, folder)
            _bound(engine, host_memory)
            if folder.manifest.segments:
                context._hold = load(engine, folder)
                context.tokens = context._hold.tokens[:]
                context._saved = context._hold.tokens[:]
        except BaseException:
            folder.close()
            raise
        return context

    def close(self) -> None:
        """Let its memory and its folder go; what was not saved is lost."""
        if self._hold is not None:
            self.engine.scheduler.holds.let_go(self._hold)
            self._hold = None
        if self.folder is not None:
            self.folder.close()

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what it holds ---

    @property
    def documents(self) -> list[Document]:
        """The documents, in order."""
        return [document for batch in self._all_batches() for document in batch]

    @property
    def is_whole(self) -> bool:
        """Whether all of its documents were read."""
        return len(self.tokens) >= self.manifest.planned

    def describe(self) -> str:
        """One line."""
        names = [name for text in self.manifest.texts for name in text.names]
        what = f"{len(self.tokens):,} tokens of {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        return what + ("" if self.is_whole else f", {self.manifest.planned:,} planned: not read to its end")

    def traffic(self) -> str:
        """One line: what of the engine's contexts was moved between disk, memory and device."""
        tiers = self.engine.tiers()
        more = tiers.describe()
        return (
            f"{tiers.counter.bytes:,} bytes read from disk, where the context has {self.manifest.num_bytes:,}"
            f"{more and '; '}{more}"
        )

    def _all_batches(self) -> list[list[Document]]:
        if self._batches is None:
            assert self.folder is not None, "documents are in memory or on disk"
            self._batches = self.folder.texts()
        return self._batches

    def _joined(self) -> str:
        batches = self._all_batches()
        return Wording.joined(batches) if batches else ""

    def _text(self) -> array:
        """All tokens of the documents."""
        if self.is_whole and not self.turns and len(self.tokens):
            return self.tokens
        return self.wording.document(self._joined())[0]

    # --- asking ---

    def ask(
        self,
        question: str,
        params: SamplingParams | None = None,
        *,
        keep: bool = False,
        quiet: bool = True,
        on_event: Callable[[TokenEvent], None] | None = None,
    ) -> Generation:
        """Answer a question; with `keep` question and answer become part of the context.

        The prompt is that of `opensala.engine.ask` about the same documents. Where it attends in another mode
        than the context was read in (its length crosses `dense_len`), everything is read again, and the notes
        say so.

        Raises:
            ValueError: an empty question; a prompt that does not fit into memory; a damaged page.
        """
        question = question.strip()
        check_text("the question", question)
        ids, tokens = self._prompt(question), list[int]()

        def note(event: TokenEvent) -> None:
            tokens.extend([] if event.token is None else [event.token])
            if on_event is not None:
                on_event(event)

        read = len(self._hold.tokens) if self._hold is not None else 0
        before = min(len(self.tokens), len(ids) - 1)
        result = answer_prompt(self.engine, list(ids), before, params, quiet=quiet, on_event=note)
        self._say(result, read, len(ids))
        if keep:
            begin, text = len(self.tokens), result.text
            self.tokens = ids + self.wording.answer_tokens(tokens, self._raw(tokens, text))
            self.turns.append(Turn(question, text, begin, len(self.tokens)))
        return result

    def _prompt(self, question: str) -> array:
        if self.turns:
            return self.tokens + self.wording.next_question(question)
        tail = self.tail if self.is_whole else Tail()
        if not self.tokens and not self._all_batches():
            return array("i", self.wording.form.encode(self.wording.form.question("", question)))
        return self.wording.question(self.tokens, tail, self._all_batches, question)

    def _raw(self, tokens: list[int], answer: str) -> str:
        """The answer's text as it was generated, up to its end."""
        text = self.engine.tokenizer.decode(tokens, skip_special_tokens=True)
        place = text.find(answer)
        return text[: place + len(answer)] if place >= 0 else text

    def _say(self, result: Generation, read: int, length: int) -> None:
        if not self.is_whole:
            result.notes.append(
                f"{len(self.tokens):,} of the context's {self.manifest.planned:,} tokens were kept, the "
                "others were read for this answer: ingest the documents again to keep all of them"
            )
        if result.reused_tokens < read:
            here = "sparse" if self.engine.config.attends_sparsely(length) else "dense"
            there = "sparse" if self.manifest.sparse else "dense"
            why = (
                f"it was read in {there} attention, and the prompt of {length:,} tokens is computed in {here}"
                if here != there
                else "the question changes how its end is cut into tokens"
            )
            result.notes.append(
                f"of the context's {read:,} tokens {read - result.reused_tokens:,} were read again: {why}"
            )

    # --- changing it ---

    def extend(self, documents: list[Document], *, quiet: bool = True) -> None:
        """Add documents behind those that are there; a context on disk is extended there too.

        Raises:
            ValueError: questions were kept behind the documents; what `ingest` raises.
        """
        if not documents:
            raise ValueError("no document given")
        if self.turns:
            raise ValueError(
                "questions and answers stand behind the documents: undo them, or extend a fork from before "
                "them"
            )
        if not self.is_whole:
            self._go_on_with(documents, quiet)
            return
        follows = bool(self.manifest.texts if self._batches is None else self._batches)
        more = Wording.joined([[], documents]) if follows else join_documents(documents)
        found = self.wording.longer(self.tokens, self.tail, more)
        # the texts before are read from disk only if the new one changes how their end is cut into tokens
        tokens, tail = found or self.wording.document(Wording.joined([*self._all_batches(), documents]))
        before = self.manifest, self.tail, self._batches
        texts = list(self.manifest.texts)
        if self.folder is not None:
            self._lock()
            texts.append(self.folder.add_texts(documents))
        self.manifest = replace(
            self.manifest,
            texts=texts,
            planned=len(tokens),
            document_tokens=len(tokens),
            tail=tail.text,
            tail_tokens=tail.tokens,
        )
        self.tail = tail
        self._batches = None if self._batches is None else [*self._batches, documents]
        try:
            self._read_on(tokens, f"reading {len(tokens) - len(self.tokens):,} more tokens", quiet)
        except BaseException:
            if self.folder is None or self.folder.manifest.planned != len(tokens):
                self.manifest, self.tail, self._batches = before  # nothing of it is on disk
            raise

    def _go_on_with(self, documents: list[Document], quiet: bool) -> None:
        """Finish an extension by these documents, or a first reading, that was interrupted."""
        if self._all_batches()[-1] != documents:
            missing = self.manifest.planned - len(self.tokens)
            raise ValueError(
                f"{missing:,} tokens of {', '.join(d.name for d in self._all_batches()[-1])} were not read "
                "yet: go on with these documents first"
            )
        self.resume(quiet=quiet)

    def resume(self, *, quiet: bool = True) -> None:
        """Read what an interruption left unread.

        Raises:
            ValueError: what `ingest` raises.
        """
        if self.folder is not None:
            self._lock()
        self._read_on(
            self._text(), f"reading {self.manifest.planned - len(self.tokens):,} more tokens", quiet
        )

    def undo(self, turns: int = 1) -> None:
        """Forget the last questions and answers; on disk with the next `save`.

        Raises:
            ValueError: there are not so many.
        """
        if not 1 <= turns <= len(self.turns):
            raise ValueError(f"turns to undo must be 1 to {len(self.turns)}, got {turns}")
        self.tokens = self.tokens[: self.turns[-turns].begin]
        del self.turns[-turns:]
        if self._hold is not None and len(self._hold.tokens) > len(self.tokens):
            sparse = self.engine.config.attends_sparsely(len(self.tokens))
            kept = self.engine.scheduler.holds.hold(self.tokens[:], sparse) if self.tokens else None
            kept = kept or self._hold_on_disk(sparse)
            self.engine.scheduler.holds.let_go(self._hold)
            self._hold = kept  # without one, what is needed is read again

    def _hold_on_disk(self, sparse: bool) -> Hold | None:
        """What the folder has of the tokens up to a snapshot, at hand again; None if it has none, or lacks
        it."""
        if self.folder is None:
            return None
        part = self.folder.manifest.upto(common_length(self._saved, self.tokens))
        if not part.segments or part.sparse != sparse:
            return None
        try:
            return load(self.engine, self.folder, manifest=part)
        except DamagedContext:  # or gone: the next answer reads these tokens again
            return None

    def fork(self, path: str | Path) -> "Context":
        """A second context that begins like this one, in a folder of its own; files are shared where they can
        be.

        Raises:
            ValueError: the path holds something, or cannot be written.
        """
        twin = Context(self.engine, self.manifest, None)
        twin.tokens, twin.turns, twin.tail = self.tokens[:], list(self.turns), self.tail
        twin._batches = self._all_batches()
        try:
            twin._move(self.folder, path)
            twin._saved = self._saved[:]
            twin._store()
        except BaseException:
            twin.close()
            raise
        return twin

    def save(self, path: str | Path | None = None) -> None:
        """Write what is not on disk yet: to its folder, or to a new one, which becomes its own.

        Raises:
            ValueError: it has no folder and none is given; the path holds something; another process writes
            to it
                or has changed it; a disk that cannot be written. What was saved before is unharmed.
        """
        if path is not None and (self.folder is None or Path(path) != self.folder.path):
            old = self.folder
            self._move(old, path)
            if old is not None:
                old.close()
        elif self.folder is None:
            raise ValueError("the context has no folder yet: give one")
        self._lock()
        self._store()

    def _move(self, old: ContextFolder | None, path: str | Path) -> None:
        """A new folder with what is on disk in the old one."""
        begin = old.manifest if old is not None else replace(self.manifest, segments=[], texts=[], turns=[])
        folder = ContextFolder.create(path, begin)
        try:
            if old is not None:
                link_files(old, folder.path)
            texts = begin.texts if old is not None else [folder.add_texts(b) for b in self._all_batches()]
            begin = replace(begin, texts=texts)
            folder.put(begin)
        except BaseException:
            folder.close()
            raise
        self.folder, self.manifest = folder, replace(begin, turns=list(self.turns))
        if old is None:
            self._saved = array("i")

    def _lock(self) -> None:
        """Make sure that nobody else writes to the folder, nor has done so."""
        assert self.folder is not None, "it has one"
        if self.folder.lock is not None:
            return
        held = ContextFolder.open(self.folder.path, write=True)
        if held.manifest != self.folder.manifest:
            held.close()
            raise ValueError(
                f"{self.folder.path}: another process has changed the context since: open it again"
            )
        self.folder = held

    # --- reading and writing ---

    def _read_on(self, tokens: array, label: str, quiet: bool) -> None:
        """Read up to `tokens`, and write segments on the way."""
        last, start = time.monotonic(), len(self.tokens)
        done = 0

        def stored() -> int:
            return self.manifest.tokens

        def on_step(sequence: Sequence) -> None:
            nonlocal last, done
            read = max(0, min(sequence.num_cached, len(tokens)) - start)
            if read > done:
                advance(read - done)
                done = read
            new = sequence.num_cached - stored()
            due = new >= SEGMENT_PAGES * self.manifest.page_size
            if due or (new > 0 and time.monotonic() - last >= SEGMENT_SECONDS):
                self._write_part(sequence)
                last = time.monotonic()

        with token_progress(label, len(tokens) - start, quiet) as advance:
            hold = read_tokens(self.engine, tokens, on_step, self._write_part)
            advance(len(tokens) - start - done)
        if self._hold is not None:
            self.engine.scheduler.holds.let_go(self._hold)
        self._hold, self.tokens = hold, tokens[:]
        if self.folder is not None:
            self._store()

    def _write_part(self, sequence: Sequence) -> None:
        """Write what a running sequence has read of the documents, unless that is less than what is on
        disk."""
        end = sequence.num_cached
        if self.folder is None or end <= self.manifest.tokens or sequence.slot < 0:
            return
        sparse = sequence.is_sparse(0)
        base = self.manifest.segments if sparse == self.manifest.sparse else []
        self._append(base, sequence.tokens[:end], sparse, list(sequence.pages), sequence.slot)

    def _store(self) -> None:
        """Make the folder hold all tokens and turns."""
        assert self.folder is not None, "it has one"
        hold = self._whole_hold()
        base: list[Written] = []
        if hold is not None and self.manifest.segments and hold.sparse == self.manifest.sparse:
            base = self.manifest.upto(common_length(self._saved, self.tokens)).segments
        if hold is None:
            self._put(replace(self.manifest, segments=[], turns=list(self.turns), planned=0))
        elif base and base[-1].end_token == len(self.tokens):
            self._put(replace(self.manifest, segments=base, turns=list(self.turns), planned=len(self.tokens)))
        else:
            self._append(base, self.tokens, hold.sparse, hold.pages, hold.slot)

    def _whole_hold(self) -> Hold | None:
        """All tokens at hand, read if need be."""
        if not self.tokens:
            return None
        if self._hold is None or len(self._hold.tokens) != len(self.tokens):
            hold = read_tokens(self.engine, self.tokens[:])
            if self._hold is not None:
                self.engine.scheduler.holds.let_go(self._hold)
            self._hold = hold
        return self._hold

    def _append(self, base: list[Written], tokens: array, sparse: bool, pages: list[int], slot: int) -> None:
        """Write segments behind `base` up to the end of `tokens`, where the states in `slot` stand."""
        assert self.folder is not None, "it has one"
        size, segments, start = self.manifest.page_size, list(base), base[-1].end_token if base else 0
        while start < len(tokens):
            first = start // size
            end = min(len(tokens), (first + SEGMENT_PAGES) * size)
            some = pages[first : -(-end // size)]
            parts = pages_of(self.engine, some, (end - 1) % size + 1)
            states = states_of(self.engine, slot) if end == len(tokens) else {}
            segments.append(
                self.folder.add_segment(np.array(tokens[start:end], np.int32), parts, states, start, first)
            )
            start = end
        planned = self.manifest.planned if not self.turns else 0
        self._put(
            replace(
                self.manifest,
                segments=segments,
                sparse=sparse,
                turns=list(self.turns),
                planned=max(planned, len(tokens)),
            )
        )
        self._saved = tokens[:]
        self.manifest = merge_if_worth_it(self.folder)
        hand_over(self.engine, self.folder, pages)

    def _put(self, manifest: Manifest) -> None:
        assert self.folder is not None, "it has one"
        self.folder.put(manifest)
        self.manifest = manifest


def _bound(engine: Engine, host_memory: int | None) -> None:
    """Bound the bytes of keys and values in memory that also lie on disk, unless it is None."""
    if host_memory is None:
        return
    if host_memory < 1:
        raise ValueError(f"host_memory must be at least 1 byte, got {host_memory}")
    engine.tiers().budget = host_memory


def _manifest(engine: Engine) -> Manifest:
    return Manifest(identity(engine), engine.config.block_spec.block_size, False)
