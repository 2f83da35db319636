"""The first phase of a run: mixers calibrated, aligned, calibrated once more, or taken over from another run.

What it ends with is the state `aligned`, which everything behind it begins from.
"""

import logging
import shutil
from pathlib import Path

from ..model.flops import forward_flops
from ..runs import read_json
from .align import Alignment
from .calibrate import Calibration, calibrate
from .opening import check_texts
from .report import plot_alignment
from .states import States
from .work import Work

logger = logging.getLogger("opensala")
ALIGNED = "aligned"
_REUSED = (
    "teacher",
    "align",
    "length",
    "lightning_nkv",
    "calibrate",
    "calibrate_tokens",
    "clip",
    "compute",
    "data",
    "tokens",
    "task_share",
    "seed",
    "dtype",
)  # what aligned mixers depend on
_TAKEN = ("metrics.jsonl", "scores.json", "calibration.json", "calibration_aligned.json", "compute.json")


def align(work: Work) -> None:
    """Leave the mixers of `work` aligned and frozen, from the last saved state on."""
    config, states = work.config, work.files.states
    if work.files.note(ALIGNED) is None:
        if config.reuse:
            work.files.do(lambda: _take_over(work, Path(config.reuse or "")))
        else:
            _align(work)
    states.load(ALIGNED, work.mixers, None)
    records = work.files.metrics("align")
    if records:
        plot_alignment(records, work.path / "plots" / "alignment.png")
    work.mixers.requires_grad_(False)


def _align(work: Work) -> None:
    config, states = work.config, work.files.states
    if work.files.note("align") is None:
        calibrate_mixers(work, "calibration")
    alignment = Alignment(
        work.teacher, work.mixers, config.align, work.compute, config.clip, ranks=work.ranks
    )
    if config.align.steps:
        flops = forward_flops(work.teacher.config, config.length_of("align"), False)
        flops += 6 * sum(p.numel() for p in work.mixers.parameters())
        work.loop("align", work.mixers, flops).run(alignment)
        if config.calibrate == "ridge":  # what it does to the features moved the best projection too
            calibrate_mixers(work, "calibration_aligned")
    note = work.files.note("align")
    states.save(ALIGNED, note["step"] if note else 0, work.mixers, None, {})


def calibrate_mixers(work: Work, name: str) -> Calibration:
    """Fit the mixers' output projections, and note what that did."""
    config = work.config
    length = config.length_of("align")
    rows = work.execution.rows(config.align.batch, length)
    inner = work.teacher.config.num_attention_heads * (work.teacher.config.head_dim or 0)
    tokens = max(config.calibrate_tokens, 8 * inner)  # fewer would fit the sample, not the layer
    count = max(2, -(-tokens // (rows * length)))
    first = config.align.steps + (0 if name == "calibration" else count)  # sequences of their own
    batches = (work.batches.train("align", first + n, rows).to(work.device).ids for n in range(count))
    found = calibrate(work.teacher, work.mixers, batches, config.calibrate, work.compute, work.ranks)
    work.files.write(f"{name}.json", found._asdict())
    logger.info("%s: error %.3f -> %.3f", name, *(sum(x) / len(x) for x in found))
    return found


def _take_over(work: Work, other: Path) -> None:
    """Take aligned mixers and scores from another run, if they are what this one would have computed."""
    known, mine = read_json(other / "config.json"), work.config.as_dict()
    states = States(other)
    if known is None or states.last("align") is states.last(ALIGNED) is None:
        raise ValueError(f"reuse: {other} holds no aligned run")
    different = [key for key in _REUSED if known[key] != mine[key]]
    if different:
        raise ValueError(f"reuse: {other} was aligned with another {', '.join(different)}")
    check_texts(work.config, work.batches.fingerprint, other)
    if states.last(ALIGNED) is None:
        note = states.note("align") or {}
        raise ValueError(
            f"reuse: {other} was aligned for {note.get('step', 0)} of {work.config.align.steps} steps: "
            "resume it first"
        )
    for name in _TAKEN:
        if (other / name).exists() and (name != "scores.json" or known["probes"] == mine["probes"]):
            shutil.copyfile(other / name, work.path / name)
    for name in ("distill", "long"):
        work.files.forget_after(name, 0)
    work.files.states.take_over(states, ALIGNED)
