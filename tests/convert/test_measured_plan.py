"""What a run says before it begins: passes that fit, memory, and what the teacher's states take on disk."""

from dataclasses import replace

import pytest
import torch

from opensala.convert import convert
from opensala.convert import plan as plan_module
from opensala.convert import report as report_module
from opensala.convert.align import Alignment
from opensala.convert.config import Execution
from opensala.convert.distill import Distillation, cache_step
from opensala.convert.report import print_cache
from opensala.convert.teacher import load_teacher

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, LENGTH = 8, 384


@pytest.mark.parametrize(("free", "most"), [(1 << 40, 2 * LENGTH), (1, 256)])
def test_a_measured_pass_fits_what_is_free(config, tmp_path, monkeypatch, capsys, free, most):
    """The first pass is a short sequence; no later one is larger than the free memory allows, whatever the
    batch of the run."""
    seen = {"align": [], "distill": []}
    align, distill = Alignment.gradients, Distillation.gradients

    def aligned(self, ids, *rest):
        seen["align"].append(ids.numel())
        return align(self, ids, *rest)

    def distilled(self, step, sample, *rest):
        seen["distill"].append(sample.ids.numel())
        return distill(self, step, sample, *rest)

    monkeypatch.setattr(Alignment, "gradients", aligned)
    monkeypatch.setattr(Distillation, "gradients", distilled)
    for module in (plan_module, report_module):
        monkeypatch.setattr(module, "available_bytes", lambda device: free)
    large = replace(
        config,
        length=LENGTH,
        layers=(0, 7),
        align=replace(config.align, batch=ROWS),
        distill=replace(config.distill, batch=ROWS),
    )
    convert(large, tmp_path / "run", plan_only=True, execution=Execution(micro_tokens=ROWS * LENGTH))
    for passes in seen.values():
        assert passes[0] == 256 and max(passes) == most and len(passes) == 3
    said = capsys.readouterr().err
    assert ("too little: lower --micro-tokens" in said) == (free == 1)


def test_what_the_teachers_states_take_is_said_first(config, teacher_folder, tmp_path, capsys):
    """As much as the files of its steps."""
    teacher = load_teacher(teacher_folder)
    cache_step(teacher, tmp_path, 0, torch.zeros(2, 128, dtype=torch.long))
    [file] = tmp_path.iterdir()
    steps = 10**6
    print_cache(replace(config, distill=replace(config.distill, steps=steps)), teacher, tmp_path)
    said = capsys.readouterr().err
    assert f"{steps * 2 * 128:,} tokens take up to" in said and "GB are free" in said
    taken = float(said.split("up to ")[1].split(" GB")[0].replace(",", ""))
    assert taken == pytest.approx(file.stat().st_size * steps / 1e9, rel=0.01)
