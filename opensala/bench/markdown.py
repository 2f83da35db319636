"""A measured run as a page to read: targets first, then every row beside the machine's own roofline."""

from typing import Any

Row = dict[str, Any]


def as_markdown(result: dict[str, Any], title: str, tests: str = "") -> str:
    """The page of what `opensala bench ops` printed as JSON.

    Args:
        result: rows, targets, notes and machine of a run.
        title: its heading.
        tests: the last line of the test run that came before, if there was one.
    """
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value)
    matmul, copy = roofline(result["rows"])
    parts = [f"# {title}", f"{machine}."]
    if tests:
        parts.append(f"Tests before it: {tests}.")
    best = "; ".join(
        f"{dtype} matrix product {gflops / 1e3:,.1f} TFLOP/s" for dtype, gflops in matmul.items()
    )
    parts.append(
        f"Roofline measured in the same run: {best}; copy {copy:,.0f} GB/s, read and written bytes "
        "counted. `of roofline` is the "
        "larger of a row's share of its dtype's matrix product and its share of the copy."
    )
    parts.append("## Targets")
    parts.append(
        _table(
            ["what", "measured", "asked", ""],
            [
                [t["name"], f"{t['value']:g}", f"{t['target']:g}", "met" if t["ok"] else "**missed**"]
                for t in result["targets"]
            ],
        )
    )
    parts.append("## Rows")
    parts.append("Milliseconds: median, and 20th to 80th percentile.")
    cells = [
        [
            r["op"],
            r["pass"],
            r["backend"],
            r["dtype"],
            r["shape"],
            f"{r['p50_ms']:g}",
            f"{r['p20_ms']:g} to {r['p80_ms']:g}",
            str(r["runs"]),
            f"{r['gflops'] / 1e3:,.3g}" if r["gflops"] else "",
            f"{r['gbs']:,.4g}" if r["gbs"] else "",
            _share(r, matmul, copy),
        ]
        for r in result["rows"]
    ]
    parts.append(
        _table(
            [
                "op",
                "pass",
                "backend",
                "dtype",
                "shape",
                "ms",
                "spread",
                "runs",
                "TFLOP/s",
                "GB/s",
                "of roofline",
            ],
            cells,
        )
    )
    if result["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in result["notes"])]
    return "\n\n".join(parts) + "\n"


def roofline(rows: list[Row]) -> tuple[dict[str, float], float]:
    """The most GFLOP/s of each dtype\'s matrix products, and the most GB/s of a copy, among the rows."""
    matmul: dict[str, float] = {}
    for row in rows:
        if row["op"] == "matmul":
            matmul[row["dtype"]] = max(matmul.get(row["dtype"], 0.0), row["gflops"])
    return matmul, max((row["gbs"] for row in rows if row["op"] == "copy"), default=0.0)


def _share(row: Row, matmul: dict[str, float], copy: float) -> str:
    shares = [
        row["gflops"] / matmul[row["dtype"]] if row["gflops"] and row["dtype"] in matmul else 0.0,
        row["gbs"] / copy if row["gbs"] and copy else 0.0,
    ]
    return f"{max(shares):.0%}" if max(shares) else ""


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))
