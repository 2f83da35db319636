"""What a task builder returns: a document and the questions that can be asked about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RulerQuestion:
    """A question, the answers it accepts or wants, and where in the document (0 start, 1 end) the answer
    lies.

    `references` are all wanted (needles, variables, words) or each accepted (question answering); the task
    says which. `depth` is None where the answer is spread over the whole document.
    """

    text: str
    references: tuple[str, ...]
    depth: float | None = None


@dataclass(frozen=True)
class RulerDocument:
    """Everything that stands before a question, and the questions."""

    text: str
    questions: tuple[RulerQuestion, ...]
