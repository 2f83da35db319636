"""One prompt, its answer and what it cost: what the command line shows. A caller of the engine like any
other."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..model import describe_attention
from ..model.storage import text_bytes
from .engine import Engine
from .memory import peak_bytes
from .progress import token_progress
from .request import FinishReason, SamplingParams, TokenEvent


@dataclass
class Generation:
    """What was generated and what it cost; times in seconds, sizes in bytes.

    `confidence` is the mean, `least_confidence` the least probability of the answer's tokens under the
    model's own distribution (null without tokens). `reused_tokens` of the prompt were at hand and not read
    again, `restored_tokens` of these from a folder of prefixes.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    confidence: float | None
    least_confidence: float | None
    time_to_first_token: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    peak_memory_bytes: int
    cache_bytes: int
    attention: str
    model: str
    device: str
    dtype: str
    kv_dtype: str
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    restored_tokens: int = 0
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Clock:
    """Notes when tokens came, and prints the text as it comes if it is to be shown."""

    def __init__(self, show: bool, then: Callable[[TokenEvent], None] | None) -> None:
        self.show, self.then, self.first, self.last = show, then, 0.0, 0.0

    def __call__(self, event: TokenEvent) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if self.show:
            sys.stdout.write(event.text + ("\n" if event.completion is not None else ""))
            sys.stdout.flush()
        if self.then is not None:
            self.then(event)


def generate(
    engine: Engine,
    ids: list[int],
    params: SamplingParams | None = None,
    *,
    marks: tuple[int, ...] = (),
    label: str = "reading",
    stream: bool = False,
    quiet: bool = False,
    on_event: Callable[[TokenEvent], None] | None = None,
) -> Generation:
    """Read token ids and continue them.

    Args:
        marks: places from which later prompts may continue.
        label: what the progress bar on stderr says.
        stream: print the text to stdout as it comes.
        quiet: no progress bar.
        on_event: called with each event.

    Raises:
        ValueError: see `Engine.add`; the model's output is not finite.
    """
    params = params or SamplingParams()
    notes = engine.check_prompt(len(ids), params.max_tokens)
    clock, start = _Clock(stream, on_event), time.perf_counter()
    with token_progress(label, len(ids), quiet) as advance:
        (done,) = engine.generate([ids], params, marks=[marks], on_event=clock, on_read=advance)
    assert done.finish_reason is not None and done.reuse is not None, "it ran"
    first, new = clock.first - start, len(done.tokens)
    mode = "sparse" if engine.config.attends_sparsely(len(ids)) else "dense"
    answer = done.logprobs[:-1] if done.finish_reason is FinishReason.STOP and new > 1 else done.logprobs
    odds = [math.exp(p) for p in answer]
    return Generation(
        text=done.text,
        finish_reason=done.finish_reason.value,
        prompt_tokens=len(ids),
        reused_tokens=done.reuse.reused,
        new_tokens=new,
        confidence=sum(odds) / len(odds) if odds else None,
        least_confidence=min(odds, default=None),
        time_to_first_token=first,
        prefill_tokens_per_second=len(ids) / first,
        decode_tokens_per_second=(new - 1) / (clock.last - clock.first) if new > 1 else None,
        peak_memory_bytes=peak_bytes(engine.device),
        cache_bytes=text_bytes(engine.config, len(ids) + new, engine.dtype, engine.kv_dtype),
        attention=describe_attention(engine.config, mode, engine.model.model.norm.weight),
        model=engine.name,
        device=str(engine.device),
        dtype=str(engine.dtype).removeprefix("torch."),
        kv_dtype=str(engine.storage.kv_dtype).removeprefix("torch."),
        drafted_tokens=done.drafted,
        accepted_tokens=done.accepted,
        restored_tokens=done.reuse.restored,
        notes=notes,
    )
