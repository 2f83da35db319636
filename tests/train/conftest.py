"""A recipe with every stage of `tiny` for a model of a few thousand parameters, on text files made here."""

import json
from dataclasses import replace

import pytest

from opensala.convert.config import ConvertConfig, Phase, Probes
from opensala.train.recipe import Halo, Recipe, Source
from opensala.train.recipes import tiny
from opensala.train.schedule import Schedule

LINES = [
    f"Line {n}: the {n % 7}th wagon of the {n % 11}th train carries {n * 37 % 1000} barrels to town {n % 13}."
    for n in range(400)
]
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "lightning_nh": 2,
    "lightning_nkv": 2,
    "lightning_head_dim": 16,
    "dim_model_base": 16,
    "mixer_types": ["minicpm4", "lightning-attn", "minicpm4"],
    "sparse_config": {
        "kernel_size": 8,
        "kernel_stride": 4,
        "block_size": 16,
        "init_blocks": 1,
        "window_size": 32,
        "topk": 4,
        "dense_len": 64,
    },
}


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    pass


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with text.jsonl (documents of 1 to 40 lines), chat.jsonl (conversations) and page.txt."""
    folder = tmp_path_factory.mktemp("corpus")
    rows, n = [], 0
    while n < len(LINES):
        size = 1 + n * 7 % 40
        rows.append({"text": "\n".join(LINES[n : n + size]), "source": "trains"})
        n += size
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus {n + 1}?"},
                {"role": "assistant", "content": str(2 * n + 1)},
                {"role": "user", "content": "And plus one?"},
                {"role": "assistant", "content": str(2 * n + 2)},
            ]
        }
        for n in range(60)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "page.txt").write_text("\n".join(LINES))
    return folder


def mini(corpus, **changes) -> Recipe:
    """The stages of `tiny` (one of each pair that differs in length alone), four steps each, a checkpoint
    after every second."""
    text, chat = (
        Source("text", 1.0, str(corpus / "text.jsonl")),
        Source("chat", 1.0, str(corpus / "chat.jsonl")),
    )
    full = tiny()
    stages = []
    for stage in full.stages:
        if stage.name in ("long_decay_2k", "sft_2k"):
            continue
        if isinstance(stage, Halo):
            stages.append(
                Halo(
                    ConvertConfig(
                        "",
                        compute="float32",
                        calibrate_tokens=256,
                        keep=2,
                        length=128,
                        align=Phase(3, 2, 3e-3, 1e-3, warmup=1),
                        distill=Phase(3, 2, 1e-3, 1e-4, warmup=1),
                        probes=Probes(128, 2, 2),
                        data=(str(corpus / "page.txt"),),
                        task_share=0.0,
                        save_every=2,
                    )
                )
            )
        else:
            stages.append(
                replace(
                    stage,
                    sequence=128,
                    tokens=4 * 256,
                    batch_tokens=256,
                    mixture=(chat,) if stage.chat else (text,),
                    schedule=Schedule("linear", 2e-3, 1e-3, warmup=1),
                )
            )
    return replace(
        full,
        model={**full.model, **MODEL},
        stages=tuple(stages),
        micro_tokens=128,
        recompute=True,
        save_every=2,
        probe_tokens=256,
        **changes,
    )
