"""Two and four processes compute what one does: losses, every gradient, the step after a checkpoint.

All checks of a group run in one go (checks.py); the tests look at the numbers they left.
"""

import json

import pytest

from .checkpoints import load_on, load_the_wrong, save_on_four
from .checks import (
    AT_BORDERS,
    CASES,
    PACKED,
    bad_input,
    batch_alone,
    equality,
    gather_alone,
    half_precision,
    run_all,
    scan_alone,
    traffic,
)
from .group import run_group

SCANS = {
    "one": [[0, 320]],
    "packed": [PACKED],
    "borders": [AT_BORDERS],
    "late": [[0, 310, 320]],
    "fast": [[0, 320], [2.0, 3.0, 1.5, 40.0, 2.5, 81.0]],
}  # nothing older than 54 tokens counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the groups leave their numbers and checkpoints."""
    folder = tmp_path_factory.mktemp("parallel")
    jobs = [(name, equality, name) for name in CASES]
    jobs += [(f"scan {name}", scan_alone, *arguments) for name, arguments in SCANS.items()]
    jobs += [
        ("gather", gather_alone),
        ("batch", batch_alone),
        ("half", half_precision),
        ("bad input", bad_input),
        ("traffic", traffic),
    ]
    (folder / "checkpoints").mkdir()
    jobs.append(("save", save_on_four, folder / "checkpoints"))
    run_group(4, run_all, folder, jobs)
    run_group(2, run_all, folder, [("load 2", load_on, folder / "checkpoints")])
    run_group(
        1,
        run_all,
        folder,
        [
            ("load 1", load_on, folder / "checkpoints"),
            ("load 1 whole", load_on, folder / "checkpoints", False),
            ("wrong", load_the_wrong, folder / "checkpoints"),
        ],
    )
    return folder


def left(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_equal_one_process(folder, name):
    """float32: other orders of summation; float64 leaves no room for an error that only looks small."""
    gaps = left(folder, name)
    limit = 1e-10 if CASES[name][3] == "float64" else 1e-5
    assert gaps["loss"] < limit and gaps["gradient"] < limit, gaps
    assert gaps["parameters"] > 40
    selects = CASES[name][6] != "dense" and "inside" not in name
    assert (gaps["left out"] > 0.01) == selects  # where it is said to be sparse, blocks are left out


@pytest.mark.parametrize("name", SCANS)
def test_states_pass_through_ranks(folder, name):
    assert left(folder, f"scan {name}")["worst"] < 1e-12


def test_keys_of_all_ranks(folder):
    gaps = left(folder, "gather")
    assert gaps["values"] == 0 and gaps["gradient"] < 1e-6 and gaps["half"] == 16


def test_batches_are_shifted_before_they_are_split(folder):
    got = left(folder, "batch")
    assert (
        got["same"]
        and got["targets"] == 2 * 319
        and got["keys"] == ["input_ids", "position_ids", "targets", "weights"]
    )


def test_half_precision_keeps_float32_where_it_counts(folder):
    got = left(folder, "half")
    assert got["loss"] < 0.02 and got["seen"] == "torch.bfloat16" and got["gradients"] == "{torch.float32}"
    assert got["exact"] < 1e-7
    assert (
        got["shards"] < 0.3 * got["whole"]
        and got["norm"] > 0.5
        and abs(got["after"] - 0.5) < 1e-4
        and got["named"] > 40
    )


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "length": ["250 tokens", "cp = 4", "252"],
        "key": ["did you mean 'labels'"],
        "shape": ["weights", "[1, 319]"],
        "different": ["different batches"],
        "documents": ["different batches"],
        "world": ["2 * 4", "4 processes", "1, 2, 4"],
        "cp": ["cp = 3", "4 processes"],
        "labels": ["shift them before"],
        "cache": ["use_cache=False"],
        "mask": ["attention_mask"],
        "tokens": ["at least one token"],
        "model": ["Linear"],
    }.items(),
)
def test_bad_input_is_refused_on_every_rank(folder, name, words):
    said = left(folder, "bad input")[name]
    for word in words:
        assert word.lower() in said.lower(), said


def test_traffic_is_what_is_counted(folder):
    got = left(folder, "traffic")
    assert got["counted"] == got["wanted"] > 0


def test_checkpoint_is_whole_or_absent(folder):
    got = left(folder, "save")
    assert (
        got["left"] == ["saved", "start"]
        and "state.json" in got["inside"]
        and "left.distcp" not in got["inside"]
    )
    assert "exists" in got["exists"] and "full failed" in got["full"] and "GB are free" in got["full"]


@pytest.mark.parametrize("name", ["load 2", "load 1", "load 1 whole"])
def test_checkpoint_reshards(folder, name):
    got = left(folder, name)
    assert got["extra"] == {"step": 2, "data": [1, "shard-7"]} and got["named"] > 40 and got["unused"] == 0
    assert got["same"] and got["pretrained"] < 1e-12
    assert got["loss"] < 1e-10 and got["weights"] < 1e-8, (
        got
    )  # AdamW divides by the root of tiny second moments


def test_checkpoint_of_another_model_is_refused(folder):
    said = left(folder, "wrong")
    assert "damaged cannot be read" in said["damaged"]
    assert "mlp.gate_proj.weight has shape [48, 32], not [64, 32]" in said["shape"]
    assert (
        "q_norm.weight is missing" in said["names"]
        and "absent" in said["nothing"]
        and "state.json" in said["nothing"]
    )
