"""The engine's prefix tree on disk: beginnings of texts that were read before the engine was started.

    DIR/index.json                 which runs of pages there are, each behind another, with their checksums
    DIR/segment-KEY.safetensors    a run, in the format of a context's segments (see `segment`)

A run is named by a hash of all tokens up to its end, of the mode they were read in, and of the namespace
whose prompts may find them: a prompt is looked up by hashing it once, and no text of one namespace is found
from another. A run that ends at a snapshot can be continued; the others lead to one. What is restored is read
and checked as a whole, and its tokens are compared with the prompt's, before the engine may use it. What is
damaged is removed and read anew: nothing lies here that cannot be computed again. For the same reason an
index that is damaged, or of another version, means to begin with none. A folder of another model is refused.
"""

import hashlib
import json
import logging
import re
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..cache import Node, Snapshot
from ..engine import Engine
from ..runs import FolderLock, write_errors
from ..runs.lock import LOCK_FILE
from .checks import SUM_BYTES, DamagedContext, damaged, seal, write_bytes
from .identity import check_identity, identity
from .pages import pages_of, restore, states_of
from .segment import Counter, SegmentFile, Written, write_segment

INDEX = "index.json"
FORMAT, VERSION = "opensala-prefixes", 2  # 1 had BLAKE2b sums
PIECE_PAGES = 250  # of a run at most: what a request that comes while one is written waits for
LEAST_TOKENS = 256  # that a restored text must save; fewer are read in no time
CLOSE_SECONDS = 30.0
_HEADER = 16 << 10  # bytes of a run's header, at most about
_FILE = re.compile(rf"segment-[0-9a-f]{{{2 * SUM_BYTES}}}\.safetensors")

_log = logging.getLogger("opensala")


@dataclass(frozen=True)
class Run:
    """A run of pages.

    Attributes:
        key: hash of the tokens up to its end, their mode and their namespace; it names the file.
        parent: key of the run before it; "" at the beginning of a text.
        segment: what is to be known of its file.
        used: when it was last wanted, on a clock that goes on over restarts.
    """

    key: str
    parent: str
    segment: Written
    used: int

    @property
    def end(self) -> int:
        return self.segment.end_token


