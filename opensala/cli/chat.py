"""The conversation of `opensala chat`: one line, one answer; lines that begin with / are about the
conversation.

Answers go to stdout as they come, everything else to stderr.
"""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .notes import show_cost

if TYPE_CHECKING:
    from ..contexts import Context
    from ..engine import SamplingParams, TokenEvent

_HELP = """/save [CTX]   keep the conversation, in its context or in a new one
/undo [N]     forget the last N questions and answers (1)
/fork CTX     keep a copy as a context of its own, and go on here
/docs         what it is about
/help         this
/quit         end (so does the end of the input)"""


class Chat:
    """A conversation about a context.

    Args:
        context: what it is about; it grows by each question and answer.
        params: how answers are generated.
        quiet: answers only.
    """

    def __init__(self, context: "Context", params: "SamplingParams", quiet: bool) -> None:
        self.context, self.params, self.quiet = context, params, quiet
        self._kept = list(context.turns)
        self._commands: dict[str, Callable[[str], None]] = {
            "/save": self._save,
            "/undo": self._undo,
            "/fork": self._fork,
            "/docs": self._docs,
            "/help": lambda _: self._say(_HELP),
        }

    def run(self) -> None:
        """Talk until the input ends."""
        for line in self._lines():
            try:
                self._take(line)
            except ValueError as error:
                self._say(f"opensala: {' '.join(str(error).split())}", always=True)
            except KeyboardInterrupt:  # of one answer; the conversation is as it was before the question
                print(flush=True)
                self._say("note: interrupted; the question was not kept")
        if self.context.turns != self._kept:
            self._say(f"note: {_turns(self.context)} not saved (/save)")

    def _lines(self) -> Iterator[str]:
        while True:
            if sys.stdin is None:
                return
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line or line.strip() == "/quit":
                return
            if line.strip():
                yield line.strip()

    def _take(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in self._commands:
            self._commands[word](rest.strip())
        elif line.startswith("/"):
            raise ValueError(f"{word} is no command: {', '.join(self._commands)} and /quit are")
        else:
            self._ask(line)

    def _ask(self, question: str) -> None:
        begun = False

        def show(event: "TokenEvent") -> None:
            nonlocal begun
            text = event.text if begun else event.text.lstrip()
            begun = begun or bool(text)
            sys.stdout.write(text)
            sys.stdout.flush()

        result = self.context.ask(question, self.params, keep=True, quiet=True, on_event=show)
        print(flush=True)
        if not self.quiet:
            if self.context.engine.tiers().is_bounded:
                result.notes.append(self.context.traffic())
            show_cost(result)

    def _save(self, path: str) -> None:
        self.context.save(path or None)
        self._kept = list(self.context.turns)
        assert self.context.folder is not None, "it was saved there"
        self._say(f"saved to {self.context.folder.path}: {len(self.context.tokens):,} tokens")

    def _undo(self, count: str) -> None:
        if count and not (count.isascii() and count.isdigit()):
            raise ValueError(f"/undo takes a number, got {count!r}")
        self.context.undo(int(count or 1))
        self._say(f"{_turns(self.context)} left")

    def _fork(self, path: str) -> None:
        if not path:
            raise ValueError("/fork needs the name of a new context")
        self.context.fork(path).close()
        self._say(f"forked to {path}")

    def _docs(self, _: str) -> None:
        for document in self.context.documents:
            self._say(f"{document.name}: {len(document.text):,} characters", always=True)
        self._say(f"{len(self.context.tokens):,} tokens, {_turns(self.context)}")

    def _say(self, text: str, always: bool = False) -> None:
        if always or not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _turns(context: "Context") -> str:
    count = len(context.turns)
    return f"{count} question{'' if count == 1 else 's'} with answer{'' if count == 1 else 's'}"
