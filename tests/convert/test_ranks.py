"""Two and four processes convert what one does: losses, scores, weights; a run goes on with any number of
them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException

from opensala.convert import convert
from opensala.convert.ranks import Ranks
from opensala.convert.states import States

from ..parallel.group import run_group
from .conftest import small_config
from .ranks import a_step_a_time, killed, refused, several, whole
from .test_run import losses, same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
SETS = {1: ("all", "linear", "lora"), 2: ("all", "linear", "lora"), 4: ("all",)}  # trained, by processes


@pytest.fixture(scope="module")
def shared(small_teacher, text_file):
    return small_config(small_teacher, text_file)


@pytest.fixture(scope="module")
def runs(shared, tmp_path_factory):
    """The same runs on one, two and four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    for world, sets in SETS.items():
        run_group(world, several, shared, folder / str(world), sets)
    return folder


def numbers(record):
    """All numbers in nested lists and dictionaries, by path."""
    if isinstance(record, dict):
        return {f"{k}.{p}": x for k, v in record.items() for p, x in numbers(v).items()}
    if isinstance(record, list):
        return {f"{k}.{p}": x for k, v in enumerate(record) for p, x in numbers(v).items()}
    return {"": record} if isinstance(record, (int, float)) else {}


def near(found, expected, **limits):
    found, expected = numbers(found), numbers(expected)
    assert set(found) == set(expected) and len(found) > 1
    for path, value in found.items():
        assert value == pytest.approx(expected[path], **limits), path


@pytest.mark.parametrize(("world", "trainable"), [(world, name) for world in (2, 4) for name in SETS[world]])
def test_several_processes_equal_one(runs, world, trainable):
    mine, alone = (runs / str(n) / trainable for n in (world, 1))
    for step, loss in losses(alone).items():
        assert losses(mine)[step] == pytest.approx(loss, rel=1e-5, abs=1e-7), step
    for name in ("selection.json", "result.json", "calibration.json", "calibration_aligned.json"):
        near(*(json.loads((run / name).read_text()) for run in (mine, alone)), rel=1e-5, abs=1e-7)
    found, expected = (load_file(run / "model" / "model.safetensors") for run in (mine, alone))
    assert set(found) == set(expected)
    for name, x in expected.items():
        # a gradient of nearly nothing has no sign, and AdamW gives it a whole step: few entries may differ
        gap = (found[name] - x).norm() / x.norm().clamp(min=1e-6)
        assert gap < 1e-3, (name, gap)


@pytest.mark.parametrize("world", [2, 4])
def test_a_sweep_over_ranks_measures_the_same(runs, world):
    found, expected = (json.loads((runs / str(n) / "all" / "scores.json").read_text()) for n in (world, 1))
    assert found["recall"] == expected["recall"] and found["asked"] == expected["asked"]
    near(found["layers"], expected["layers"], rel=1e-4, abs=1e-6)


def test_what_is_left_is_what_one_process_leaves(runs):
    def names(run):
        return sorted(str(p.relative_to(run)) for p in run.rglob("*") if "states" not in p.parts)

    assert names(runs / "2" / "lora") == names(runs / "1" / "lora")
    assert names(runs / "4" / "all") == names(runs / "1" / "all")
    assert len(list((runs / "4" / "all" / "teacher_states").iterdir())) == 3


def test_a_run_goes_on_with_fewer_processes(shared, runs, tmp_path):
    """Stopped by its clock behind the first and the second step of the alignment and the first of the
    distillation: begun by four, gone on with by two, one, and two again."""
    for begun, world in enumerate((4, 2, 1)):
        run_group(world, a_step_a_time, shared, tmp_path / "run", begun > 0)
    states = States(tmp_path / "run")
    assert states.note("distill")["step"] == 1 and states.last("aligned") is not None
    run_group(2, whole, shared, tmp_path / "run", None, True)
    expected = losses(runs / "1" / "linear")
    assert set(losses(tmp_path / "run")) == set(expected)
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(expected[step], rel=1e-5, abs=1e-7), step
    assert not list(tmp_path.rglob("*.partial"))


def test_kill_9_of_a_process_changes_no_bit(shared, runs, tmp_path):
    with pytest.raises(ProcessExitedException):
        run_group(2, killed, replace(shared, reuse=str(runs / "2" / "all")), tmp_path / "run", 2)
    assert States(tmp_path / "run").note("distill")["step"] == 2
    run_group(2, whole, replace(shared, reuse=str(runs / "2" / "all")), tmp_path / "run", None, True)
    assert losses(tmp_path / "run") == losses(runs / "2" / "linear")
    same_weights(tmp_path / "run", runs / "2" / "linear")


def test_what_several_processes_refuse_is_said_by_each_of_them(shared, runs, tmp_path):
    for name, changes, message in (
        ("half", {"dtype": "bfloat16"}, "compute: a teacher in bfloat16 on 2 processes"),
        ("taken", {}, "holds this run already: add --resume"),
    ):
        folder = runs / "2" / "all" if name == "taken" else tmp_path / name
        run_group(2, refused, replace(shared, trainable="all", **changes), folder)
        for rank in range(2):
            assert message in torch.load(folder.with_name(f"{folder.name} {rank}.pt"))
    assert not (tmp_path / "half").exists()


def test_a_teacher_and_products_in_bfloat16(shared, runs, tmp_path):
    low = replace(shared, dtype="bfloat16", compute="bfloat16", layers=(0, 3))
    run_group(2, whole, low, tmp_path / "two")
    run_group(1, whole, low, tmp_path / "one")
    expected = losses(tmp_path / "one")
    for step, loss in losses(tmp_path / "two").items():
        assert torch.tensor(loss).mean().item() == pytest.approx(
            torch.tensor(expected[step]).mean().item(), rel=0.05
        )


@pytest.mark.parametrize("count", [1, 3, 8])
def test_passes_and_rows_of_all_ranks_are_all_of_them(count):
    class Mesh:
        world = 4

        def __init__(self, rank):
            self.rank = rank

    rows = torch.arange(count)
    every = [Ranks(Mesh(rank)) for rank in range(4)]
    parts = [ranks.passes(count, 2) for ranks in every]
    assert len({len(part) for part in parts}) == 1
    taken = [n for part in parts for rows_ in part if rows_ is not None for n in range(count)[rows_]]
    assert taken == list(range(count))
    assert torch.cat([ranks.own(rows) for ranks in every])[:count].tolist() == rows.tolist()


def test_one_process_needs_no_other(shared, runs, tmp_path):
    """Without any group started, the numbers are those of a group of one."""
    folder = convert(replace(shared, trainable="all"), tmp_path / "run", quiet=True).parent
    assert losses(folder) == losses(runs / "1" / "all")
    same_weights(folder, runs / "1" / "all")
