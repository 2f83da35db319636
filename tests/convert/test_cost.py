"""What a conversion is said to take on machines that are not here: what ranks hold, what the page says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from opensala.convert.config import RECIPES, Execution, halo, sala
from opensala.convert.cost import conversion_parts, fits
from opensala.convert.opening import published_rate
from opensala.convert.teacher import read_config, teacher_config
from opensala.train.plan import plan
from opensala.train.recipes import recipe_named

from ..parallel.group import run_group
from .conftest import small_config
from .ranks import held

PAGE = Path(__file__).parents[2] / "docs" / "conversion.md"
QWEN3_8B = teacher_config(json.loads((Path(__file__).parent / "qwen3_8b.json").read_text()))


def on_gpus(recipe):
    return replace(recipe, dtype="bfloat16", device="cuda", compute="bfloat16")


@pytest.mark.parametrize("world", [1, 2])
def test_states_are_what_a_rank_holds(small_teacher, text_file, tmp_path, world):
    config = replace(small_config(small_teacher, text_file), fix_ends=True, layers=(0, 3), rule="uniform")
    run_group(world, held, config, tmp_path / "run")
    found = json.loads((tmp_path / "run.json").read_text())
    shape = teacher_config(read_config(small_teacher))
    said = {part.name: part.states for part in conversion_parts(shape, config, world)}
    for name in ("alignment", "distillation"):
        assert found[name] == pytest.approx(said[name], rel=0.01), name


def test_the_page_shows_qwen3_8b_on_eight_gpus():
    parts = conversion_parts(QWEN3_8B, on_gpus(sala("x")), 8, Execution(recompute=True))
    assert [part.name for part in parts] == ["calibration", "alignment", "sweep", "distillation"]
    lines = {line.split()[0]: line.split() for line in PAGE.read_text().splitlines() if line.strip()}
    for part in parts:
        assert lines[part.name][-2] == f"{part.memory / 1e9:.1f}" and fits(part, "h100")
    alone = conversion_parts(QWEN3_8B, on_gpus(sala("x")), 1, Execution(recompute=True))[-1]
    assert not fits(alone, "h100") and f"takes {alone.memory / 1e9:.0f} GB" in PAGE.read_text()


def test_more_ranks_hold_less_and_every_recipe_has_its_parts():
    for recipe in RECIPES.values():
        two, eight = (
            conversion_parts(QWEN3_8B, on_gpus(replace(recipe("x"), lightning_nkv=None)), n) for n in (2, 8)
        )
        for a, b in zip(two, eight, strict=True):
            assert a.flops == b.flops and a.memory > b.memory > 0 and 3.5 < a.states / b.states <= 4
    whole = conversion_parts(QWEN3_8B, on_gpus(halo("x")), 8)[-1]
    assert whole.states > conversion_parts(QWEN3_8B, on_gpus(sala("x")), 8)[-1].states


def test_a_training_is_planned_for_a_teacher_of_another_shape(tmp_path):
    (tmp_path / "config.json").write_text((Path(__file__).parent / "qwen3_8b.json").read_text())
    conversion, long = plan(recipe_named("halo"), 8, "h200", 0.4, str(tmp_path))
    assert conversion.memory > 0 and conversion.shape == "8 x 1"
    assert (long.steps, long.sequence, long.tokens) == (500, 16_384, 500 * 128 * 16_384)
    own = plan(recipe_named("minicpm_sala_9b"), 64, "h200", 0.4)[0]
    assert own.memory > 0 and own.steps == 40_000


@pytest.mark.parametrize(("layers", "rate"), [(2, 1e-4), (20, 5e-5), (36, 3e-5)])
def test_the_rate_follows_from_the_size(layers, rate):
    given = json.loads((Path(__file__).parent / "qwen3_8b.json").read_text())
    assert published_rate(teacher_config({**given, "num_hidden_layers": layers})) == rate
