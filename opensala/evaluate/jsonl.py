"""Reading files of JSON lines, with every complaint naming file, line and field."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS: dict[Any, str] = {
    str: "a string",
    int: "an integer",
    list: "a list",
    dict: "an object",
    float: "a number",
}


def read_jsonl(path: Path, fields: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a file.

    Args:
        fields: what each object must have: name and type (`list` means a list of strings that is not empty).

    Raises:
        ValueError: no such file, nothing in it, a line that is not a JSON object, a field missing or of
            another type.
    """
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    found = False
    with file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found = True
                    yield number, _checked(line, fields, f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not found:
        raise ValueError(f"{path}: empty, no JSON lines in it")


def _checked(line: str, fields: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: {KINDS.get(type(record), 'a value')} instead of an object with the fields "
            f"{', '.join(fields)}"
        )
    check_fields(record, fields, where)
    return record


def check_fields(record: dict[str, Any], fields: dict[str, Any], where: str) -> None:
    """ValueError naming `where` and the field unless the record has all fields with their types."""
    for name, kind in fields.items():
        if name not in record:
            raise ValueError(
                f"{where}: field {name!r} is missing; the object has "
                f"{', '.join(map(repr, record)) or 'no fields'}"
            )
        value = record[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"{where}: field {name!r} must be {KINDS[kind]}, got "
                f"{json.dumps(value, ensure_ascii=False)[:80]}"
            )
        if kind is list and (not value or not all(isinstance(v, str) for v in value)):
            raise ValueError(
                f"{where}: field {name!r} must be a list of at least one string, got {json.dumps(value)[:80]}"
            )
