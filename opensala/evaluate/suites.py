"""Suites by name: which there are, what they are made of, and what data they need."""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.ruler import TASKS
from .livecodebench import BUDGET, LiveCodeBenchSuite
from .mrcr import MRCRSuite
from .nolima import NoLiMaSuite
from .ruler import RulerFiles, RulerSuite
from .samples import Suite
from .standard import BENCHMARKS, NO_LEAVE

PRESETS = {"long": ("ruler", "mrcr", "nolima"), "ultra": ("ruler",), "standard": ("livecodebench",)}
SUITES = ("ruler", "mrcr", "nolima", "livecodebench")
VERSIONS = {"livecodebench_v5": ("v5",), "livecodebench_v6": ("v6",)}
NAMES = (*PRESETS, *SUITES, *VERSIONS, *TASKS)
SAMPLES = 10  # where the user does not say; all of them in LiveCodeBench and lm-eval's tasks
_LENGTHS = {
    ("long", "ruler"): (65536, 131072),
    ("long", "mrcr"): (65536, 131072),
    ("long", "nolima"): (32000, 64000, 128000),
    ("ultra", "ruler"): (131072, 524288, 1_000_000, 2 * 2**20),
    ("ruler", "ruler"): (4096, 16384),
    ("mrcr", "mrcr"): (),
    ("nolima", "nolima"): (250, 500, 1000, 4000, 16000),
}
_CLOSE = 0.8  # so alike, an unknown name is a slip of the pen rather than one of lm-eval's tasks


@dataclass(frozen=True)
class Options:
    """What the suites are made with.

    Attributes:
        lengths: empty for those the name stands for.
        samples: None for the suite's usual number.
        questions, seed, cache: see `RulerSuite`.
        data: where a suite's files are. `mrcr`, `nolima` and `livecodebench` need it; `ruler` is generated
            without.
        budget: tokens of an answer in LiveCodeBench; None for the usual.
        allow_code: run programs that the model writes.
    """

    lengths: tuple[int, ...] = ()
    samples: int | None = None
    questions: int = 1
    seed: int = 0
    cache: Path | None = None
    data: dict[str, Path] = field(default_factory=dict)
    budget: int | None = None
    allow_code: bool = False


def split_names(name: str) -> tuple[list[str], list[str]]:
    """Names separated by commas as ours and those that only lm-eval can know; `standard` stands for some of
    both.

    Raises:
        ValueError: no name; one that is nearly one of ours.
    """
    ours, foreign = list[str](), list[str]()
    for part in (p.strip() for p in name.split(",")):
        if part in NAMES:
            ours.append(part)
        elif not part or (near := difflib.get_close_matches(part, NAMES, 1, _CLOSE)):
            raise ValueError(
                f"suite {part!r} does not exist{f': did you mean {near[0]}?' if part else '.'} There are "
                f"{', '.join(NAMES)}, and lm-eval's tasks"
            )
        else:
            foreign.append(part)
        if part == "standard":
            foreign += [b.task for b in BENCHMARKS]
    return ours, list(dict.fromkeys(foreign))


def build_suites(names: Sequence[str], options: Options) -> list[Suite]:
    """The suites behind names of ours; several tasks of RULER are one suite.

    Raises:
        ValueError: an unknown name, data missing or of a suite that does not exist, programs without
            permission, and what the suites refuse.
    """
    for given in options.data:
        if given not in SUITES:
            raise ValueError(f"--data: suite must be one of {', '.join(SUITES)}, got {given!r}")
    tasks = tuple(dict.fromkeys(name for name in names if name in TASKS))
    parts = dict.fromkeys(
        (name, part) for name in names if name not in TASKS for part in PRESETS.get(name, (name,))
    )
    suites = [_one(part, options.lengths or _LENGTHS.get((name, part), ()), options) for name, part in parts]
    if tasks:
        suites.append(_ruler(tasks, options.lengths or _LENGTHS["ruler", "ruler"], options))
    twice = [name for name, count in Counter(s.name for s in suites).items() if count > 1]
    if twice:
        raise ValueError(
            f"--suite names {twice[0]} more than once ({', '.join(names)}); run them one after the other "
            "into the same folder"
        )
    return suites


def _one(name: str, lengths: tuple[int, ...], options: Options) -> Suite:
    if name == "ruler":
        return _ruler((), lengths, options)
    source = "livecodebench" if name in VERSIONS else name
    if source == "livecodebench" and not options.allow_code:
        raise ValueError(f"{name}: {NO_LEAVE}")
    if source not in options.data:
        raise ValueError(
            f"suite {name}: its files are not part of this package; fetch them with --data {source}=hub, "
            "or download them "
            f"and give --data {source}=PATH (docs/evaluation.md says which)"
        )
    path, samples = options.data[source], options.samples
    if source == "livecodebench":
        return LiveCodeBenchSuite(
            path, VERSIONS.get(name, ("v5", "v6")), samples or 0, options.budget or BUDGET
        )
    return (
        MRCRSuite(path, lengths, samples or SAMPLES)
        if name == "mrcr"
        else NoLiMaSuite(path, lengths, samples or SAMPLES)
    )


def _ruler(tasks: tuple[str, ...], lengths: tuple[int, ...], options: Options) -> Suite:
    samples = options.samples or SAMPLES
    if "ruler" in options.data:
        return RulerFiles(options.data["ruler"], tasks, samples)
    return RulerSuite(tasks, lengths, samples, options.questions, options.seed, options.cache)
