"""A kept context as a server uses it: prompts about it, and its pages, for many requests at a time.

Unlike `Context` it is never changed, and keeps nothing at hand by itself: what was loaded for one prompt is
remembered by the engine as long as there is room, like all that was read.
"""

import logging
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.prompts import PromptFormat
from ..engine import Document, Engine
from ..engine.chat import ChatPrompt, Message, OtherTokens, encode_chat
from ..engine.request import common_length
from .folder import ContextFolder, link_files
from .identity import check_identity, identity
from .manifest import Manifest
from .merge import merge_if_worth_it
from .pages import load, pages_of, states_of
from .segment import Part, Written
from .wording import Tail, Wording

_log = logging.getLogger("opensala.server")
_SEGMENT_PAGES = 250  # of a segment: copied between two steps of an engine that serves others


class Kept:
    """A context on disk.

    Args:
        path: its folder.
        model: identity of the model that is to answer.
        name: what to call the context in messages.

    Attributes:
        name: as it was given.
        distrusted: what it has of keys and values is not used any more: some of it may be damaged. Its text
            and tokens were checked as a whole.

    Raises:
        ValueError: it is no context, damaged, or of another model.
    """

    def __init__(self, path: Path, model: dict[str, Any], name: str) -> None:
        self.name, self.distrusted = name, False
        self.folder = ContextFolder.open(path)
        self.manifest = self.folder.manifest
        check_identity(Path(name), self.manifest.identity, model)
        self.tokens = array("i")
        for known in self.manifest.segments:
            file = self.folder.segment(known)
            self.tokens.frombytes(file.tensor("tokens").numpy().tobytes())
            file.close()
        self.tail = Tail(self.manifest.tail, self.manifest.tail_tokens)

    def chat(self, tokenizer: Any, messages: Sequence[Message], **how: Any) -> ChatPrompt:
        """The prompt of a conversation about the documents: a single question gets the tokens that
        `opensala ask` gives it.

        Args:
            how: see `encode_chat`.

        Raises:
            ValueError: see `encode_chat`; the documents are needed and damaged.
        """
        tail = self.tail
        try:
            if not tail.tokens:
                raise OtherTokens
            last = self.tokens[-tail.tokens :]
            found = encode_chat(tokenizer, messages, document=tail.text, document_tokens=last, **how)
        except OtherTokens:
            found = encode_chat(tokenizer, messages, document=self._text(), **how)
            return self._marked(found, found.ids, 0)
        return self._marked(found, [*self.tokens[: -tail.tokens], *found.ids], len(self.tokens) - tail.tokens)

    def raw(self, tokenizer: Any, prompt: str) -> ChatPrompt:
        """The documents, and right behind them a text as it is."""
        tail = self.tail
        if tail.tokens:
            ids = tokenizer(tail.text + prompt, add_special_tokens=False, verbose=False)["input_ids"]
            if ids[: tail.tokens] == list(self.tokens[-tail.tokens :]):
                return self._marked(ChatPrompt(ids, (), (), False), [*self.tokens[: -tail.tokens], *ids], 0)
        form, text = PromptFormat(tokenizer), self._text()
        whole = form.question(text, "?")
        ids = form.encode(whole[: whole.find(text) + len(text)] + prompt)
        return self._marked(ChatPrompt(ids, (), (), False), ids, 0)

    def _marked(self, prompt: ChatPrompt, ids: list[int], shift: int) -> ChatPrompt:
        """The prompt with these ids, and a mark at the documents' end."""
        marks = {mark + shift for mark in prompt.marks} | {len(self.tokens)}
        return replace(prompt, ids=ids, marks=tuple(sorted(m for m in marks if 0 < m < len(ids))))

    def _text(self) -> str:
        return Wording.joined(self.folder.texts())

    def bring(self, engine: Engine, prompt: Sequence[int], namespace: str) -> None:
        """See that a prompt about the context finds it at hand. In the engine's thread.

        Where it cannot be had (too little memory, removed, damaged), the prompt is read as any other: it has
        all tokens.
        """
        tokens, sparse, scheduler = self.tokens, self.manifest.sparse, engine.scheduler
        same = engine.config.attends_sparsely(len(prompt)) == sparse
        if self.distrusted or not same or array("i", prompt[: len(tokens)]) != tokens:
            return
        if scheduler.tree.match(tokens, sparse, len(tokens), namespace).length == len(tokens):
            return
        try:
            scheduler.holds.let_go(load(engine, self.folder, namespace))
        except (ValueError, OSError) as error:
            _log.warning("a context is read again from its text: %s", error)


