"""What came out of a run: its events as one result, the targets it met, the page."""

from dataclasses import asdict
from typing import Any

from .. import counts
from ..markdown import as_markdown, roofline
from ..record import Target
from .sizes import Sizes
from .steps import Event

Row = dict[str, Any]
K = 1024


def result_of(events: list[Event], sizes: Sizes) -> dict[str, Any]:
    """Rows, targets, notes, machine; `failed` and `skipped` steps with the reason of each; lines of the
    tests."""
    machine: dict[str, str] = next((e["machine"] for e in events if e["event"] == "process"), {})
    rows = [e["row"] for e in events if e["event"] == "row"]
    failed = [(e["step"], e["error"]) for e in events if e["event"] == "end" and e["error"]]
    ended = {e["step"] for e in events if e["event"] == "end"}
    failed += [
        (e["step"], "the process ended in it")
        for e in events
        if e["event"] == "begin" and e["step"] not in ended
    ]
    return {
        "rows": rows,
        "targets": [asdict(t) for t in targets(rows, sizes)],
        "notes": [e["text"] for e in events if e["event"] == "note"],
        "machine": machine,
        "failed": failed,
        "skipped": [(e["step"], e["why"]) for e in events if e["event"] == "skip"],
        "tests": [f"{e['file']}: {e['verdict']}" for e in events if e["event"] == "tests"],
    }


def find(rows: list[Row], op: str, kind: str = "forward", **wanted: str) -> Row | None:
    """The last row of an op; `wanted` compares columns, `shape` by its beginning, `has` by a part of it."""
    has, start = wanted.pop("has", ""), wanted.pop("shape", "")
    for row in reversed(rows):
        same = row["op"] == op and row["pass"] == kind and all(row[c] == v for c, v in wanted.items())
        if same and row["shape"].startswith(start) and has in row["shape"]:
            return row
    return None


def targets(rows: list[Row], sizes: Sizes) -> list[Target]:
    """The figures asked for, as far as there are rows to make them of: ratios within one run."""
    matmul, copy = roofline(rows)
    rate, copy = matmul.get("bfloat16", 0.0) * 1e9, copy * 1e9
    found: list[Target] = []
    if not rate or not copy:
        return found
    heads, dim, spec = sizes.heads, sizes.dim, sizes.spec
    for tokens in sizes.lengths:
        found += _lightning_targets(rows, tokens, copy, sizes)
        where = f"T={tokens} "
        ours = [
            find(rows, op, shape=where, has=" correlated") for op in ("select_blocks", "sparse_attention")
        ]
        for queries in ("correlated", "random"):
            for op, flops in (
                ("select_blocks", counts.selection_flops(tokens, heads, dim, spec)),
                ("sparse_attention", counts.sparse_flops(tokens, heads, dim, spec)),
            ):
                row = find(rows, op, shape=where, has=f" {queries}")
                if row:
                    name = f"{op} over its floor, {tokens:,} tokens, {queries} queries"
                    found.append(Target.at_most(name, row["p50_ms"] / 1e3 * rate / flops, 2.5))
        dense = [r for r in rows if r["op"].startswith("scaled_dot") and r["shape"].startswith(where)]
        if dense and all(ours):
            both = sum(r["p50_ms"] for r in ours if r)
            name = f"selection + sparse attention over dense attention, {tokens:,} tokens"
            found.append(Target.at_least(name, min(r["p50_ms"] for r in dense) / both, 6))
    return found + _model_targets(rows, rate, copy, sizes)


def _lightning_targets(rows: list[Row], tokens: int, copy: float, sizes: Sizes) -> list[Target]:
    found = []
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        row = find(rows, "lightning_attention", shape=f"T={tokens} ", dtype=dtype, backend="triton")
        if row:
            floor = counts.lightning_bytes(tokens, sizes.lightning_heads, sizes.dim, size) / copy
            name = f"lightning over its bandwidth floor, {tokens:,} tokens, {dtype}"
            found.append(Target.at_most(name, row["p50_ms"] / 1e3 / floor, 2))
        theirs = find(
            rows, "lightning_attention", shape=f"T={tokens} ", dtype=dtype, backend="fla simple_gla"
        )
        if row and theirs:
            name = f"fla simple_gla over lightning, {tokens:,} tokens, {dtype}"
            found.append(Target.at_least(name, theirs["p50_ms"] / row["p50_ms"], 1))
    return found


def _model_targets(rows: list[Row], rate: float, copy: float, sizes: Sizes) -> list[Target]:
    found, config = [], sizes.config()
    for tokens in (*sizes.prompts, sizes.long_prompt):
        row = find(rows, "first token", shape=f"T={tokens}", backend="SALA 9B shape")
        if row and row["shape"] == f"T={tokens}":
            floor = counts.prefill_flops(config, tokens) / rate
            name = f"first token over its floor, {tokens:,} tokens"
            found.append(Target.at_most(name, row["p50_ms"] / 1e3 / floor, 1.5))
            if tokens == sizes.long_prompt:
                name = f"peak memory of {tokens:,} tokens, GB"
                found.append(Target.at_most(name, row["peak_mib"] * 2**20 / 1e9, 32))
        theirs = find(rows, "first token", shape=f"T={tokens}", backend="Qwen3 8B shape")
        if row and theirs and theirs["shape"] == row["shape"] == f"T={tokens}":
            name = f"first token, Qwen3-8B's shape over ours, {tokens:,} tokens"
            found.append(Target.at_least(name, theirs["p50_ms"] / row["p50_ms"], 4))
        step = find(rows, "decode step", "decode", shape=f"T={tokens}")
        if step and step["shape"] == f"T={tokens}":
            weights = step["gbs"] * 1e9 * step["p50_ms"] / 1e3
            name = f"decoding step over reading the weights once, {tokens:,} tokens"
            found.append(Target.at_most(name, step["p50_ms"] / 1e3 * copy / weights, 1.4))
    return found


def page(result: dict[str, Any], title: str) -> str:
    """The report to read: what went wrong first, then targets, rows and notes."""
    text = as_markdown(result, title, "; ".join(result["tests"]))
    head, rest = text.split("\n\n", 1)
    parts = [head]
    if result["failed"]:
        lines = [f"- **{step}**: {error}" for step, error in result["failed"]]
        parts += ["## Failed", "\n".join(lines)]
    if result["skipped"]:
        lines = [f"- {step}: {why}" for step, why in result["skipped"]]
        parts += ["## Left out", "\n".join(lines)]
    return "\n\n".join([*parts, rest])
