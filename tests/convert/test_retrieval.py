"""Layers by what their heads do while the teacher copies: pairs of places, weights, and the rule."""

import json

import pytest
import torch

from opensala.convert import convert
from opensala.convert.retrieval import Copies, find_copies, retrieval_scores
from opensala.convert.selection import Scores, select_layers
from opensala.convert.teacher import load_teacher


def test_copies_are_found_where_the_text_says_them():
    #      0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
    ids = [9, 5, 6, 7, 1, 5, 6, 7, 8, 3, 5, 6, 7, 2, 4]
    marks = [False] * 10 + [True] * 4 + [False]
    assert find_copies(ids, marks) == Copies([9, 10, 11], [5, 6, 7])  # the nearer of two places
    assert find_copies([1, 2, 3, 4, 2], [False, False, False, True, True]) == Copies(
        [], []
    )  # says nothing of it
    assert find_copies([5, 5, 2], [True, True, True]) == Copies([], [])  # nothing stands before


def attention_by_hand(teacher, layer, row):
    """All weights `[H, T, T]` of a layer, float64, from what its mixer reads."""
    seen = []
    mixer = teacher.model.layers[layer].self_attn
    handle = mixer.register_forward_pre_hook(lambda _module, args: seen.append(args))
    with torch.no_grad():
        teacher.model.read_whole(row[None])
        handle.remove()
        q, k, _ = mixer.project(*seen[0])
    q, k = q[0].double(), k[0].double().repeat_interleave(q.shape[2] // k.shape[2], 1)
    scores = torch.einsum("thd,shd->hts", q, k) * mixer.scale
    return scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).softmax(-1)


def test_scores_are_the_attention_to_what_is_copied(teacher_folder):
    teacher = load_teacher(teacher_folder)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 400, (2, 40), generator=generator)
    marks = torch.zeros(2, 40, dtype=torch.bool)
    ids[0, 30:34], ids[0, 34], marks[0, 30:35] = ids[0, 5:9], 2, True
    ids[1, 20:22], ids[1, 22], marks[1, 20:23] = ids[1, 11:13], 2, True
    got = retrieval_scores(teacher, ids, marks)
    for layer, score in enumerate(got):
        first, second = (attention_by_hand(teacher, layer, row) for row in ids)
        total = sum(first[:, 29 + j, 5 + j] for j in range(4)) + sum(
            second[:, 19 + j, 11 + j] for j in (0, 1)
        )
        assert score == pytest.approx(float((total / 6).max()), rel=1e-4)


def test_answers_that_stand_nowhere_are_refused(teacher_folder):
    teacher = load_teacher(teacher_folder)
    ids = torch.arange(3, 43)[None]
    with pytest.raises(ValueError, match="no answer of the probes stands in its text"):
        retrieval_scores(teacher, ids, torch.zeros(1, 40, dtype=torch.bool))


def test_the_rule_keeps_the_layers_that_copy():
    scores = Scores.from_dict({"retrieval": [0.0, 0.1, 0.9, 0.0, 0.8, 0.2]})
    assert select_layers(scores, 4, rule="retrieval") == [0, 2, 4, 5]
    assert select_layers(scores, 2, rule="retrieval", fix_ends=False) == [2, 4]
    with pytest.raises(ValueError, match="needs a list 'retrieval'"):
        select_layers(Scores(kl=(1.0, 2.0)), 2, rule="retrieval")


def test_a_run_chooses_by_it_without_a_sweep(config, tmp_path):
    from dataclasses import replace

    chosen = replace(config, rule="retrieval", distill=replace(config.distill, steps=0))
    convert(chosen, tmp_path / "run", quiet=True)
    record = json.loads((tmp_path / "run" / "scores.json").read_text())
    kept = json.loads((tmp_path / "run" / "selection.json").read_text())["kept"]
    assert record["layers"] == [] and len(record["retrieval"]) == 8
    assert kept == select_layers(
        Scores.from_dict({"retrieval": record["retrieval"]}), len(kept), rule="retrieval"
    )