class Draft:
    """A context that is to be written: its documents cut into tokens, behind those of another one if need be.

    Args:
        engine: that will read it; only its configuration is looked at.
        tokenizer: of the thread that calls this.
        documents: they come behind those of `base`.
        base: a context to extend; None for a new one.

    Raises:
        ValueError: the documents of `base` are damaged.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, documents: list[Document], base: Kept | None = None
    ) -> None:
        self.documents, self.base = documents, base
        wording, found = Wording(tokenizer), None
        batches = [] if base is None else base.folder.texts()
        if base is not None:
            found = wording.longer(base.tokens, base.tail, Wording.joined([[], documents]))
        self.tokens, tail = found or wording.document(Wording.joined([*batches, documents]))
        self.sparse = engine.config.attends_sparsely(len(self.tokens))
        self.page_size = engine.config.block_spec.block_size
        size = len(self.tokens)
        self._shape: dict[str, Any] = {
            "planned": size,
            "document_tokens": size,
            "sparse": self.sparse,
            "tail": tail.text,
            "tail_tokens": tail.tokens,
        }
        self.segments: list[Written] = []

    def begin(self, path: Path, model: dict[str, Any]) -> ContextFolder:
        """A folder with what is there already: texts, and the pages of `base`. It counts once `finish` was
        called.

        Raises:
            ValueError: it cannot be written; the base is not there any more.
        """
        old = None if self.base is None else self.base.manifest
        manifest = old or Manifest(model, self.page_size, self.sparse)
        folder = ContextFolder.create(path, manifest)
        try:
            if self.base is not None:
                link_files(self.base.folder, folder.path)
                if old is not None and old.sparse == self.sparse and not self.base.distrusted:
                    self.segments = old.upto(common_length(self.base.tokens, self.tokens)).segments
            texts = [*manifest.texts, folder.add_texts(self.documents)]
        except BaseException:
            folder.close()
            raise
        folder.manifest = replace(manifest, texts=texts, segments=self.segments, **self._shape)
        return folder

    @property
    def written(self) -> int:
        """Tokens in segments so far."""
        return self.segments[-1].end_token if self.segments else 0

    def num_bytes(self, engine: Engine) -> int:
        """Bytes that it will take, about."""
        page, slot = engine.sizes
        text = sum(len(d.text) + len(d.name) for d in self.documents)
        before, known = 0, 0
        if self.base is not None:
            before, known = self.base.manifest.num_bytes, len(self.base.tokens)
        pages = -(-(len(self.tokens) - known) // self.page_size) + 1
        return before + pages * page + slot + text

    def copy(self, engine: Engine, namespace: str) -> "Piece | None":
        """The next pages that are not written yet, out of the engine's memory; None if they are not at hand
        there any more. In the engine's thread."""
        tokens, size, start = self.tokens, self.page_size, self.written
        match = engine.scheduler.tree.match(tokens, self.sparse, len(tokens), namespace)
        if match.length < len(tokens) or match.slot is None:
            return None
        first = start // size
        end = min(len(tokens), (first + _SEGMENT_PAGES) * size)
        parts = pages_of(engine, match.pages[first : -(-end // size)], (end - 1) % size + 1)
        states = states_of(engine, match.slot) if end == len(tokens) else {}
        return np.array(tokens[start:end], np.int32), parts, states, start, first

    def add(self, folder: ContextFolder, piece: "Piece") -> None:
        """Write what `copy` gave.

        Raises:
            ValueError: it cannot be written.
        """
        self.segments = [*self.segments, folder.add_segment(*piece)]

    def finish(self, folder: ContextFolder) -> Manifest:
        """Write the manifest: it is a context now.

        Raises:
            ValueError: it cannot be written.
        """
        folder.put(replace(folder.manifest, segments=self.segments))
        return merge_if_worth_it(folder, _SEGMENT_PAGES)


Piece = tuple[np.ndarray, dict[int, Part], dict[int, Any], int, int]


__all__ = ["Draft", "Kept", "Piece", "identity"]
