"""Train the small model that ships in the package, on nothing but a Python installation.

    python scripts/build_tokenizer.py runs/small
    python scripts/train_small.py runs/small [--threads 2]
    python scripts/train_small.py runs/written --start runs/small/model --texts corpus/train.jsonl

Sequences are documents with hidden facts followed by questions and answers (opensala.data.retrieval). The
stages go from short dense sequences to 8,192 tokens with block selection on. With `--start` the weights of a
model go on learning: values as people write them, and questions whose fact is absent, among the old tasks;
`--texts` (JSON lines of `text`, docs/corpus.md) is the prose that most of these facts are hidden in, the
documentation of the Python installation where it is not given.
Checkpoints are written every few minutes and the run resumes from the last one by itself, with the same data
order.
"""

import json
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer

from opensala.data.conversations import Texts
from opensala.data.haystack import Haystack
from opensala.data.retrieval import Sequence, training_sequence
from opensala.data.text import documents
from opensala.data.written import ABSENT
from opensala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from opensala.model.attention import SparseMixer
from opensala.train.loss import selection_alignment_loss, weighted_next_token_loss

SPARSE_LAYERS = (2, 6, 10)
LAYERS = 12
TEXT_WEIGHT = 0.1  # weight of ordinary text beside answers
ALIGNED_QUERIES = 48  # a step and layer
SAVE_SECONDS = 120


@dataclass(frozen=True)
class Stage:
    """`steps` optimizer steps on `batch` sequences of `length` tokens with up to `facts` facts each; what
    `written` and `absent` are, `opensala.data.retrieval.mixed_facts` says; `prose` is the share of sequences
    whose facts are hidden in running text."""

    steps: int
    length: int
    batch: int
    facts: int
    mode: str = "dense"
    alignment: float = 0.0
    written: float = 0.0
    absent: float = 0.0
    prose: float = 0.0

    @property
    def least_facts(self) -> int:
        """A text that is asked about absent facts may hold a single one."""
        return 1 if self.absent else max(1, self.facts // 2)


STAGES: tuple[Stage, ...] = (
    Stage(1200, 256, 16, 4),
    Stage(700, 512, 8, 8, alignment=0.1),
    Stage(800, 1024, 4, 12, alignment=0.3),
    Stage(1100, 2048, 2, 20, alignment=0.3),
    Stage(350, 4096, 1, 32, "sparse", alignment=0.3),
    Stage(60, 8192, 1, 48, "sparse", alignment=0.3),
    Stage(320, 2048, 2, 16, alignment=0.3),
    Stage(140, 4096, 1, 24, "sparse", alignment=0.3),
)


def _mixed(steps: int, length: int, batch: int, facts: int, mode: str = "dense") -> Stage:
    return Stage(steps, length, batch, facts, mode, 0.3, written=0.6, absent=0.22, prose=0.75)


# With --start: learnt in short texts first, then held in texts of all lengths by turns. At the end there are
# longer ones, as what is found in a short text is more readily denied in a long one, and more old tasks.
_ROUND = (
    _mixed(12, 512, 8, 6),
    _mixed(12, 1024, 4, 12),
    _mixed(10, 2048, 2, 20),
    _mixed(16, 4096, 1, 32, "sparse"),
    _mixed(3, 8192, 1, 44, "sparse"),
)
_LAST_ROUND = tuple(
    replace(stage, written=0.55, absent=0.18, prose=0.6)
    for stage in (
        _mixed(4, 512, 8, 6),
        _mixed(8, 1024, 4, 12),
        _mixed(8, 2048, 2, 20),
        _mixed(24, 4096, 1, 28, "sparse"),
        _mixed(6, 8192, 1, 44, "sparse"),
    )
)
WRITTEN_STAGES: tuple[Stage, ...] = (_mixed(500, 512, 8, 6), *_ROUND * 23, *_LAST_ROUND * 17)
PEAK_LR, WRITTEN_PEAK_LR, LAST_LR, WARMUP = 3e-3, 1.5e-3, 1e-4, 100


def model_config(vocab_size: int) -> MiniCPMSALAConfig:
    return MiniCPMSALAConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        lightning_nh=4,
        lightning_nkv=4,
        lightning_head_dim=32,
        mixer_types=["minicpm4" if i in SPARSE_LAYERS else "lightning-attn" for i in range(LAYERS)],
        sparse_config={
            "kernel_size": 32,
            "kernel_stride": 16,
            "block_size": 64,
            "init_blocks": 1,
            "window_size": 512,
            "topk": 16,
            "dense_len": 4096,
        },
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=128,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=2,
        max_position_embeddings=1 << 20,
        initializer_range=0.05,
    )


