"""The end of a run: the hybrid as a checkpoint that everything else loads."""

import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..model import MiniCPMSALAForCausalLM
from ..parallel import whole_state
from ..runs import read_json, write_errors
from .distilling import measure_result, write_outcome
from .lora import merged_state
from .opening import tokenizer_of
from .outcome import load_outcome
from .teacher import load_teacher
from .work import Work


def export(work: Work, student: MiniCPMSALAForCausalLM, kept: list[int]) -> None:
    """Measure the hybrid, and write it in the teacher's dtype, with tokenizer and generation settings."""
    long = work.config.long
    distilled = work.config.distill.steps or (long is not None and long.steps)
    measure_result(work, "distilled" if distilled else "aligned", student)
    student.set_attention_mode("auto")
    if distilled:
        write_outcome(work, student)
    weights = merged_state(whole_state(student))
    student.generation_config = work.teacher.generation_config
    work.files.do(lambda: _write(work, student, weights))
    if not work.quiet:
        for name, score in read_json(work.path / "result.json").items():
            print(f"{name}: recall {score['recall']:.3f}, held-out nll {score['nll']:.4f}", file=sys.stderr)
        print(f"kept layers {kept}; saved {work.path / 'model'}", file=sys.stderr)


def _write(work: Work, student: MiniCPMSALAForCausalLM, weights: dict[str, Tensor]) -> None:
    partial = work.path / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with write_errors(work.path, "go on with --resume"):  # here, so that all ranks learn of it
            save_weights(partial, student, weights, work.teacher.dtype)
            work.tokenizer.save_pretrained(partial)
            partial.replace(work.path / "model")
    except ValueError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is not kept full
        raise


def save_weights(
    folder: Path, model: MiniCPMSALAForCausalLM, weights: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Write a checkpoint of a model whose own weights may be shards, with these whole ones instead."""
    model.config.dtype = dtype
    with torch.device("meta"):
        empty = MiniCPMSALAForCausalLM(model.config).to(dtype)  # what the configuration says is its own
    empty.generation_config = model.generation_config
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {name: x.to(dtype).contiguous() for name, x in weights.items() if name not in tied}
    empty.save_pretrained(folder, state_dict=state)


def merge_outcome(teacher: str, outcome: str | Path, output: str | Path) -> Path:
    """Write the hybrid of a teacher and the outcome of its conversion as a checkpoint; returns its folder.

    Raises:
        ValueError: what `load_teacher` and `load_outcome` refuse, or a folder that is not empty.
    """
    target = Path(output)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: give a new folder")
    source, tokenizer = load_teacher(teacher), tokenizer_of(teacher)
    with write_errors(target):
        student = load_outcome(source, outcome)
        student.generation_config = source.generation_config
        student.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target
