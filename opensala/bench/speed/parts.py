"""Where the time of reading goes: the last piece of a prompt by native kernel, beside what its work must
take."""

from typing import Any

from .. import counts
from ..record import Report
from .presets import Preset
from .process import Process

PIECE = 4096
# what a kernel's name begins with -> the part of the work it does
_PARTS = {
    "opensala_linear": "products",
    "opensala_select": "selection",
    "opensala_attend": "attention",
    "opensala_lightning": "lightning",
    "opensala_store": "writing pages",
    "rest": "rest: Python and torch",
}


def share_rows(
    report: Report,
    shapes: Preset,
    started: dict[str, Process],
    lengths: list[int],
    roofline: dict[str, float],
) -> None:
    """Say, for our contenders at the longest of `lengths`, the share of time by part and each part's
    floor."""
    process = next((p for p in started.values() if p.contender.kind == "hybrid" and not p.oom), None)
    if process is None or not lengths or report.device.type != "cpu":
        return
    tokens = min(lengths[-1], 16 * PIECE)
    process.ask("start", tokens=tokens, new=4)
    for _ in range(tokens // PIECE - 1):
        process.ask("read", count=PIECE)
    count = min(tokens, PIECE)
    parts = process.ask("parts", count=count).get("parts", {})
    grouped = by_part(parts)
    whole = sum(grouped.values())
    half = process.contender.weights == "bfloat16" and roofline["bfloat16"] > roofline["float32"]
    rates = dict.fromkeys(_PARTS.values(), roofline["float32"])
    if half:  # and attention and selection multiply the pairs that its keys and values are
        rates |= dict.fromkeys(("products", "attention", "selection"), roofline["bfloat16"])
    floors = part_floors(shapes, tokens, count, rates)
    report.say(f"where the time goes, {process.contender.name}, the last {count:,} of {tokens:,} tokens")
    for part, seconds in sorted(grouped.items(), key=lambda item: -item[1]):
        floor = floors.get(part)
        beside = f", floor {floor:.3f} s" if floor is not None else ""
        report.note(f"part {part}: {seconds:.3f} s, {seconds / max(whole, 1e-9):.0%}{beside}")
    if half:
        report.note("products of many rows in 16 bits are torch's, and so part of the rest")


def by_part(kernels: dict[str, float]) -> dict[str, float]:
    """Seconds of native kernels by the part of the work that they do."""
    grouped: dict[str, float] = {}
    for name, seconds in kernels.items():
        part = next((p for begin, p in _PARTS.items() if name.startswith(begin)), "norms and gates")
        grouped[part] = grouped.get(part, 0.0) + seconds
    return grouped


def part_floors(shapes: Preset, tokens: int, count: int, rates: dict[str, float]) -> dict[str, float]:
    """Seconds that the last `count` of `tokens` tokens must take, by part, at the matrix rate (FLOP/s) of
    what each part computes in."""
    config = shapes.hybrid
    sparse = counts.sparse_layers(config)
    linear = config.num_hidden_layers - sparse
    before = tokens - count

    def last(flops: Any, *sizes: Any) -> float:
        return flops(tokens, *sizes) - (flops(before, *sizes) if before else 0.0)

    assert config.head_dim and config.lightning_nh and config.lightning_head_dim, "filled"
    heads, dim, spec = config.num_attention_heads, config.head_dim, config.block_spec
    lightning = counts.lightning_flops(
        count, config.lightning_nh, config.lightning_head_dim, config.lightning_head_dim
    )
    attends = config.attends_sparsely(tokens)
    attention = (
        last(counts.sparse_flops, heads, dim, spec) if attends else last(counts.dense_flops, heads, dim)
    )
    work = {
        "products": 2.0 * count * counts.product_weights(config),
        "lightning": linear * lightning,
        "attention": sparse * attention,
    }
    if attends:
        work["selection"] = sparse * last(counts.selection_flops, heads, dim, spec)
    return {part: flops / rates[part] for part, flops in work.items()}
