"""Train a small dense Transformer (transformers' own Qwen3 class) to convert, on nothing but a Python
installation.

    python scripts/train_teacher.py runs/teacher [--threads 1]

The same texts and tasks as the shipped model's (opensala.data), but for the texts held out to measure with,
and with
one addition: the first stage mixes in sequences that repeat a random passage, which brings up copying early.
Writes a checkpoint every few minutes, resumes from it by itself with the same data order, and logs how many
answers are right.
"""

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from opensala.data.haystack import Haystack
from opensala.data.retrieval import Sequence, training_sequence
from opensala.engine import shipped_model
from opensala.train.loss import weighted_next_token_loss

TEXT_WEIGHT = 0.2  # weight of ordinary text beside answers
SAVE_SECONDS = 150


@dataclass(frozen=True)
class Stage:
    """`steps` steps on `batch` sequences of `length` tokens with up to `facts` facts, a share of them
    `copies` instead."""

    steps: int
    length: int
    batch: int
    facts: int
    copies: float = 0.0


STAGES = (
    Stage(150, 256, 8, 4, copies=0.25),
    Stage(400, 256, 8, 5),
    Stage(450, 512, 4, 9),
    Stage(150, 1024, 2, 18),
)
LOOK_BACK, LOOK_UP = 1, (4, 7)  # layers with heads that start as previous-token heads, and as matching ones
PEAK_LR, LAST_LR, WARMUP = 2e-3, 1e-4, 40
EMBEDDING_LR = 8.0  # times the rate of the rest


def new_teacher(vocab_size: int, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            attention_bias=True,
            tie_word_embeddings=False,
            max_position_embeddings=4096,
            rope_theta=1e6,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            attn_implementation="sdpa",
        )
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            shrink = 24**-0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
            torch.nn.init.normal_(module.weight, std=shrink * module.in_features**-0.5)
    look_back(model)
    # With the usual 0.02 the layers' outputs drown the tokens (docs/log.md).
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    model.lm_head.weight.data.copy_(0.1 * model.model.embed_tokens.weight.data)
    return model


@torch.no_grad()
def look_back(model: Qwen3ForCausalLM) -> None:
    """Start two heads of an early layer with biases that make them attend one or two tokens back, and heads
    further up to match.

    Copying needs such heads, and rotary positions alone are slow to give them: without, 2.9M tokens brought
    none (docs/log.md).
    """
    back = model.model.layers[LOOK_BACK].self_attn
    frequency = 1e6 ** (-torch.arange(4) / 32)
    back.k_proj.weight[:64] *= 0.1
    back.k_proj.bias[:4] = 6.0
    back.o_proj.weight[:, :64] = 0.6 * torch.nn.init.orthogonal_(torch.empty(128, 64))
    for head, offset in enumerate((1, 2)):
        start = 64 * head
        back.q_proj.weight[start : start + 64] *= 0.1
        back.q_proj.bias[start : start + 4] = 6.0 * torch.cos(offset * frequency)
        back.q_proj.bias[start + 32 : start + 36] = -6.0 * torch.sin(offset * frequency)
    for norm in (back.q_norm, back.k_norm):
        norm.weight[:4] = norm.weight[32:36] = 2.0
    for layer in LOOK_UP:
        mixer = model.model.layers[layer].self_attn
        mixer.k_proj.weight[:64] = back.o_proj.weight[:, :64].T
        mixer.q_proj.weight[:64] = back.v_proj.weight[:64]
        mixer.q_proj.weight[64:128] = back.v_proj.weight[:64]
        mixer.q_norm.weight[:] = mixer.k_norm.weight[:] = 2.0
        mixer.o_proj.weight[:, :128] = 0.5 * mixer.v_proj.weight[:64].T.repeat(1, 2)


