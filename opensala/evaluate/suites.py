"""Suites by name: which there are, what they are made of, and what data they need."""

import difflib
from pathlib import Path
from typing import Any

from ..data.ruler import TASKS
from .mrcr import MRCRSuite
from .nolima import NoLiMaSuite
from .ruler import RulerFiles, RulerSuite
from .samples import Suite

PRESETS = {"long": ("ruler", "mrcr", "nolima"), "ultra": ("ruler",)}
SUITES = ("ruler", "mrcr", "nolima")
_LENGTHS = {
    ("long", "ruler"): (65536, 131072), ("long", "mrcr"): (65536, 131072), ("long", "nolima"): (32000, 64000, 128000),
    ("ultra", "ruler"): (131072, 524288, 1_000_000, 2 * 2**20),
    ("ruler", "ruler"): (4096, 16384), ("mrcr", "mrcr"): (), ("nolima", "nolima"): (250, 500, 1000, 4000, 16000),
}


def build_suites(name: str, lengths: tuple[int, ...], samples: int, questions: int, seed: int, data: dict[str, Path]) -> list[Suite]:
    """The suites behind a name: `ruler`, `mrcr`, `nolima`, `long`, `ultra`, or tasks of RULER separated by commas.

    Args:
        lengths: empty for those the name stands for.
        data: where a suite's files are. `mrcr` and `nolima` need it; `ruler` is generated without.

    Raises:
        ValueError: an unknown name, data missing or of a suite that does not exist, and what the suites refuse.
    """
    for given in data:
        if given not in SUITES:
            raise ValueError(f"--data: suite must be one of {', '.join(SUITES)}, got {given!r}")
    tasks = tuple(part for part in name.split(",") if part in TASKS)
    if tasks and len(tasks) == len(name.split(",")):
        return [_ruler(tasks, lengths or _LENGTHS["ruler", "ruler"], samples, questions, seed, data)]
    if name not in (*PRESETS, *SUITES):
        known = [*PRESETS, *SUITES, *TASKS]
        unknown = next(part for part in name.split(",") if part not in TASKS)
        near = difflib.get_close_matches(unknown, known, 1)
        raise ValueError(f"suite {unknown!r} does not exist{f': did you mean {near[0]}?' if near else '.'} There are {', '.join(known)}")
    return [_one(part, lengths or _LENGTHS[name, part], samples, questions, seed, data) for part in PRESETS.get(name, (name,))]


def _one(name: str, lengths: tuple[int, ...], samples: int, questions: int, seed: int, data: dict[str, Path]) -> Suite:
    if name == "ruler":
        return _ruler((), lengths, samples, questions, seed, data)
    if name not in data:
        raise ValueError(f"suite {name}: its files are not part of this package; download them and give --data {name}=PATH "
                         "(docs/evaluation.md says which), or choose --suite ruler")
    makers: dict[str, Any] = {"mrcr": MRCRSuite, "nolima": NoLiMaSuite}
    return makers[name](data[name], lengths, samples)


def _ruler(tasks: tuple[str, ...], lengths: tuple[int, ...], samples: int, questions: int, seed: int, data: dict[str, Path]) -> Suite:
    if "ruler" in data:
        return RulerFiles(data["ruler"], tasks, samples)
    return RulerSuite(tasks, lengths, samples, questions, seed)
