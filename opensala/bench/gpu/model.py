"""The whole released 9B model with random weights, through the engine: prompts read, tokens decoded, memory.

Weights and activations are bfloat16 on a GPU, as `opensala.engine.load_engine` chooses.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import profile

from ...model import MiniCPMSALAForCausalLM
from ...ops.backends import use_backend
from .. import counts
from ..timing import quantiles
from .steps import Context, Step

NAME = "SALA 9B shape"
WARM_STEPS = 2  # decoding steps that do not count: a graph may be recorded in them
PROFILED = 4


def steps(prompts: tuple[int, ...], long_prompt: int) -> list[Step]:
    first, *others = prompts
    return [
        Step("model, warm-up", "model", 15, warm_up),
        Step(f"model, {first} tokens", "model", 4, _prompt(first)),
        Step("model, profile", "model", 6, profiled),
        *(Step(f"model, {n} tokens", "model", 9 * n / (256 << 10) + 2, _prompt(n)) for n in others),
        Step(f"model, {long_prompt} tokens", "million", 12, _prompt(long_prompt)),
    ]


def model_of(context: Context) -> MiniCPMSALAForCausalLM:
    """The model, made once a process."""
    if "model" not in context.kept:
        config, start = context.sizes.config(), time.perf_counter()
        torch.manual_seed(0)
        with torch.device(context.device.torch):
            model = MiniCPMSALAForCausalLM._from_config(config, dtype=context.device.dtype).eval()
        context.device.synchronize()
        size, count = (
            sum(f(p) for p in model.parameters()) for f in (lambda p: p.nbytes, torch.Tensor.numel)
        )
        context.report.note(
            f"{NAME}: {count:,} parameters, {size / 1e9:.2f} GB, made in {time.perf_counter() - start:.1f} s"
        )
        context.kept["model"] = model.requires_grad_(False)
    return context.kept["model"]


def engine_of(context: Context, tokens: int) -> Any:
    """An engine with room for one text of so many tokens, and its answer."""
    from ...engine.engine import Engine
    from ...engine.options import EngineOptions
    from ...engine.runner import Runner

    sizes = context.sizes
    room = tokens + sizes.decoded + WARM_STEPS + PROFILED + 2 * sizes.config().block_spec.block_size
    options = EngineOptions(
        max_batch_tokens=sizes.chunk,
        max_running=1,
        max_cached_tokens=room,
        max_snapshots=0,
        snapshot_interval=0,
    )
    engine = Engine(model_of(context), None, options, name=NAME)
    recorder = context.device.recorder()
    if recorder is not None:
        engine.runner = Runner(engine.model, engine.storage, recorder)
    return engine


def begin(context: Context, tokens: int, answer: int) -> Any:
    """An engine with one request in it: random tokens, an answer of fixed length."""
    from ...engine.request import SamplingParams

    engine = engine_of(context, tokens)
    generator = torch.Generator().manual_seed(tokens)
    prompt = torch.randint(3, engine.config.vocab_size, (tokens,), generator=generator).tolist()
    engine.add(prompt, SamplingParams(max_tokens=answer, ignore_eos=True))
    return engine


def warm_up(context: Context) -> None:
    """A short prompt, sparse already, and a few tokens behind it: everything is compiled."""
    with use_backend("triton"):
        engine = begin(context, context.sizes.warm_up, WARM_STEPS + 2)
        while engine.has_work:
            engine.step()
    context.device.synchronize()


def _prompt(tokens: int) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        with use_backend("triton"):
            read_and_decode(context, tokens)

    return run


def read_and_decode(context: Context, tokens: int) -> None:
    """Read a prompt, decode behind it; stopped by time, what was read until then is a row too."""
    device, report, sizes = context.device, context.report, context.sizes
    model_of(context)
    device.release()
    device.start_peak()
    engine = begin(context, tokens, sizes.decoded + WARM_STEPS + 1)
    request = next(iter(engine._requests))
    report.say(f"  cache of {engine.storage.num_bytes / 1e9:.2f} GB")
    stop_early = context.until - 1.0
    chunks, start, reached = [], time.perf_counter(), False
    while not reached:
        before = time.perf_counter()
        reached = any(event.token is not None for event in engine.step())
        device.synchronize()
        chunks.append(time.perf_counter() - before)
        if not reached and time.time() > stop_early:
            break
    seconds = time.perf_counter() - start
    read = tokens if reached else engine.tokens_read(request)
    report.add(
        "first token" if reached else "prefill, stopped by time",
        NAME,
        quantiles([seconds]),
        shape=f"T={read}" if reached else f"T={read} of {tokens}",
        dtype=device.dtype,
        flops=counts.prefill_flops(engine.config, read),
        peak=device.peak_bytes(),
    )
    report.write({"event": "chunks", "tokens": tokens, "chunk": sizes.chunk, "seconds": chunks})
    if not reached:
        report.note(f"{NAME}: {read:,} of {tokens:,} tokens read in {seconds:.1f} s, then time was over")
        return
    spent = []
    while engine.has_work:
        before = time.perf_counter()
        engine.step()
        device.synchronize()
        spent.append(time.perf_counter() - before)
    captured = engine.runner.captured
    report.note(
        f"{NAME}, {tokens:,} tokens: {device.reserved_bytes() / 1e9:.2f} GB held by the allocator at most; "
        f"decoding steps {f'are not captured: {captured.reason}' if captured.reason else 'are captured'} "
        f"({captured.num_graphs} graphs)"
    )
    timing = quantiles(spent[WARM_STEPS:])
    report.add(
        "decode step",
        NAME,
        timing,
        shape=f"T={tokens}",
        dtype=device.dtype,
        kind="decode",
        moved=decode_bytes(context),
        peak=device.peak_bytes(),
    )


def decode_bytes(context: Context) -> float:
    """Bytes of the weights that one decoding step reads: all but the embeddings."""
    model = model_of(context)
    return float(sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name))


def profiled(context: Context) -> None:
    """The last chunk of the first prompt and some decoding steps under the profiler: kernels, launches,
    waits."""
    device, report, sizes = context.device, context.report, context.sizes
    tokens = sizes.prompts[0]
    texts = []
    with use_backend("triton"):
        engine = begin(context, tokens, 2 * PROFILED + WARM_STEPS + 1)
        request = next(iter(engine._requests))
        while engine.tokens_read(request) < tokens - sizes.chunk:
            engine.step()
        device.synchronize()
        for what, count, rest in (("last chunk of the prefill", 1, WARM_STEPS), ("decoding", PROFILED, 0)):
            with profile(activities=device.activities()) as seen:
                start = time.perf_counter()
                for _ in range(count):
                    engine.step()
                device.synchronize()
                seconds = (time.perf_counter() - start) / count
            texts.append(_summary(context, what, seen, count, seconds))
            for _ in range(rest):
                engine.step()
        waits = [device.count_waits(engine.step) for _ in range(2)]
        report.note(f"{NAME}: a decoding step waits {statistics.median(waits):g} times for the device")
        while engine.has_work:
            engine.step()
    context.file("profile.txt").write_text("\n\n".join(texts))


def _summary(context: Context, what: str, seen: profile, count: int, seconds: float) -> str:
    """The profiler's table; launches and the device's share of the time go into the notes."""
    averages = seen.key_averages()
    on_device = [e for e in averages if str(e.device_type).endswith("CUDA")]
    launched = sum(e.count for e in on_device) / count
    busy = sum(e.self_device_time_total for e in on_device) / 1e6 / count
    context.report.note(
        f"{NAME}, {what}: {launched:.0f} launches, {busy * 1e3:.1f} ms of kernels in {seconds * 1e3:.1f} ms "
        "(under the profiler)"
    )
    for e in sorted(on_device, key=lambda e: -e.self_device_time_total)[:14]:
        context.report.say(
            f"    {e.self_device_time_total / 1e3 / count:9.3f} ms {e.count / count:6.0f}x {e.key[:90]}"
        )
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    table = averages.table(sort_by=key, row_limit=60, max_name_column_width=90)
    return f"{what}: {launched:.0f} launches, {busy * 1e3:.2f} ms of kernels, each of {count}\n{table}"
