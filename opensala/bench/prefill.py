"""Whole models: time to the first token and decoding, beside a full-attention twin."""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engine import prefill
from ..engine.precision import precision_of
from ..model import MiniCPMSALAForCausalLM, SALACache
from .counts import prefill_flops
from .record import Report
from .timing import Timing, quantiles, timed

DECODED = 16  # tokens of each measurement of decoding
REPEATS = 5


def random_ids(vocabulary: int, tokens: int, device: torch.device) -> Tensor:
    return torch.randint(3, vocabulary, (1, tokens), device=device)


@torch.inference_mode()
def time_first_token(
    report: Report, name: str, model: MiniCPMSALAForCausalLM, tokens: int, runs: int, keep: bool = False
) -> tuple[Timing, SALACache | None]:
    """Time to the first token of a prompt of random tokens; the last cache if `keep`."""
    ids, seconds, kept = random_ids(model.config.vocab_size, tokens, report.device), [], None
    dtype = model.compute_dtype
    for _ in range(runs):
        cache = SALACache(model.config)
        seconds.append(
            timed(partial(prefill, model, ids, cache, new_tokens=4 * DECODED * REPEATS), report.device)
        )
        kept = cache if keep else None
    timing = quantiles(seconds)
    report.add(
        "first token",
        name,
        timing,
        shape=f"T={tokens}",
        dtype=dtype,
        flops=prefill_flops(model.config, tokens),
        precision=precision_of(model),
    )
    return timing, kept


@torch.inference_mode()
def time_twin_first_token(report: Report, name: str, twin: PreTrainedModel, tokens: int) -> float:
    """The same for full attention, in one call (the fastest way for it)."""
    ids = random_ids(twin.config.vocab_size, tokens, report.device)
    timing = quantiles([timed(lambda: twin(ids, use_cache=True, logits_to_keep=1), report.device)])
    report.add("first token", name, timing, shape=f"T={tokens}", dtype=next(twin.parameters()).dtype)
    return timing.p50


@torch.inference_mode()
def time_steps(
    report: Report, name: str, model: MiniCPMSALAForCausalLM, caches: dict[int, SALACache]
) -> dict[int, float]:
    """Median seconds of a decoding step behind prompts of several lengths, taking turns."""
    seconds: dict[int, list[float]] = {length: [] for length in caches}
    ids = random_ids(model.config.vocab_size, 1, report.device)

    def decode(cache: SALACache) -> None:
        for _ in range(DECODED):
            model(input_ids=ids, past_key_values=cache, use_cache=True)

    for round_ in range(REPEATS + 1):
        for length, cache in caches.items():
            spent = timed(partial(decode, cache), report.device) / DECODED
            if round_:
                seconds[length].append(spent)
    timings = {length: quantiles(s) for length, s in seconds.items()}
    for length, timing in timings.items():
        report.add(
            "decode step",
            name,
            timing,
            shape=f"T={length}",
            dtype=model.compute_dtype,
            kind="decode",
            precision=precision_of(model),
        )
    return {length: t.p50 for length, t in timings.items()}
