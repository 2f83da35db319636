"""The targets of the comparison, from its rows; those whose rows are missing are left out."""

from typing import Any

from .. import counts
from ..record import Target
from .presets import K, Preset
from .process import PARTNER


def targets_of(rows: list[dict[str, Any]], shapes: Preset, roofline: dict[str, float]) -> list[Target]:
    """Ratios within one run; `roofline` has the most FLOP/s of each dtype."""
    known = {(r["contender"], r["tokens"]): r for r in rows if r["status"] == "measured"}
    found: list[Target] = []
    for bits, partner in PARTNER.items():
        for tokens in sorted({n for _, n in known}):
            ours, theirs = known.get((f"sala-{bits}", tokens)), known.get((f"llama.cpp-{partner}", tokens))
            if ours and theirs:
                found += _against(bits, partner, tokens, ours, theirs)
    found += _growth(known)
    best = max(roofline["float32"], roofline["bfloat16"])
    whole = known.get(("sala-bfloat16", 64 * K))
    if whole:
        rate = counts.prefill_flops(shapes.hybrid, 64 * K) / whole["first_s"]
        found.append(Target.at_least("prefill at 64K, share of the best matrix rate", rate / best, 0.55))
    narrow, wide = known.get(("sala-int4", 4 * K)), known.get(("sala-float32", 4 * K))
    if narrow and wide:
        ratio = wide["step_p50_ms"] / narrow["step_p50_ms"]
        found.append(Target.at_least("step at 4K, float32 over int4", ratio, 1.5))
    return found


def _against(
    bits: str, partner: str, tokens: int, ours: dict[str, Any], theirs: dict[str, Any]
) -> list[Target]:
    where = f"{tokens // K}K, llama.cpp {partner} over ours {bits}"
    found = []
    if tokens >= 4 * K:
        ratio = theirs["step_p50_ms"] / ours["step_p50_ms"]
        found.append(Target.at_least(f"step at {where}", ratio, 2.0 if tokens >= 32 * K else 0.9))
    asked = {2 * K: 0.8, 32 * K: 3.0, 64 * K: 6.0}.get(tokens)
    if asked is not None:
        ratio = theirs["first_s"] / ours["first_s"]
        found.append(Target.at_least(f"first token at {where}", ratio, asked))
    return found


def _growth(known: dict[tuple[str, int], dict[str, Any]]) -> list[Target]:
    found = []
    for bits in ("bfloat16", "int4"):
        short, long = known.get((f"sala-{bits}", 4 * K)), known.get((f"sala-{bits}", 256 * K))
        if short and long:
            ratio = long["step_p50_ms"] / short["step_p50_ms"]
            found.append(Target.at_most(f"step at 256K over 4K, {bits}", ratio, 1.3))
    return found
