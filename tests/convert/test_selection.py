"""Scores to layers: the formula, the rules, ties, ends, and refusal of what cannot be kept."""

import csv
import math
from pathlib import Path

import pytest

from opensala.convert.selection import RULES, Scores, default_keep, importance, select_layers

RECALL = (0.10, 0.80, 0.55, 0.79, 0.30, 0.80, 0.78, 0.50)
GENERAL = (0.20, 0.60, 0.58, 0.40, 0.59, 0.50, 0.61, 0.55)
SCORES = Scores(RECALL, GENERAL)


def test_importance_by_hand():
    values = importance(RECALL, GENERAL)
    assert values[0] == pytest.approx(0.70 / 0.41) and values[4] == pytest.approx(0.5 / 0.02)
    assert values[1] == values[5] == 0.0  # best recall: nothing lost
    assert values[6] == 50.0  # best general ability: the quotient is capped
    assert max(importance([0.1, 0.9], [0.5, 0.1])) == 50.0
    assert importance([0.3, 0.3], [0.5, 0.5]) == [0.0, 0.0]


def test_halo_keeps_the_highest():
    assert select_layers(SCORES, 3, fix_ends=False) == [2, 4, 6]
    assert select_layers(SCORES, 4) == [0, 4, 6, 7]
    assert select_layers(SCORES, 2) == [0, 7]
    assert select_layers(SCORES, 8) == list(range(8))


@pytest.mark.parametrize(
    ("model", "layers", "published"),
    [
        ("2b", 28, [2, 3, 6, 8, 9, 21, 25]),
        ("5b", 36, [0, 1, 7, 14, 15, 22, 24, 31, 33]),
        ("9b", 36, [1, 2, 4, 6, 7, 10, 24, 33, 34]),
    ],
)
def test_published_scores_choose_the_published_layers(model, layers, published):
    """HypeNet: what its authors' logs say of Qwen3-1.7B, 4B and 8B with each layer replaced (thunlp/
    hybrid-linear-attention at a8b605f, attn-layer-selection/results; lm-eval, accuracies of general tasks
    normalised), and the softmax layers of the models that they made of them (halo/configs at 37474fa).
    24 of 25 follow: of the 5B's, layer 31 was published where its scores put layer 34 before it."""
    with open(Path(__file__).parent / f"hypenet_{model}.csv") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    def means(*tasks):
        return tuple(sum(row[task] for task in tasks) / len(tasks) for row in rows)

    scores = Scores(means("fda", "ruler_qa_squad", "swde"), means("arc_challenge", "arc_easy", "hellaswag"))
    assert len(rows) == layers and default_keep(layers, fix_ends=False) == len(published)
    chosen = select_layers(scores, len(published), fix_ends=False)
    if model == "5b":
        values = importance(scores.recall, scores.general)
        assert values[34] > 1.4 * values[31]
        published = sorted({*published, 34} - {31})
    assert chosen == published


def test_percent_and_fractions_choose_alike():
    percent = Scores(tuple(100 * r for r in RECALL), tuple(100 * c for c in GENERAL))
    for keep in range(2, 9):
        assert select_layers(percent, keep) == select_layers(SCORES, keep)


def test_ends_count_within_the_number_and_are_not_counted_twice():
    ends_best = Scores((0.0, 0.9, 0.5, 0.9, 0.0), (0.5, 0.9, 0.8, 0.7, 0.5))
    assert select_layers(ends_best, 3) == [0, 2, 4]


def test_recall_rule_looks_at_recall_alone():
    assert select_layers(SCORES, 3, fix_ends=False, rule="recall") == [0, 4, 7]


def test_kl_rule_keeps_what_helps_most_when_restored():
    scores = Scores(kl=(3.0, 2.0, 2.5, 1.0, 2.9))
    assert select_layers(scores, 2, fix_ends=False, rule="kl") == [1, 3]
    assert select_layers(scores, 3, rule="kl") == [0, 3, 4]


