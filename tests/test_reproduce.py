"""The whole conversion as one command: its steps at tiny sizes, once; that done ones are not repeated, and
what is said when one fails."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "reproduce.py"


@pytest.fixture(scope="module")
def reproduce():
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reproduce"]


def command(*words):
    return (sys.executable, "-c", *words)


def test_all_steps_at_tiny_sizes(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "run", "--smoke"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "run" / "log.txt").read_text()[-3000:]
    made = tmp_path / "run"
    rows = np.load(made / "tasks" / "questions_512.npy")
    marks = np.load(made / "tasks" / "questions_512.answers.npy")
    assert rows.shape == marks.shape == (8, 512) and 0 < marks.mean() < 0.5
    manifest = json.loads((made / "delta" / "delta.json").read_text())
    assert manifest["trained"]["distill"]["steps"] == 4 and manifest["kept_layers"] == [0, 3]
    assert (made / "hybrid" / "model.safetensors").exists()
    assert "| needle, prose | 512 |" in done.stdout and "| distilled |" in done.stdout
    for line in done.stdout.splitlines():
        if line.startswith("| loss, python"):  # a teacher that knows nothing, and a hybrid as near to it
            student, teacher = (float(cell) for cell in line.split("|")[3:5])
            assert abs(teacher - np.log(2048)) < 0.5 and abs(student - teacher) < 0.5
            break
    else:
        raise AssertionError(done.stdout)
    again = subprocess.run(
        [sys.executable, SCRIPT, made, "--smoke"], capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0 and again.stderr.count("done before") == 8 and again.stdout == done.stdout


def test_a_step_that_fails_is_named_and_done_ones_are_kept(tmp_path, reproduce):
    good = reproduce.Step("good", command(f"open({str(tmp_path / 'x')!r}, 'a').write('1')"))
    bad = reproduce.Step("bad", command("import sys; print('why'); sys.exit(3)"))
    said = []
    with pytest.raises(SystemExit, match="bad failed with exit code 3"):
        reproduce.carry_out(tmp_path, [good, bad], said.append)
    assert "why" in (tmp_path / "log.txt").read_text() and len(said) == 2
    mended = reproduce.Step("bad", command("print('well')"))
    reproduce.carry_out(tmp_path, [good, mended], said.append)
    assert (tmp_path / "x").read_text() == "1" and said[2] == "1/2 good: done before"
    with pytest.raises(SystemExit, match="was done in .* by another command"):
        reproduce.carry_out(tmp_path, [reproduce.Step("good", command("1"))], said.append)


def test_a_conversion_goes_on_where_it_stopped(tmp_path, reproduce):
    run = tmp_path / "run"
    step = reproduce.Step("convert", command("import sys; print(sys.argv)"), resume=run)
    reproduce.run_step(tmp_path, step)
    assert "--resume" not in (tmp_path / "log.txt").read_text()
    run.mkdir()
    (run / "config.json").write_text("{}")
    reproduce.run_step(tmp_path, step)
    assert "--resume" in (tmp_path / "log.txt").read_text()


def test_the_full_plan_begins_with_what_is_fetched(tmp_path, reproduce):
    sizes = reproduce.Sizes(reproduce.BASE, reproduce.ROWS, reproduce.CPU, 24.43, "--device cpu")
    steps = reproduce.plan(tmp_path, sizes, smoke=False)
    assert [s.name for s in steps] == [
        "pull",
        "corpus",
        "pack",
        "tasks",
        "convert",
        "delta",
        "merge",
        "measure",
        "tables",
    ]
    assert steps[0].command[-2:] == ("pull", "smollm2-135m")
