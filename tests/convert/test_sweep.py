"""A sweep that goes on from where a layer is changed measures what plain passes measure, and says how well it
can tell layers apart."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from opensala.convert.batches import Batches
from opensala.convert.calibrate import read_whole
from opensala.convert.files import RunFiles
from opensala.convert.opening import tokenizer_of
from opensala.convert.probes import (
    Prober,
    Stream,
    replaced,
    stream_divergences,
    stream_scores,
    stream_states,
)
from opensala.convert.ranks import Ranks
from opensala.convert.resolution import Estimate, estimate, mean, ratio, unresolved
from opensala.convert.selection import importance
from opensala.convert.sweep import Sweep, without_rope
from opensala.convert.teacher import load_teacher
from opensala.convert.transfer import lightning_mixers
from opensala.runs import read_json

from .conftest import small_config


@pytest.fixture(scope="module")
def swept(small_teacher, text_file, tmp_path_factory):
    """Teacher, mixers, prober, files and the record of a sweep."""
    torch.set_num_threads(1)
    config = small_config(small_teacher, text_file)
    config = replace(config, probes=replace(config.probes, sequences=5))
    teacher = load_teacher(small_teacher)
    mixers = lightning_mixers(teacher).requires_grad_(False)
    prober = Prober(Batches(tokenizer_of(str(small_teacher)), config), config.probes)
    folder = tmp_path_factory.mktemp("sweep")
    files = RunFiles(folder, None, Ranks())
    record = Sweep(teacher, mixers, prober, files).run(quiet=True)
    return SimpleNamespace(teacher=teacher, mixers=mixers, prober=prober, files=files, record=record)


def plain(swept):
    """Recall and likelihood of the teacher as it is now, from the ids on."""
    score = swept.prober.builtin(swept.teacher)
    return score.recall, score.nll


@pytest.mark.parametrize("layer", range(4))
def test_it_measures_what_plain_passes_do_to_the_bit(swept, layer):
    teacher, mixers, found = swept.teacher, swept.mixers, swept.record["layers"][layer]
    with replaced(teacher, {layer: mixers[layer]}):
        assert plain(swept) == (found["recall"], found["nll"])
    with without_rope(teacher, layer):
        assert plain(swept) == (found["rope"]["recall"], found["rope"]["nll"])
    assert found["rope"]["nll"] != swept.record["teacher"]["nll"]
    others = {i: mixer for i, mixer in enumerate(mixers) if i != layer}
    streams, rows = swept.prober.streams(teacher.device), []
    for stream in streams:
        targets = stream_states(teacher, stream)
        with replaced(teacher, others):
            rows.append(stream_divergences(teacher, stream, targets, teacher.lm_head.weight))
    assert torch.cat(rows).mean().item() == found["kl"] > 0
    assert plain(swept) == (swept.record["teacher"]["recall"], swept.record["teacher"]["nll"])


def test_layers_are_not_passed_twice(swept, monkeypatch):
    """Three kinds from the changed layer on, the documents' own way, and the teacher twice."""
    passed = [0]
    original = type(swept.teacher.model).read_layers

    def counting(self, x, start, stop=None):
        passed[0] += len(self.layers[start:stop]) * (len(x) > 0)
        return original(self, x, start, stop)

    monkeypatch.setattr(type(swept.teacher.model), "read_layers", counting)
    (swept.files.path / "scores.json").unlink()
    again = Sweep(swept.teacher, swept.mixers, swept.prober, swept.files).run(quiet=True)
    assert again == swept.record
    calls = 3 * 2  # batches of 2 of 5 documents, of each kind
    assert passed[0] == calls * (2 * 4 + 3 * (4 + 3 + 2 + 1) + 2 * 3)


def test_a_sweep_that_was_stopped_goes_on(swept, monkeypatch):
    whole = swept.record
    swept.files.write("scores.json", {**whole, "layers": whole["layers"][:2]})
    measured = []
    original = Sweep._layer
    monkeypatch.setattr(
        Sweep, "_layer", lambda self, i, *rest: measured.append(i) or original(self, i, *rest)
    )
    again = Sweep(swept.teacher, swept.mixers, swept.prober, swept.files).run(quiet=True)
    assert measured == [2, 3] and again == whole == read_json(swept.files.path / "scores.json")


def test_a_stream_ends_where_the_model_does(swept):
    ids = swept.prober.text
    stream = Stream(ids, 2, Ranks(), swept.teacher.device)
    states = stream_states(swept.teacher, stream)
    expected = read_whole(swept.teacher, ids) / swept.teacher.config.logit_divisor
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)  # other batches, other sums
    before = stream_scores(swept.teacher, stream)
    for stop in (1, 3):
        stream.advance(swept.teacher, stop)
        assert all(
            torch.equal(a, b) for a, b in zip(before, stream_scores(swept.teacher, stream), strict=True)
        )


def test_standard_errors():
    """The jackknife of a mean is the textbook's; of a quotient it is near what other samples give."""
    draw = random.Random(0)
    values = [draw.gauss(0, 1) for _ in range(40)]
    middle = sum(values) / 40
    textbook = math.sqrt(sum((v - middle) ** 2 for v in values) / 39 / 40)
    found = estimate(40, lambda n: [mean(values, n), 2 * mean(values, n)])
    assert found.values[0] == pytest.approx(middle)
    assert found.errors == pytest.approx([textbook, 2 * textbook])
    assert found.error_between(0, 1) == pytest.approx(textbook)
    part, whole = [3, 1, 4], [8, 7, 8]
    assert ratio(part, whole, None) == 8 / 23 and ratio(part, whole, 1) == 7 / 16
    assert math.isnan(estimate(1, lambda n: [1.0]).errors[0])

    def sample():
        asked = [draw.randint(6, 9) for _ in range(60)]
        return [(n, sum(draw.random() < 0.4 for _ in range(n))) for n in asked]

    samples = [sample() for _ in range(200)]
    shares = [sum(f for _, f in s) / sum(n for n, _ in s) for s in samples]
    spread = (sum((x - sum(shares) / 200) ** 2 for x in shares) / 199) ** 0.5
    one = samples[0]
    error = estimate(60, lambda n: [ratio([f for _, f in one], [n_ for n_, _ in one], n)]).errors[0]
    assert error == pytest.approx(spread, rel=0.35)


def test_a_choice_that_is_not_clear_is_said():
    clear = Estimate([0.1, 0.9, 0.5, 0.2], [[0.1, 0.9, 0.5, 0.2], [0.11, 0.91, 0.5, 0.2]])
    assert unresolved(clear, [1, 2], []) is None
    close = Estimate([0.1, 0.9, 0.5, 0.49], [[0.1, 0.9, 0.45, 0.5], [0.1, 0.9, 0.55, 0.48]])
    assert unresolved(close, [1, 2], []) == (2, 3)
    assert unresolved(close, [1, 2], [2]) is None  # an end stays whatever its score
    assert unresolved(close, [0, 1, 2, 3], []) is None


def test_the_record_holds_the_lists_that_rules_need(swept):
    record = swept.record
    assert record["halo"] == importance(record["recall"], record["general"])
    assert record["rope"] == [x["rope"]["nll"] - record["teacher"]["nll"] for x in record["layers"]]
    assert all(error > 0 for name in ("nll", "kl", "rope") for error in record["errors"][name])
