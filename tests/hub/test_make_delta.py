"""What a delta says of the trainings behind it."""

import importlib.util
import json
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_delta.py"


def test_the_phases_of_a_conversion_that_went_on_are_numbered(tmp_path):
    spec = importlib.util.spec_from_file_location("make_delta", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_delta"] = module
    spec.loader.exec_module(module)
    phase = {"batch": 4, "length": 32}
    (tmp_path / "config.json").write_text(json.dumps({"align": phase, "distill": phase}))
    lines = [{"phase": "align", "step": 4}, {"phase": "distill", "step": 0}, {"phase": "distill", "step": 9}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = module.trained(tmp_path)
    assert found == {
        "align": {"steps": 5, "length": 32, "tokens": 640},
        "distill": {"steps": 10, "length": 32, "tokens": 1280},
    }
    later = {"distill": {"steps": 1}}
    assert module.added(found, later) == {**found, "distill 2": {"steps": 1}}
    assert module.added(module.added(found, later), later)["distill 3"] == {"steps": 1}
    assert module.added({}, later) == later
