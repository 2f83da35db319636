"""Which layers stay softmax attention: pure functions from numbers to layer indices.

It knows no model. Scores may be fractions or percent: the rules use ratios and orders (the cap of 50 is the
only constant). Among equals the lower layer is kept.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..model.config import check_choice

CAP = 50.0
RULES = ("halo", "recall", "kl", "retrieval", "uniform", "first-last-heavy", "random")
NEEDS = {"halo": ("recall", "general"), "recall": ("recall",), "kl": ("kl",), "retrieval": ("retrieval",)}


@dataclass(frozen=True)
class Scores:
    """Per layer i, higher is better for recall and general, lower for kl.

    recall, general: R_i and C_i, measured with layer i alone replaced by its Lightning mixer.
    kl: divergence from the teacher with layer i alone restored in a model whose other layers are all
        Lightning.
    retrieval: attention of the layer's best head to what the teacher copies (`retrieval_scores`).
    """

    recall: tuple[float, ...] = ()
    general: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()
    retrieval: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, record: object) -> "Scores":
        """From parsed JSON, `{"recall": [...], "general": [...]}` (and or instead `kl`, `retrieval`).

        Raises ValueError for anything else: unknown keys, entries that are no finite numbers, different
            lengths.
        """
        if not isinstance(record, dict):
            raise ValueError(
                f"scores must be an object with lists named recall and general, got {type(record).__name__}"
            )
        for name, values in record.items():
            check_choice("a list of scores", name, ("recall", "general", "kl", "retrieval"))
            if not isinstance(values, list):
                raise ValueError(f"scores: {name} must be a list with one number per layer, got {values!r}")
            for i, value in enumerate(values):
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise ValueError(f"scores: {name}[{i}] must be a finite number, got {value!r}")
        lengths = {name: len(values) for name, values in record.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"scores: the lists must have one number per layer each, got lengths {lengths}")
        return cls(**{name: tuple(map(float, values)) for name, values in record.items()})

    @property
    def layers(self) -> int:
        return max(len(self.recall), len(self.general), len(self.kl), len(self.retrieval))


def importance(recall: Sequence[float], general: Sequence[float]) -> list[float]:
    """I_i = min(50, (max R - R_i) / (max C - C_i + 1e-10)): how much more replacing i costs recall than
    general ability.

    The base is the best replaced layer, as in HALO's published code. A layer whose C_i is the maximum gets
    the cap
    unless its R_i is the maximum too. Source: arXiv 2601.22156.
    """
    best_recall, best_general = max(recall), max(general)
    return [
        min(CAP, (best_recall - r) / (best_general - c + 1e-10)) for r, c in zip(recall, general, strict=True)
    ]


def default_keep(layers: int, fix_ends: bool = True) -> int:
    """25% of the layers, rounded half up.

    Raises ValueError where that does not leave room for both ends (or for any layer at all).
    """
    least = 2 if fix_ends else 1
    if layers < 4 * least:
        ends = " and both ends stay" if fix_ends else ""
        raise ValueError(
            f"a teacher of {layers} layers cannot keep 25%{ends}: name a number with --keep ({least} to "
            f"{layers})" + (" or let the ends go with --no-fix-ends" if fix_ends else "")
        )
    return (layers + 2) // 4


def select_layers(
    scores: Scores | None,
    keep: int,
    *,
    layers: int | None = None,
    fix_ends: bool = True,
    rule: str = "halo",
    seed: int = 0,
) -> list[int]:
    """The layers that stay softmax attention, ascending.

    Args:
        scores: what the rule needs: recall and general (`halo`), recall (`recall`), kl (`kl`), retrieval
            (`retrieval`), none of them (the others).
        keep: how many, ends included.
        layers: number of layers; needed without scores.
        fix_ends: keep the first and the last layer whatever their scores (SALA; HALO does not).
        rule: `halo` (the importance above), `recall` (drop in recall alone), `kl` (drop in divergence when
            restored), `retrieval` (attention to what is copied), `uniform` (even spacing),
            `first-last-heavy` (from both ends inwards), `random`.
        seed: of `random`.

    Raises:
        ValueError: an unknown rule, missing scores, or a number that cannot be kept.
    """
    check_choice("rule", rule, RULES)
    layers = layers or (scores.layers if scores else 0)
    least = 2 if fix_ends else 1
    if not least <= keep <= layers:
        raise ValueError(
            f"keep must be {least} to {layers} (the layers there are)"
            f"{', both ends included' if fix_ends else ''}, got {keep}"
        )
    for name in NEEDS.get(rule, ()):
        if scores is None or len(getattr(scores, name)) != layers:
            raise ValueError(
                f"rule {rule!r} needs a list {name!r} with one score for each of {layers} layers"
            )
    fixed = [0, layers - 1] if fix_ends else []
    order = [i for i in _order(scores, layers, keep, fix_ends, rule, seed) if i not in fixed]
    return sorted((fixed + order)[:keep])


def _order(scores: Scores | None, layers: int, keep: int, fix_ends: bool, rule: str, seed: int) -> list[int]:
    """All layers (or for `uniform` those kept), the most important first."""
    if rule == "uniform":
        if fix_ends:
            return [round(j * (layers - 1) / (keep - 1)) for j in range(keep)]
        return [(j + 1) * layers // keep - 1 for j in range(keep)]
    if rule == "first-last-heavy":
        return sorted(range(layers), key=lambda i: (min(i, layers - 1 - i), i))
    if rule == "random":
        return random.Random(seed).sample(range(layers), layers)
    assert scores is not None, "checked by select_layers"
    values = {
        "halo": lambda: importance(scores.recall, scores.general),
        "recall": lambda: [-r for r in scores.recall],
        "kl": lambda: [-d for d in scores.kl],
        "retrieval": lambda: list(scores.retrieval),
    }[rule]()
    return sorted(range(layers), key=lambda i: (-values[i], i))
