"""What every suite provides and every run consumes: samples, in groups that share a document."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ..data.prompts import PromptFormat


@dataclass(frozen=True)
class Sample:
    """One prompt and how its answer is scored.

    Attributes:
        id: the same whenever the suite is made again from the same settings.
        length: the length class it belongs to, in tokens as the suite counts them.
        prompt: token ids.
        budget: tokens the answer may take.
        rule, score: the scoring rule's name and the rule itself, from answer to a number between 0 and 1.
        depth: where in the document the answer lies (0 start, 1 end), if at one place.
    """

    id: str
    task: str
    length: int
    prompt: tuple[int, ...]
    references: tuple[str, ...]
    budget: int
    rule: str
    score: Callable[[str], float]
    depth: float | None = None


@dataclass(frozen=True)
class Group:
    """Samples whose prompts begin alike. `ids` are known beforehand; `load` makes the prompts only when they
    are run."""

    ids: tuple[str, ...]
    load: Callable[[], list[Sample]]


def scorer(rule: Callable[[str, Any], float], references: tuple[str, ...]) -> Callable[[str], float]:
    """The rule with its references filled in."""
    return lambda prediction: rule(prediction, references)


class Suite(Protocol):
    """A set of tasks.

    `settings` are all that decides what the samples with these ids are (seeds, files); lengths and numbers of
    samples do not belong there, so that a run can be extended.
    """

    @property
    def name(self) -> str: ...

    def settings(self) -> dict[str, Any]: ...

    def longest(self) -> int:
        """Tokens of the longest prompt and its answer, or a bound; 0 if not known."""
        ...

    def groups(self, form: PromptFormat) -> Iterator[Group]: ...
