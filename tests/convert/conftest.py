"""A tiny random teacher with the shipped tokenizer, and runs of a few steps on a page of text."""

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
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def config(teacher_folder, text_file):
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
