"""The figures of speed: that README and docs state what the registry says, that no row of their tables is
left out, and that the command which measures them again does what it promises."""

import csv
import dataclasses
import importlib
import json
import subprocess
import sys
import time

import pytest

from opensala.bench.figures import Measurement, Options, plan, read_registry
from opensala.bench.figures.registry import ROOT, Registry, Term, _figure, speed_rows
from opensala.bench.figures.restate import restate, written

figures_run = importlib.import_module("opensala.bench.figures.run")  # its name is a function's there
run = figures_run.run
SCRIPT = ROOT / "scripts" / "reproduce_speed.py"
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
# The log tells what was measured when; the page of the GPU is made from rows by `make gpu`.
COVERED = [page for page in PAGES if page not in ("docs/log.md", "docs/gpu.md")]
HOW = (
    "change benchmarks/figures.toml with the document: a [[line]] for a figure that a step measures, an "
    "[[elsewhere]] with the reason for another"
)


@pytest.fixture(scope="module")
def registry():
    return read_registry()


def test_documents_state_what_is_registered(registry):
    assert not registry.missing(), HOW


@pytest.mark.parametrize("document", COVERED)
def test_every_row_of_speed_is_registered(registry, document):
    assert not registry.uncovered(document), HOW


def test_every_figure_has_a_step_and_every_step_a_figure(registry, tmp_path):
    names = {step.name for step in plan(tmp_path)}
    assert {figure.step for figure in registry.figures} == names
    assert len(names) == len(plan(tmp_path))


def test_what_drifts_is_found(registry, tmp_path):
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        (tmp_path / page).write_text((ROOT / page).read_text())
    page = tmp_path / "docs" / "speed.md"
    figure = next(f for f in registry.figures if f.document == "docs/speed.md" and f.text.startswith("| "))
    row = figure.text
    other = row.replace(figure.stated, f"9{figure.stated}")
    page.write_text(page.read_text().replace(row, other))
    assert f"docs/speed.md has no {row!r}" in registry.missing(tmp_path)
    assert other in [found[: len(other)] for found in registry.uncovered("docs/speed.md", tmp_path)]
    wrong = dataclasses.replace(registry.figures[0], stated="8.5000")
    assert "is not in" in Registry((wrong,), ()).missing()[0]


def test_rows_that_speak_of_time():
    page = "\n".join(
        [
            "| what | measured |",
            "|---|---|",
            "| reading | 3.1 s |",
            "| reading's share | 3.1 |",
            "| rate | 400 tokens/s |",
            "",
            "| tokens | first token |",
            "|---|---:|",
            "| 4K | 12 |",
            "| 8K | not measured |",
        ]
    )
    assert [row for _, row in speed_rows(page)] == [
        "| reading | 3.1 s |",
        "| rate | 400 tokens/s |",
        "| 4K | 12 |",
    ]
    assert len(list(speed_rows(page, every=True))) == 4


def test_a_figure_is_found_in_rows():
    rows = [
        {"a": "x", "n": 4, "v": 3.0},
        {"a": "y", "n": 4, "v": 6.0},
        {"a": "y", "n": 4, "v": 7.0},
        {"a": "z"},
    ]
    figure = _figure("d", "t", "s", "1,234.5 = v / 1000 where a=x; n=4 // v where a=y")
    assert figure.number == 1234.5 and figure.value(rows) == pytest.approx(0.003 / 7)
    assert Term("v", (("a", "z"),)).value(rows) is None and Term("v", (("n", "5"),)).value(rows) is None
    with pytest.raises(ValueError, match="NUMBER = FIELD"):
        _figure("d", "t", "s", "fast")


REGISTRY = """# words

[[line]]
document = "a.md"
text = "| it takes | 2.0 s | 40 ms | 2.0 s |"
step = "one"
figures = [
  "2.0 = v where n=1",
  "40 = v * 1000 where n=2",
  "2.0 = v where n=3",
]

[[line]]
document = "a.md"
text = "in 7 s"
step = "one"
figures = [
  "7 = v where n=1",
]

[[line]]
document = "a.md"
text = "reads 1,035 MiB in 9 s"
step = "two"
figures = [
  "9 = v where n=1",
]

[[line]]
document = "a.md"
text = "reads 1,035 MiB in 9 s"
step = "one"
figures = [
  "1,035 = v * 1000 where n=3",
]
"""
PAGE = "# A\n\n| it takes | 2.0 s | 40 ms | 2.0 s |\nin 7 s, and in 7 s; it reads 1,035 MiB in 9 s.\n"


def test_what_was_measured_is_put_into_documents_and_registry(tmp_path):
    (tmp_path / "a.md").write_text(PAGE)
    file = tmp_path / "figures.toml"
    file.write_text(REGISTRY)
    rows = [{"n": 1, "v": 2.5}, {"n": 2, "v": 0.0512}, {"n": 3, "v": 12.34}]
    changed, left = restate({"one": rows}, tmp_path, file)
    assert changed == 4 and left == ["a.md has 'in 7 s' 2 times"]
    page = (tmp_path / "a.md").read_text()
    assert "| it takes | 2.50 s | 51 ms | 12.3 s |" in page and "in 7 s, and in 7 s" in page
    assert "reads 12,340 MiB in 9 s" in page
    assert not read_registry(file).missing(tmp_path)
    assert [f.stated for f in read_registry(file).figures[:3]] == ["2.50", "51", "12.3"]
    assert restate({"one": rows}, tmp_path, file)[0] == 0
    assert "one has no row for 12.3" in restate({"one": rows[:2]}, tmp_path, file)[1][0]