def new_model(vocab_size: int, seed: int) -> MiniCPMSALAForCausalLM:
    torch.manual_seed(seed)
    model = MiniCPMSALAForCausalLM(model_config(vocab_size))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def learning_rate(step: int, total: int, peak: float = PEAK_LR) -> float:
    """Linear warm-up, constant to 60% of the run, then linear decay."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    left = min(1.0, (total - step) / (0.4 * total))
    return LAST_LR + (peak - LAST_LR) * left


def read_texts(file: Path | None) -> Texts:
    """Prose of a file of JSON lines, or of the Python installation's documentation."""
    if file is None:
        return Texts(list(documents("prose")))
    with file.open(encoding="utf-8") as lines:
        return Texts([json.loads(line)["text"] for line in lines])


def make_batch(
    tokenizer: Any, haystack: Haystack, texts: Texts | None, stage: Stage, seed: int
) -> list[Sequence]:
    rng = random.Random(seed)
    sequences: list[Sequence] = []
    while len(sequences) < stage.batch:
        try:
            count = rng.randrange(stage.least_facts, stage.facts + 1)
            prose = texts if rng.random() < stage.prose else None
            sequences.append(
                training_sequence(
                    tokenizer, haystack, rng, stage.length, count, stage.written, stage.absent, prose
                )
            )
        except ValueError:  # more facts than fit: draw again
            continue
    return sequences


class Recorder:
    """Keeps the input of each sparse mixer during a forward pass."""

    def __init__(self, model: MiniCPMSALAForCausalLM) -> None:
        self.inputs: list[tuple[SparseMixer, Tensor]] = []
        for module in model.modules():
            if isinstance(module, SparseMixer):
                module.register_forward_pre_hook(lambda m, args: self.inputs.append((m, args[0])))


