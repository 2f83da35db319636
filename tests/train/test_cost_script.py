"""scripts/measure_cost.py: budgets, what they cost by count, and all runs once at the smallest size."""

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opensala.convert.config import Phase, Probes
from opensala.train.recipes import tiny

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_cost.py"


@pytest.fixture
def cost(monkeypatch):
    spec = importlib.util.spec_from_file_location("measure_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "measure_cost", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def small():
    """The recipe with a conversion of a few steps."""
    recipe = tiny()
    halo = recipe.stage("halo")
    config = replace(halo.config, align=Phase(2, 2, 1e-3, 1e-3), probes=Probes(256, 2, 2))
    stages = tuple(replace(s, config=config) if s is halo else s for s in recipe.stages)
    return replace(recipe, stages=stages, probe_tokens=2048)


def test_a_budget_costs_what_it_says(cost):
    one, two = (cost.row("scratch", 0, cost.training(n * 40_960, 0), 1.0, 1) for n in (1, 2))
    assert (one.conversion_tokens, one.training_tokens, two.training_tokens) == (0, 40_960, 81_920)
    assert two.flops == pytest.approx(2 * one.flops)
    teacher = cost.transformer(40_960)
    assert cost.plan(teacher, 1, "h100", 0.4)[0].tokens == 40_960
    recipe = cost.conversion(20_480, 40_960, 0)
    assert [s.name for s in recipe.stages] == ["halo", "stable"]
    assert recipe.stages[0].config.distill.steps == 20 and recipe.stages[1].tokens == 40_960


def test_every_run_once(cost, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "tiny", small)
    made = []
    original = cost.train

    def counted(*args, **kwargs):
        made.append(args[1].name)
        return original(*args, **kwargs)

    monkeypatch.setattr(cost, "train", counted)
    budgets = {"dense": 8192, "scratch": "4096", "converted": "2048+4096"}
    cost.main(tmp_path / "runs", tmp_path / "cost.csv", **budgets)
    with (tmp_path / "cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["transformer", "converted", "converted", "scratch"]
    assert made == ["transformer", "converted-2048+4096-0", "scratch-4096-0"]
    assert [int(row["training_tokens"]) for row in rows] == [8192, 0, 4096, 4096]
    assert float(rows[2]["flops"]) > float(rows[1]["flops"]) > 0
    assert all(2 < float(row["loss"]) < 9 for row in rows)
    assert rows[1]["loss"] != rows[2]["loss"]
    cost.main(tmp_path / "runs", tmp_path / "again.csv", **budgets)  # finished runs are read, not made
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "cost.csv").read_text()
