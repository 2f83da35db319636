"""How answers are scored: the published rules of RULER, OpenAI MRCR and NoLiMa, each as a plain function.

A score is between 0 and 1 for one sample; tables multiply by 100. It knows nothing of models or files.
"""

import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

_CONTROL = re.compile(r"[\x00-\x1f]")
_THOUGHTS = re.compile(r"^.*?</think>", re.DOTALL)


def clean(prediction: str) -> str:
    """RULER's clean-up of an answer: control characters become newlines, white space around is dropped."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER, all tasks but question answering: the share of references the answer contains, whatever the
    case."""
    text = clean(prediction).lower()
    return sum(r.lower() in text for r in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """RULER, question answering: 1 if the answer contains any of the references, whatever the case."""
    text = clean(prediction).lower()
    return float(any(r.lower() in text for r in references))


def mrcr_ratio(prediction: str, answer: str, prefix: str) -> float:
    """OpenAI MRCR: 0 unless the response starts with the random prefix; then, without it, how alike the texts
    are."""
    if not prediction.startswith(prefix):
        return 0.0
    return SequenceMatcher(None, prediction.removeprefix(prefix), answer.removeprefix(prefix)).ratio()


def contains(prediction: str, references: Sequence[str]) -> float:
    """NoLiMa `contains`: 1 if any reference stands in the response, in the same case."""
    return float(any(r in prediction for r in references))


def exact(prediction: str, references: Sequence[str]) -> float:
    """NoLiMa `EM`: 1 if the response is one of the references, white space around it aside."""
    return float(prediction.strip() in references)


def last_line(rule: Callable[[str, Sequence[str]], float]) -> Callable[[str, Sequence[str]], float]:
    """NoLiMa `lastline_...`: the rule applied to the last line of the response."""

    def score(prediction: str, references: Sequence[str]) -> float:
        return rule(prediction.strip().split("\n")[-1], references)

    return score


NOLIMA_RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "contains": contains,
    "EM": exact,
    "lastline_contains": last_line(contains),
    "lastline_EM": last_line(exact),
}


def without_thoughts(prediction: str) -> str:
    """The response after the end of its thinking part, if it has one."""
    return _THOUGHTS.sub("", prediction, count=1).lstrip()