def train_step(
    model: MiniCPMSALAForCausalLM,
    recorder: Recorder,
    stage: Stage,
    batch: list[Sequence],
    seed: int,
    denial: int,
    half: bool = False,
) -> dict[str, float]:
    """One backward pass; `half` makes the products in bfloat16, `denial` is as in `answer_shares`."""
    ids = torch.stack([torch.from_numpy(s.ids).long() for s in batch])
    answer = torch.stack([torch.from_numpy(s.answer) for s in batch])
    recorder.inputs.clear()
    model.set_attention_mode(stage.mode)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(input_ids=ids, use_cache=False).logits
        loss = weighted_next_token_loss(logits, ids, answer + TEXT_WEIGHT * ~answer)
        record = {"loss": loss.item()}
        if stage.alignment:
            asked = answer[:, 1:].nonzero()
            generator = torch.Generator().manual_seed(seed)
            asked = asked[torch.randperm(len(asked), generator=generator)[:ALIGNED_QUERIES]]
            documents = answer.int().argmax(1) - 8  # the first answer; a bit of its question does no harm
            terms = [selection_alignment_loss(mixer, x, asked, documents) for mixer, x in recorder.inputs]
            alignment = torch.stack(terms).mean()
            loss = loss + stage.alignment * alignment
            record["alignment"] = alignment.item()
    loss.backward()
    record["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    # Only of answers: the likeliest of 2,048 bfloat16 numbers takes a tenth of a step for all tokens.
    predicted = torch.zeros_like(ids[:, 1:])
    predicted[answer[:, 1:]] = logits.detach()[:, :-1][answer[:, 1:]].float().argmax(-1)
    record["answer_accuracy"] = (predicted == ids[:, 1:])[answer[:, 1:]].float().mean().item()
    return record | answer_shares(predicted.numpy(), batch, denial)


def answer_shares(predicted: np.ndarray, batch: list[Sequence], denial: int) -> dict[str, float]:
    """Shares of whole answers that are right, by what was asked for, and of stated facts that are denied.

    Args:
        predicted: `[B, T - 1]`, the likeliest token after each, looked at in answers only; denial:
            the first token of ABSENT.
    """
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for row, sequence in zip(predicted, batch, strict=True):
        edges = np.flatnonzero(np.diff(sequence.answer.astype(int), append=0)) + 1
        for a, b, fact in zip(edges[::2], edges[1::2], sequence.asked, strict=True):
            right = bool((row[a - 1 : b - 1] == sequence.ids[a:b]).all())
            kind = "absent" if fact.answer == ABSENT else "written" if fact.kind else "plain"
            outcomes[kind].append(right)
            if kind != "absent":
                outcomes["denied"].append(bool(row[a - 1] == denial))
    return {kind: sum(found) / len(found) for kind, found in sorted(outcomes.items())}


def main(
    directory: Annotated[Path, typer.Argument(help="run folder; must hold the tokenizer")],
    threads: Annotated[int, typer.Option(min=1)] = 2,
    seed: int = 0,
    limit: Annotated[int, typer.Option(help="stop after so many steps in all (0: run to the end)")] = 0,
    start: Annotated[
        Path | None, typer.Option(help="model whose weights and tokenizer to begin with")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="with --start: JSON lines of prose to hide facts in")
    ] = None,
    bfloat16: Annotated[bool, typer.Option(help="products in bfloat16; weights stay in float32")] = False,
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    tokenizer = AutoTokenizer.from_pretrained(start or directory)
    haystack, prose = Haystack(tokenizer), read_texts(texts)
    stages, peak, model = STAGES, PEAK_LR, new_model(len(tokenizer), seed)
    if start is not None:
        stages, peak = WRITTEN_STAGES, WRITTEN_PEAK_LR
        model = MiniCPMSALAForCausalLM.from_pretrained(start, dtype=torch.float32)
    directory.mkdir(parents=True, exist_ok=True)
    denial = tokenizer(" " + ABSENT, add_special_tokens=False)["input_ids"][0]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    state_file, step = directory / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    recorder = Recorder(model)
    plan = [stage for stage in stages for _ in range(stage.steps)]
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count / 1e6:.2f}M parameters, {sum(s.length * s.batch for s in plan) / 1e6:.1f}M tokens, "
        f"{len(plan)} steps, "
        f"starting at {step}",
        flush=True,
    )

    def save() -> None:
        temporary = state_file.with_suffix(".tmp")
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary
        )
        temporary.replace(state_file)

    saved = begun = time.monotonic()
    with open(directory / "metrics.jsonl", "a") as metrics:
        while step < (limit or len(plan)):
            stage = plan[step]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(plan), peak)
            batch = make_batch(tokenizer, haystack, prose, stage, seed * 1_000_003 + step)
            optimizer.zero_grad(set_to_none=True)
            record = train_step(model, recorder, stage, batch, step, denial, bfloat16)
            if not all(math.isfinite(v) for v in record.values()):
                raise SystemExit(f"step {step}: {record} is not finite; the last checkpoint is {state_file}")
            optimizer.step()
            step += 1
            record |= {"step": step, "length": stage.length, "seconds": round(time.monotonic() - begun, 1)}
            metrics.write(json.dumps(record) + "\n")
            if step % 20 == 0:
                metrics.flush()
                print(" ".join(f"{k}={v:.4g}" for k, v in record.items()), flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
    save()
    model.set_attention_mode("auto")
    model.half().save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    print(f"saved {directory / 'model'}")


if __name__ == "__main__":
    typer.run(main)
