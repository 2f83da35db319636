"""A tiny random teacher with the shipped tokenizer, and runs of a few steps on a page of text."""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from opensala.convert.config import ConvertConfig, Phase, Probes
from opensala.engine import shipped_model

from .test_transfer import make_teacher

TEXT = "\n".join(
    f"Line {n}: the {n % 7}th wagon of the {n % 11}th train carries {n * 37 % 1000} barrels."
    for n in range(900)
)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """Qwen3, 8 layers, hidden 40, the shipped vocabulary."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    make_teacher(folder, vocab_size=len(tokenizer), num_hidden_layers=8)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory):
    """The same with 4 layers, for runs of many processes."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    make_teacher(folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder


def small_config(folder, text):
    """Three sequences a step, which neither two nor four processes share evenly; three documents to probe."""
    return replace(
        new_config(folder, text),
        align=Phase(3, 3, 3e-3, 1e-4, warmup=1),
        distill=Phase(3, 3, 1e-3, 1e-4, warmup=1, answer_weight=2.0, cross_entropy=0.5),
        probes=Probes(128, 3, 2),
        task_share=0.5,
        save_every=2,
        validate_every=3,
        rule="kl",
        keep=2,
        fix_ends=False,
        lora_rank=4,
        calibrate_tokens=256,
        cache_teacher=True,
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def config(teacher_folder, text_file):
    return new_config(teacher_folder, text_file)


def new_config(teacher_folder, text_file):
    """8 steps of each phase, a state saved after every third."""
    return ConvertConfig(
        str(teacher_folder),
        length=128,
        align=Phase(8, 2, 3e-3, 1e-4, warmup=2),
        distill=Phase(8, 2, 1e-3, 1e-4, warmup=2),
        probes=Probes(128, 4, 2),
        data=(str(text_file),),
        save_every=3,
        compute="float32",
        calibrate_tokens=1024,
    )