@pytest.mark.parametrize("value", [1270.6, 6.08, 0.0708, 99.65, 9.996, 38.02, 2968.0, 104.4])
@pytest.mark.parametrize("like", ["516", "6.1", "11", "1,035", "0.12"])
def test_a_number_written_again_stays(value, like):
    once = written(value, like)
    assert written(value, once) == once


@pytest.mark.parametrize(
    ("value", "like", "wanted"),
    [(0.14567, "0.28", "0.146"), (99.65, "62", "100"), (1392.4, "1,035", "1,392"), (6.051, "5.75", "6.05")]
    + [
        (38.02, "40", "38"),
        (0, "0.1", "0"),
        (2968, "67", "2,970"),
        (9.996, "1.25", "10.0"),
        (0.0708, "0.12", "0.0708"),
    ],
)
def test_numbers_are_written_as_before(value, like, wanted):
    assert written(value, like) == wanted


def steps_of(*codes, **options):
    """Steps of Python code; `limit` seconds where a number comes with the code."""
    found = []
    for name, code in codes:
        command = (sys.executable, "-c", code)
        found.append(
            Measurement(name, command, command, options.get("minutes", 1), needs=options.get("needs", ()))
        )
    return found


ROWS = "import json; print('noise'); print(json.dumps({'rows': [{'what': 'x', 'v': VALUE}], 'targets': []}))"


@pytest.fixture
def small(monkeypatch):
    """A registry of two figures, and whatever steps a test puts in the plan's place."""
    figures = (
        _figure("docs/a.md", "| it takes | 2.0 s |", "good", "2.0 = v where what=x"),
        _figure("docs/a.md", "| it takes longer | 3.0 s |", "bad", "3.0 = v where what=x"),
    )
    made = Registry(figures, ())

    def put(steps, folder, **options):
        monkeypatch.setattr(figures_run, "plan", lambda *_: steps)
        said = []
        well = run(Options(folder, **options), said.append, made)
        with open(folder / "figures.csv", newline="") as file:
            return well, said, list(csv.DictReader(file))

    return put


def test_what_is_done_is_kept_and_what_fails_is_recorded(small, tmp_path):
    steps = steps_of(
        ("bad", "import sys; print('why', file=sys.stderr); sys.exit(3)"),
        ("good", ROWS.replace("VALUE", "2.5")),
    )
    well, said, lines = small(steps, tmp_path)
    assert not well and "failed: exit code 3, why" in said[1] and "failed: bad" in said[-1]
    assert [(x["step"], x["measured"], x["over_stated"]) for x in lines] == [
        ("good", "2.5", "1.25"),
        ("bad", "", ""),
    ]
    assert lines[0]["stated"] == "2.0" and lines[1]["status"].startswith("failed: exit code 3")
    record = json.loads((tmp_path / "done" / "good.json").read_text())
    assert record["rows"][-1]["what"] == "process" and not (tmp_path / "done" / "bad.json").exists()
    mended = steps_of(("bad", ROWS.replace("VALUE", "3")), ("good", ROWS.replace("VALUE", "2.5")))
    well, said, lines = small(mended, tmp_path, only=("bad",))
    assert (
        well and [x["measured"] for x in lines] == ["2.5", "3.0"] and lines[0]["status"] == "measured before"
    )
    well, said, _ = small(mended, tmp_path)
    assert said[1] == said[3] == "  measured before"
    well, said, _ = small(mended, tmp_path, again=True)
    assert said[1] == said[3] == "  measured"
    with pytest.raises(ValueError, match="good was done in .* by another command"):
        small(steps_of(("good", "1"), ("bad", "1")), tmp_path, only=("good",))
    with pytest.raises(ValueError, match="--only must name some of bad, good, got 'goood'"):
        small(mended, tmp_path, only=("goood",))
    assert "| docs/a.md | it takes 2.0 s | 2.0 | 2.5 | 1.25 | good |" in (tmp_path / "figures.md").read_text()


def test_a_step_beyond_its_limit_is_ended(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Measurement, "limit", 0.5)
    start = time.monotonic()
    well, said, _ = small(steps_of(("good", "import time; time.sleep(60)"), ("bad", "1")), tmp_path)
    assert not well and said[1].startswith("  failed: ended after") and time.monotonic() - start < 20


def test_what_is_lacking_is_said(small, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENSALA_HOME", str(tmp_path))
    steps = [*steps_of(("good", "1"), needs=("hybrid",)), *steps_of(("bad", "1"), needs=("gguf",))]
    well, said, lines = small(steps, tmp_path)
    assert well and said[1] == (
        "  left out: smollm2-135m-sala is not on this machine: opensala pull smollm2-135m-sala"
    )
    assert "--gguf SmolLM2" in said[3] and lines[0]["status"].startswith("left out")


def test_the_list(registry, tmp_path):
    lines = figures_run.listing(Options(tmp_path, ("ops", "llama-contexts")), registry).splitlines()
    assert lines[0].startswith("ops: 22 minutes, ") and "docs/small-model.md, docs/speed.md" in lines[0]
    assert lines[1].startswith("  python -m opensala bench ops --device cpu")
    assert lines[2].startswith("llama-contexts: 4 minutes, ") and "would be left out: " in lines[4]


SMOKED = "steps,parts-135m,train"


def test_steps_at_tiny_sizes_have_the_columns_that_are_registered(registry, tmp_path):
    """Some of the steps, for the time they take; the columns of all were compared by hand."""
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "run", "--smoke", "--threads", "1", "--only", SMOKED],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "its figures mean nothing" in done.stdout
    for step in SMOKED.split(","):
        rows = json.loads((tmp_path / "run" / "done" / f"{step}.json").read_text())["rows"]
        for figure in registry.of_step(step):
            for term in filter(None, (figure.over, figure.under)):
                keys = {term.field, *(key for key, _ in term.where)}
                assert any(keys <= set(row) for row in rows), (step, keys)