def test_rules_without_scores():
    def kept(rule, keep, layers, **more):
        return select_layers(None, keep, layers=layers, rule=rule, **more)

    assert kept("uniform", 3, 12) == [0, 6, 11]
    assert kept("uniform", 8, 32, fix_ends=False) == [3, 7, 11, 15, 19, 23, 27, 31]
    assert kept("uniform", 1, 5, fix_ends=False) == [4]
    assert kept("first-last-heavy", 5, 12) == [0, 1, 2, 10, 11]
    random = kept("random", 4, 12, seed=3)
    assert random == kept("random", 4, 12, seed=3) and random[0] == 0 and random[-1] == 11
    assert len({tuple(kept("random", 4, 12, seed=s)) for s in range(20)}) > 10
    for rule in ("uniform", "first-last-heavy", "random"):
        for fix_ends in (True, False):
            for layers in range(2, 13):
                for keep in range(2, layers + 1):
                    chosen = kept(rule, keep, layers, fix_ends=fix_ends)
                    assert chosen == sorted(set(chosen)) and len(chosen) == keep and chosen[-1] < layers
                    assert not fix_ends or (chosen[0], chosen[-1]) == (0, layers - 1)


def test_ties_go_to_the_lower_layer():
    flat = Scores((0.5,) * 6, (0.5,) * 6)
    assert select_layers(flat, 3, fix_ends=False) == [0, 1, 2]
    assert select_layers(flat, 3) == [0, 1, 5]
    assert select_layers(None, 3, layers=8, rule="first-last-heavy") == [0, 1, 7]


@pytest.mark.parametrize(
    "keep,fix_ends,message",
    [
        (1, True, "keep must be 2 to 8 .the layers there are., both ends included, got 1"),
        (0, False, "keep must be 1 to 8"),
        (9, True, "got 9"),
        (-1, False, "got -1"),
    ],
)
def test_impossible_numbers(keep, fix_ends, message):
    with pytest.raises(ValueError, match=message):
        select_layers(SCORES, keep, fix_ends=fix_ends)


def test_a_quarter_of_the_layers():
    assert [default_keep(n) for n in (8, 12, 22, 28, 30, 32, 36)] == [2, 3, 6, 7, 8, 8, 9]
    assert default_keep(4, fix_ends=False) == 1
    for layers, fix_ends in ((7, True), (4, True), (3, False)):
        with pytest.raises(ValueError, match=f"a teacher of {layers} layers cannot keep 25%"):
            default_keep(layers, fix_ends)


@pytest.mark.parametrize(
    "record,message",
    [
        ([1, 2], "scores must be an object"),
        ({"recal": [1.0]}, "Did you mean 'recall'"),
        ({"recall": 3, "general": [1.0]}, "recall must be a list"),
        ({"recall": [1.0, math.nan], "general": [1.0, 1.0]}, r"recall\[1\] must be a finite number, got nan"),
        ({"recall": [1.0, math.inf], "general": [1.0, 1.0]}, r"recall\[1\]"),
        ({"recall": [1.0, "x"], "general": [1.0, 1.0]}, r"recall\[1\]"),
        ({"recall": [1.0, True], "general": [1.0, 1.0]}, r"recall\[1\]"),
        ({"recall": [1.0], "general": [1.0, 1.0]}, "got lengths {'recall': 1, 'general': 2}"),
    ],
)
def test_bad_scores(record, message):
    with pytest.raises(ValueError, match=message):
        Scores.from_dict(record)


def test_missing_scores_and_unknown_rules():
    with pytest.raises(ValueError, match="rule 'halo' needs a list 'general'"):
        select_layers(Scores.from_dict({"recall": [1, 2, 3]}), 2)
    with pytest.raises(ValueError, match="Did you mean 'halo'"):
        select_layers(SCORES, 3, rule="hallo")
    assert set(RULES) == {"halo", "recall", "kl", "retrieval", "uniform", "first-last-heavy", "random"}