def learning_rate(step: int, total: int) -> float:
    """Linear warm-up, constant to 55% of the run, then linear decay."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    return LAST_LR + (PEAK_LR - LAST_LR) * min(1.0, (total - step) / (0.45 * total))


def copy_sequence(haystack: Haystack, rng: random.Random, length: int) -> Sequence:
    """A passage of any kind, a few random tokens, and the passage again, until the sequence is full."""
    tokenizer = haystack.tokenizer
    size = int(math.exp(rng.uniform(math.log(6), math.log(length // 2 - 2))))
    passage = haystack.span(rng, size)
    size = len(passage)
    parts, marks, total = [np.array([tokenizer.bos_token_id])], [np.zeros(1, bool)], 1
    for n in range(length):
        gap = rng.randrange(0, 8)
        filler = np.array([rng.randrange(3, len(tokenizer)) for _ in range(gap)], dtype=np.int32)
        parts += [filler, passage]
        marks += [np.zeros(gap + (1 if n else size), bool), np.ones(size - 1 if n else 0, bool)]
        total += gap + size
        if total >= length:
            break
    return Sequence(np.concatenate(parts)[:length].astype(np.int32), np.concatenate(marks)[:length])


def make_batch(haystack: Haystack, stage: Stage, seed: int) -> list[Sequence]:
    rng = random.Random(seed)
    sequences: list[Sequence] = []
    while len(sequences) < stage.batch:
        if len(sequences) < stage.copies * stage.batch:
            sequences.append(copy_sequence(haystack, rng, stage.length))
            continue
        try:
            count = rng.randrange(max(1, stage.facts * 2 // 3), stage.facts + 1)
            sequences.append(training_sequence(haystack.tokenizer, haystack, rng, stage.length, count))
        except ValueError:  # more facts than fit: draw again
            continue
    return sequences


def train_step(model: Any, stage: Stage, batch: list[Sequence]) -> dict[str, float]:
    ids = torch.stack([torch.from_numpy(s.ids).long() for s in batch])
    answer = torch.stack([torch.from_numpy(s.answer) for s in batch])
    logits = model(input_ids=ids, use_cache=False).logits
    loss = weighted_next_token_loss(logits, ids, answer + TEXT_WEIGHT * ~answer)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with torch.no_grad():
        right = logits[:, :-1].argmax(-1) == ids[:, 1:]
        text = weighted_next_token_loss(logits, ids, (~answer).float())
        facts = slice(math.ceil(stage.copies * stage.batch), None)
        return {
            "loss": loss.item(),
            "text_loss": text.item(),
            "grad_norm": norm.item(),
            "answer_accuracy": right[facts][answer[facts, 1:]].float().mean().item(),
            "all_accuracy": right[answer[:, 1:]].float().mean().item(),
        }


def main(
    directory: Annotated[Path, typer.Argument(help="run folder")],
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 0,
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    haystack = Haystack(tokenizer, part="train")
    model = new_teacher(len(tokenizer), seed)
    embedding = model.model.embed_tokens.weight
    others = [p for p in model.parameters() if p is not embedding]
    optimizer = torch.optim.AdamW(
        [
            {"params": others, "times": 1.0},
            {"params": [embedding], "times": EMBEDDING_LR, "weight_decay": 0.0},
        ],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=True,
    )
    state_file, step = directory / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    plan = [stage for stage in STAGES for _ in range(stage.steps)]
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
        f"{sum(s.length * s.batch for s in plan) / 1e6:.1f}M tokens, {len(plan)} steps, starting at {step}",
        flush=True,
    )

    def save() -> None:
        temporary = state_file.with_suffix(".tmp")
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary
        )
        temporary.replace(state_file)
        model.save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")

    saved = begun = time.monotonic()
    with open(directory / "metrics.jsonl", "a") as metrics:
        while step < len(plan):
            for group in optimizer.param_groups:
                group["lr"] = group["times"] * learning_rate(step, len(plan))
            optimizer.zero_grad(set_to_none=True)
            record = train_step(model, plan[step], make_batch(haystack, plan[step], seed * 1_000_003 + step))
            if not all(math.isfinite(v) for v in record.values()):
                raise SystemExit(f"step {step}: {record} is not finite; the last checkpoint is {state_file}")
            optimizer.step()
            step += 1
            record |= {
                "step": step,
                "length": plan[step - 1].length,
                "seconds": round(time.monotonic() - begun, 1),
            }
            metrics.write(json.dumps(record) + "\n")
            if step % 20 == 0:
                metrics.flush()
                print(" ".join(f"{k}={v:.4g}" for k, v in record.items()), flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
    save()
    print(f"saved {directory / 'model'}")


if __name__ == "__main__":
    typer.run(main)
