"""A folder of results that grows sample by sample and survives being killed.

`run.json` says what was run (replaced as a whole), `samples.jsonl` has a line for each sample (appended, on
disk before the next one begins). A line torn by a crash is dropped when the folder is opened again; that
sample is run again.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .jsonl import check_fields

_FIELDS = {"id": str, "task": str, "suite": str, "length": int, "prediction": str, "references": list}


class Results:
    """The results in a folder, opened for adding to.

    Args:
        folder: created if need be.
        identity: model, tokenizer and mode; results of another identity are refused.
        suites: settings of each suite about to be run, by its name; other settings for a suite held are
            refused.
        run: circumstances of this run, added to the list of runs.

    Raises:
        ValueError: the folder holds results of something else, or a line that is not a result.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], suites: dict[str, dict[str, Any]], run: dict[str, Any]
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        held = self._header()
        self._check("", held.get("identity", identity), identity)
        for name, settings in suites.items():
            self._check(f"{name}: ", held.get("suites", {}).get(name, settings), settings)
        self.header = {
            "identity": identity,
            "suites": held.get("suites", {}) | suites,
            "runs": [*held.get("runs", []), run],
        }
        self.rows = {row["id"]: row for row in read_samples(folder, repair=True)}
        temporary = folder / "run.json.new"
        temporary.write_text(json.dumps(self.header, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, folder / "run.json")

    def _header(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        if path.exists():
            return read_header(self.folder)
        if (self.folder / "samples.jsonl").exists():
            raise ValueError(
                f"{self.folder} has samples.jsonl but no run.json that says where they come from: name "
                "another folder"
            )
        return {}

    def _check(self, what: str, held: dict[str, Any], asked: dict[str, Any]) -> None:
        for key in {**held, **asked}:
            if held.get(key) != asked.get(key):
                raise ValueError(
                    f"{self.folder} holds results of another run: {what}{key} is {held.get(key)!r} there, "
                    "now it would be "
                    f"{asked.get(key)!r}; name another folder with -o, or ask for the same"
                )

    def __contains__(self, sample: str) -> bool:
        return sample in self.rows

    def add(self, row: dict[str, Any]) -> None:
        """Append one sample's row; it is on disk when this returns."""
        assert row["id"] not in self.rows, "a sample is run once"
        with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["id"]] = row


def read_header(folder: Path) -> dict[str, Any]:
    """`run.json` of a folder of results. ValueError if there is none or it cannot be read."""
    path = folder / "run.json"
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} holds no results: {path} cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    check_fields(header, {"identity": dict, "suites": dict}, str(path))
    return header


def read_samples(folder: Path, *, repair: bool = False) -> list[dict[str, Any]]:
    """The rows of `samples.jsonl`; a last line without its end is left out, and with `repair` cut off the
    file.

    Raises:
        ValueError: a line that is not a result, with its number and field.
    """
    path = folder / "samples.jsonl"
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(
        whole.decode("utf-8").split("\n")[:-1], 1
    ):  # splitlines would also cut at U+2028
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
        check_fields(row, _FIELDS, where)
        if not isinstance(row.get("score"), (int, float)) or not 0 <= row["score"] <= 1:
            raise ValueError(f"{where}: field 'score' must be a number from 0 to 1, got {row.get('score')!r}")
        rows.append(row)
    return rows


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Scores by suite, task and length (0 to 100, with the number of samples), and what sharing documents
    saved."""
    cells: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    prompts = read = 0
    for row in rows:
        cells[row["suite"], row["task"], row["length"]].append(row["score"])
        prompts += row["prompt_tokens"]
        read += row["read_tokens"]
    suites: dict[str, Any] = {}
    for (suite, task, length), scores in sorted(cells.items()):
        table = suites.setdefault(suite, {"tasks": {}, "average": {}})
        table["tasks"].setdefault(task, {})[str(length)] = {
            "score": round(100 * sum(scores) / len(scores), 2),
            "samples": len(scores),
        }
    for table in suites.values():
        for length in sorted({n for cells_of in table["tasks"].values() for n in cells_of}, key=int):
            # NoLiMa's direct questions are a control, not part of its score
            column = [
                c[length]["score"]
                for task, c in table["tasks"].items()
                if length in c and not task.endswith("_direct")
            ]
            if not column:
                continue
            table["average"][length] = {"score": round(sum(column) / len(column), 2), "tasks": len(column)}
    return {"suites": suites, "prompt_tokens": prompts, "read_tokens": read}