class PrefixFolder:
    """Texts of an engine's prefix tree in a folder, within a limit; the least recently used give way.

    It belongs to the engine's thread. One process at a time has the folder.

    Args:
        path: the folder, made if need be.
        engine: whose tree it keeps. Set `engine.prefixes` to this, so that each prompt is looked up.
        limit: bytes of all runs.

    Attributes:
        limit: see above.
        num_bytes: of all runs.
        num_texts: texts that can be continued.
        restored_texts, restored_tokens: how often a text was put back into the tree, and tokens of them.

    Raises:
        ValueError: another process has the folder; it holds something else, or what another model read; it
            cannot be written; a limit below 1.
    """

    def __init__(self, path: str | Path, engine: Engine, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"the limit of {path} must be at least 1 byte, got {limit}")
        self.path, self.limit, self._engine = Path(path), limit, engine
        self.restored_texts = self.restored_tokens = 0
        self._identity = identity(engine)
        self._page_size = engine.config.block_spec.block_size
        self._runs: dict[str, Run] = {}
        self.num_bytes = self.num_texts = 0
        # snapshots of the tree that are kept, or were not worth their place, and when those were last used
        self._finished: WeakKeyDictionary[Node, int] = WeakKeyDictionary()
        self._writable = True
        if not self.path.exists():
            with write_errors(self.path):
                self.path.mkdir(mode=0o700, parents=True)  # what people asked is nobody else's business
        self._lock = FolderLock(self.path)
        try:
            for run in self._read_index():
                self._add(run)
            self._before = max((run.used for run in self._runs.values()), default=0)
            self._shrink(limit, set())
            self._put_index()
            self._tidy()
        except OSError as error:
            self._lock.release()
            raise ValueError(f"{path} cannot be used: {error.strerror or error}") from error
        except BaseException:
            self._lock.release()
            raise

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Keep what the tree has, the most recently used first, for at most so many seconds, and let the
        folder go."""
        until = time.monotonic() + seconds
        try:
            while time.monotonic() < until and self.write_next():
                pass
            if self._writable:
                self._put_index()  # with the times of last use
        except OSError as error:
            self._stop_writing(error)
        finally:
            self._lock.release()

    def __enter__(self) -> "PrefixFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading ---

    def bring(self, engine: Engine, tokens: array, sparse: bool, namespace: str) -> None:
        """See `KeptPrefixes.bring`."""
        assert engine is self._engine, "the folder is of one engine"
        tree = engine.scheduler.tree
        while (chain := self._longest(tokens, sparse, namespace)) is not None:
            here = tree.match(tokens, sparse, len(tokens), namespace).length
            for run in chain:
                self._runs[run.key] = replace(run, used=self._before + tree.now)
            if chain[-1].end - here < LEAST_TOKENS:
                return
            try:
                self._restore(engine, chain, tokens, sparse, namespace)
                return
            except DamagedContext as error:  # found before anything of it was used
                _log.warning("a text is read anew: %s", str(error).split(";")[0])
                self._forget_file(error.path, chain)
            except ValueError as error:  # no room beside what is in use
                _log.info("a text is read anew: %s", error)
                return

    def _restore(self, engine: Engine, chain: list[Run], tokens: array, sparse: bool, namespace: str) -> None:
        files: list[SegmentFile] = []
        try:
            for run in chain:
                files.append(SegmentFile(self.path / run.segment.file, run.segment, Counter()))
            found = restore(engine, files, sparse, namespace, tokens)
        finally:
            for file in files:
                file.close()
        self.restored_texts += 1
        self.restored_tokens += found

    def _longest(self, tokens: array, sparse: bool, namespace: str) -> list[Run] | None:
        """The runs of the longest beginning that is kept and can be continued."""
        ends = sorted({r.end for r in self._runs.values() if r.segment.state and r.end <= len(tokens)})
        if not ends:
            return None
        for key in reversed(list(_keys(tokens, ends, sparse, namespace))):
            run = self._runs.get(key)
            if run is not None and run.segment.state:
                return self._chain(run)
        return None

    def _chain(self, run: Run) -> list[Run]:
        """All runs of a text, in order, by the last one."""
        chain = [run]
        while chain[-1].parent:
            chain.append(self._runs[chain[-1].parent])
        return chain[::-1]

    # --- writing ---

    def write_next(self) -> bool:
        """Write the next piece of what the tree has and the folder has not, the most recently used text
        first; False if there is none. Between two steps of the engine."""
        if not self._writable:
            return False
        tree = self._engine.scheduler.tree
        for latest in tree.snapshots():
            if self._is_finished(latest):
                continue
            # shorter ones first: the longer ones go on behind them
            for text in tree.stops(latest):
                if self._is_finished(text):
                    continue
                try:
                    if self._write_piece(text):
                        return True
                except (OSError, ValueError) as error:
                    self._stop_writing(error)
                    return False
                self._finished[text.node] = text.node.used
        return False

    def _is_finished(self, text: Snapshot) -> bool:
        return self._finished.get(text.node) == text.node.used

    def _write_piece(self, text: Snapshot) -> bool:
        """Write one piece of a text; False if it is there already, or not worth its place."""
        ids, pages = text.text()
        tokens, size = array("i", ids), self._page_size
        ends = sorted({r.end for r in self._runs.values() if r.end <= len(tokens)})
        before = [k for k in _keys(tokens, ends, text.sparse, text.namespace) if k in self._runs]
        chain = self._chain(self._runs[before[-1]]) if before else []
        kept = max((run.end for run in chain if run.segment.state), default=0)
        used = self._before + text.node.used
        for run in chain:
            self._runs[run.key] = replace(run, used=max(run.used, used))
        if len(tokens) - kept < LEAST_TOKENS:
            return False
        start = chain[-1].end if chain else 0
        if not self._make_room(start, len(tokens), {run.key for run in chain}, used):
            return False
        first = start // size
        end = min(len(tokens), (first + PIECE_PAGES) * size)
        parts = pages_of(self._engine, pages[first : -(-end // size)], (end - 1) % size + 1)
        assert text.node.slot is not None, "it is a snapshot"
        states = states_of(self._engine, text.node.slot) if end == len(tokens) else {}
        (key,) = _keys(tokens, [end], text.sparse, text.namespace)
        path = self.path / f"segment-{key}.safetensors"
        new = np.array(tokens[start:end], np.int32)
        known = write_segment(path, new, parts, states, first_token=start, first_page=first)
        self._add(Run(key, chain[-1].key if chain else "", known, used))
        if states:
            self._put_index()
        return True

    def _make_room(self, start: int, end: int, chain: set[str], used: int) -> bool:
        """Let texts that were used less recently give way to the tokens from `start` to `end`; False if these
        do not fit."""
        page, slot = self._engine.sizes
        pages = -(-end // self._page_size) - start // self._page_size
        wanted = pages * (page + 64) + slot + _HEADER * (1 + pages // PIECE_PAGES) + 4 * (end - start)
        if wanted + sum(self._runs[key].segment.size for key in chain) > self.limit:
            return False
        before = len(self._runs)
        self._shrink(self.limit - wanted, chain, used)
        if len(self._runs) < before:
            self._put_index()  # before the files go: it names none that is not there
            self._tidy()
        return self.num_bytes + wanted <= self.limit

    def _shrink(self, limit: int, spared: set[str], used: int | None = None) -> None:
        """Forget the least recently used runs at the ends of texts until all are within `limit`, or the next
        one was used no less recently than `used`."""
        while self.num_bytes > limit:
            parents = {run.parent for run in self._runs.values()}
            ends = [r for r in self._runs.values() if r.key not in parents and r.key not in spared]
            # first those that lead to no snapshot, or to none any more
            last = min(ends, key=lambda r: (r.segment.state, r.used), default=None)
            if last is None or (last.segment.state and used is not None and last.used >= used):
                return
            self._drop(last.key)

    def _forget_file(self, path: Path | None, chain: list[Run]) -> None:
        """Forget the run in a file (or the whole text, if it is none of these), and all behind it."""
        bad = {run.key for run in chain if path is None or run.segment.file == path.name}
        bad = bad or {run.key for run in chain}
        while more := {r.key for r in self._runs.values() if r.parent in bad} - bad:
            bad |= more
        for key in bad:
            self._drop(key)
        try:
            if self._writable:
                self._put_index()
                self._tidy()
        except OSError as error:
            self._stop_writing(error)

    def _stop_writing(self, error: Exception) -> None:
        self._writable = False
        _log.warning(
            "%s cannot be written: %s; nothing more is kept there until the next start", self.path, error
        )

    # --- the folder ---

    def _add(self, run: Run) -> None:
        self._runs[run.key] = run
        self.num_bytes += run.segment.size
        self.num_texts += run.segment.state

    def _drop(self, key: str) -> None:
        run = self._runs.pop(key)
        self.num_bytes -= run.segment.size
        self.num_texts -= run.segment.state

    def _put_index(self) -> None:
        runs = [asdict(run) for run in self._runs.values()]
        record = {"format": FORMAT, "version": VERSION, "page_size": self._page_size}
        write_bytes(self.path / INDEX, seal({**record, "identity": self._identity, "runs": runs}))

    def _tidy(self) -> None:
        """Remove files of ours that the index does not name."""
        named = {run.segment.file for run in self._runs.values()}
        for path in self.path.iterdir():
            if path.name not in named and path.name != INDEX and _is_ours(path.name):
                path.unlink(missing_ok=True)

    def _read_index(self) -> list[Run]:
        """What is kept.

        Raises:
            ValueError: the folder holds something else, or what another model read.
        """
        path = self.path / INDEX
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            others = [p.name for p in self.path.iterdir() if p.name != LOCK_FILE and not _is_ours(p.name)]
            if others:
                raise ValueError(
                    f"{self.path} is not empty, and no folder of prefixes: it has {others[0]!r} and no "
                    f"{INDEX}; give another folder"
                ) from None
            return []
        try:
            record = _checked(path, data)
        except DamagedContext as error:
            _log.warning("%s is begun anew: %s", self.path, str(error).split(";")[0])
            return []
        if (record["format"], record["version"], record["page_size"]) != (FORMAT, VERSION, self._page_size):
            if record["format"] != FORMAT:
                raise ValueError(
                    f"{path}: format must be {FORMAT!r}, got {record['format']!r}: give another folder"
                )
            _log.warning(
                "%s is begun anew: version %r with pages of %r tokens, this program writes %r and %r",
                *(path, record["version"], record["page_size"], VERSION, self._page_size),
            )
            return []
        advice = "Give another folder, or delete this one"
        check_identity(self.path, record["identity"], self._identity, "folder", advice)
        return [Run(**{**run, "segment": Written(**run["segment"])}) for run in record["runs"]]


def _checked(path: Path, data: bytes) -> dict[str, Any]:
    """The record of an index that is what was written.

    Raises:
        DamagedContext: it is not.
    """
    try:
        record = json.loads(data)
        sealed = {name: value for name, value in record.items() if name != "checksum"}
        whole = sealed.get("version") != VERSION or seal(sealed) == data  # others seal theirs in other ways
        if whole and {"format", "version", "page_size"} <= set(sealed):
            return sealed
    except (ValueError, AttributeError) as error:
        raise damaged(path, "the index", "JSON", f"something else ({error})") from error
    raise damaged(path, "the index", "the text that its checksum is of", "another one")


def _keys(tokens: array, ends: Sequence[int], sparse: bool, namespace: str) -> Iterator[str]:
    """Hashes of the beginnings of `tokens` that end there, in ascending order.

    A cryptographic hash, unlike the checksums: nobody can make a text whose run is taken for another's.
    """
    state = hashlib.blake2b(json.dumps([FORMAT, VERSION, namespace, sparse]).encode(), digest_size=SUM_BYTES)
    place, data = 0, memoryview(tokens).cast("B")
    width = tokens.itemsize
    for end in ends:
        state.update(data[place * width : end * width])
        place = end
        yield state.copy().hexdigest()


def _is_ours(name: str) -> bool:
    stem = name.removesuffix(".partial")
    return stem == INDEX or _FILE.fullmatch(stem) is not None


__all__ = ["PrefixFolder", "Run"]
