"""The steps: commands in their order, each with what it needs, how long it takes on two cores, and the same
at tiny sizes, where nothing of it says anything about speed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from ...runs import package_command
from .needs import BASE, HYBRID, llama_python
from .registry import ROOT

SLACK = 3.0  # times its expected time that a step may take, and SPARE minutes
SPARE = 5.0
# Lines of the comparison with llama.cpp, and of the steps, that docs/speed.md shows.
_AGAINST = "sala-float32,sala-bfloat16,sala-int8,sala-int4,llama.cpp-F16,llama.cpp-Q8_0,llama.cpp-Q4_0"
_LONG = "sala-bfloat16,llama.cpp-F16"
_FOUR_TASKS = "niah_single_1,niah_multikey_2,vt,qa_1"


@dataclass(frozen=True)
class Measurement:
    """A step.

    Attributes:
        name: as `--only` takes it.
        command: what is run.
        smoke: the same at tiny sizes.
        minutes: that it takes on two cores, about.
        threads: of torch; None for those of the whole run.
        needs: names of `needs.NEEDS`.
    """

    name: str
    command: tuple[str, ...]
    smoke: tuple[str, ...]
    minutes: float
    threads: int | None = None
    needs: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """Seconds after which it is ended."""
        return 60 * (SLACK * self.minutes + SPARE)


def _script(name: object, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "scripts" / str(name)), *map(str, arguments))


def work_folder(folder: Path, name: str) -> Path:
    """Where a step puts what it makes; it is empty when the step begins, and gone when it is done."""
    return folder / "work" / name


def plan(folder: Path, gguf: str = "") -> list[Measurement]:
    """All steps in their order; their rows go to `folder`. `gguf`: the base's GGUF file, where it is
    needed."""
    train = ("train", "tiny", "-o", work_folder(folder, "train") / "run")
    return [
        *_kernels(folder),
        *_steps(),
        *_reading(folder),
        *_contexts(folder),
        *_server(gguf),
        *_converted(folder, gguf),
        *_evaluation(folder),
        Measurement(
            "train",
            package_command(*train),
            package_command(*train, "--plan"),
            9,
            threads=1,
        ),
    ]


def _kernels(folder: Path) -> list[Measurement]:
    ops = ("bench", "ops", "--device", "cpu", "--rows", folder / "results.csv")
    engine = ("--rows", folder / "engine.csv")
    tiny = (*engine, "--tokens", 500, "--contexts", "100,1000")
    hybrid = ("--model", HYBRID, "--tokens", 0)
    return [
        Measurement(
            "ops",
            package_command(*ops, "--million"),
            package_command(*ops, "--quick", "--unit", 8),
            22,
        ),
        Measurement("engine", _script("measure_engine.py", *engine), _script("measure_engine.py", *tiny), 3),
        Measurement(
            "engine-int8",
            _script("measure_engine.py", *engine, "--kv-dtype", "int8"),
            _script("measure_engine.py", *tiny, "--kv-dtype", "int8"),
            3,
        ),
        Measurement(
            "engine-hybrid",
            _script("measure_engine.py", *engine, *hybrid),
            _script("measure_engine.py", *engine, *hybrid, "--contexts", 100),
            6,
            needs=("hybrid",),
        ),
    ]


def _steps() -> list[Measurement]:
    quick = ("--preset", "quick", "--contexts", "1K", "--rounds", 1)
    shipped = ("--contexts", "100,3000", "--sequences", "1,8", "--forms", "one call,recorded")
    weights = ("--weights", "float32,bfloat16,int4", "--contexts", "4K,32K,256K")
    kept = ("--kv-dtype", "auto,bfloat16")
    both = ("--forms", "one call,layer by layer", "--rounds", 4)
    hybrid = ("--model", HYBRID, "--weights", "float32,bfloat16,int8,int4")
    return [
        Measurement(
            "steps",
            _script("measure_steps.py", *shipped),
            _script("measure_steps.py", *shipped, "--rounds", 1),
            1,
        ),
        Measurement(
            "steps-135m",
            _script("measure_steps.py", "--preset", "135m", *weights, *kept),
            _script("measure_steps.py", *quick, *weights[:2], *kept),
            4,
        ),
        Measurement(
            "steps-noting",
            _script("measure_steps.py", "--contexts", 8000, "--forms", "one call,noting", "--rounds", 30),
            _script("measure_steps.py", "--contexts", 4500, "--forms", "one call,noting", "--rounds", 1),
            1,
        ),
        Measurement(
            "int4",
            _script("measure_int4.py"),
            _script("measure_int4.py", "--shapes", "64x64", "--copies", 1, "--rounds", 1),
            1,
            needs=("auto-round",),
        ),
        Measurement(
            "steps-hybrid",
            _script("measure_steps.py", *hybrid, *kept, "--contexts", "4000,32000,256000", *both),
            _script("measure_steps.py", *hybrid[:2], "--contexts", "4000", "--rounds", 1),
            5,
            needs=("hybrid",),
        ),
    ]


def _reading(folder: Path) -> list[Measurement]:
    rows, quick = ("--rows", folder / "speed.csv"), ("--quick", "--lengths", 128, "--generate", 8)
    both = ("--search", "exact,hierarchical")
    return [
        Measurement(
            "parts",
            _script("measure_parts.py", "--preset", "small", "--tokens", "64K"),
            _script("measure_parts.py", "--preset", "small", "--tokens", "1K"),
            1,
        ),
        Measurement(
            "parts-256K",
            _script("measure_parts.py", "--preset", "small", "--tokens", "256K", *both),
            _script("measure_parts.py", "--preset", "small", "--tokens", "5K", *both),
            1.5,
        ),
        Measurement(
            "parts-135m",
            _script(
                "measure_parts.py", "--preset", "135m", "--weights", "float32,bfloat16", "--tokens", "8K"
            ),
            _script(
                "measure_parts.py", "--preset", "quick", "--weights", "float32,bfloat16", "--tokens", "1K"
            ),
            2,
        ),
        Measurement(
            "parts-135m-64K",
            _script("measure_parts.py", "--preset", "135m", "--weights", "bfloat16", "--tokens", "64K"),
            _script("measure_parts.py", "--preset", "quick", "--weights", "bfloat16", "--tokens", "5K"),
            2,
        ),
        Measurement(
            "llama.cpp",
            package_command("bench", "speed", "--lengths", "2K,4K,16K", "--against", _AGAINST, *rows),
            package_command("bench", "speed", *quick, "--against", _AGAINST, *rows),
            15,
            needs=("llama.cpp",),
        ),
        Measurement(
            "llama.cpp-32K",  # beyond, llama.cpp would take half an hour and more
            package_command(
                "bench", "speed", "--lengths", "32K,64K", "--limit", 700, "--against", _LONG, *rows
            ),
            package_command("bench", "speed", *quick, "--against", _LONG, *rows),
            10,
            needs=("llama.cpp",),
        ),
    ]


def _contexts(folder: Path) -> list[Measurement]:
    def kept(name: str) -> Path:
        return work_folder(folder, name) / "kept.ctx"

    def tiers(name: str, *options: object) -> Measurement:
        command = ("measure_tiers.py", "--context", kept(name), *options)
        tiny = ("--tokens", 4500, "--parts", 2, "--rounds", 1)
        return Measurement(name, _script(*command, "--rounds", 4), _script(*command, *tiny), 4)

    def contexts(name: str, tokens: int, minutes: float) -> Measurement:
        command = ("measure_contexts.py", "--context", kept(name), "--tokens")
        small = _script(*command, 4500, "--rounds", 1, "--parts", 2)
        return Measurement(name, _script(*command, tokens), small, minutes, threads=1)

    reading = ("measure_contexts.py", "--context", kept("ingest"), "--tokens")
    return [
        Measurement(
            "ingest",
            _script(*reading, 262_144, "--ingesting", 40_000_000),
            _script(*reading, 4500, "--ingesting", 3_000_000),
            3,
            threads=1,
        ),
        tiers("tiers"),
        tiers("tiers-int8", "--kv-dtype", "int8"),
        contexts("contexts", 262_144, 5),
        contexts("contexts-1m", 1_079_000, 30),
    ]


def _server(gguf: str) -> list[Measurement]:
    serve = f"{sys.executable} -m opensala serve --port {{port}} --max-new-tokens 200000"
    cached, hybrid = (
        "--max-cached-tokens 300000",
        f"{serve} --speculate 0 --max-cached-tokens 40000 --kv-dtype float32 {HYBRID}",
    )

    def stall(name: str, command: str, *needs: str, long: bool = True, stream: int = 200_000) -> Measurement:
        start = ("measure_stall.py", "--name", name, "--start", command)
        tokens, tiny = (65_000, 3000) if long else (3900, 500)
        return Measurement(
            name,
            _script(*start, "--tokens", tokens, "--stream-tokens", stream),
            _script(*start, "--tokens", tiny, "--stream-tokens", min(stream, 20_000), "--idle", 1),
            2,
            needs=needs,
        )

    python = llama_python() or "python"

    def other(name: str, *options: str) -> Measurement:
        server = f"{python} -m llama_cpp.server --model {gguf} --n_ctx 8192"
        command = [f"{server} --port {{port}}", *options]
        return stall(name, " ".join(command), "llama.cpp's server", "gguf", long=False, stream=2000)

    replicas = ("replicas.py", "--seconds")
    return [
        stall("stall", f"{serve} --speculate 0 {cached}", "serve"),
        stall("stall-drafts", f"{serve} {cached}", "serve"),
        stall("stall-hybrid", hybrid, "serve", "hybrid", long=False, stream=20_000),
        other("stall-llama.cpp"),
        other("stall-llama.cpp-whole", "--interrupt_requests", "False"),
        Measurement(
            "replicas",
            _script(*replicas, 36),
            _script(*replicas, 6, "--contexts", 1, "--clients", 2),
            1.5,
            needs=("serve", "nginx"),
        ),
    ]


def _converted(folder: Path, gguf: str) -> list[Measurement]:
    beside = (HYBRID, "--teacher", BASE, "--rows", folder / "real_speed.csv")
    every = ("--hybrids", "float32,auto+float32,auto+bfloat16,auto+int8", "--dtypes", "float32,bfloat16")
    few = ("--hybrids", "auto", "--dtypes", "bfloat16", "--lengths", "512", "--layers", 2)
    llama = ("compare_llama.py", "--gguf", gguf, "--model", HYBRID)
    tiny = _script("measure_real_speed.py", *beside, *few)
    return [
        Measurement(
            "real", _script("measure_real_speed.py", *beside, *every), tiny, 5, needs=("hybrid", "base")
        ),
        Measurement(
            "real-long",
            _script("measure_real_speed.py", *beside, *every, "--lengths", "16K,32K", "--layers", 2),
            tiny,
            10,
            needs=("hybrid", "base"),
        ),
        Measurement(
            "llama-contexts",
            _script(*llama),
            _script(*llama, "--tokens", 600),
            4,
            threads=1,
            needs=("llama_cpp", "gguf", "hybrid"),
        ),
    ]


def _evaluation(folder: Path) -> list[Measurement]:
    def scored(name: str, minutes: float, tasks: str, length: str, *options: object) -> Measurement:
        out = work_folder(folder, name) / "samples"
        command = ("eval", "--suite", tasks, "--no-cache", *options, "-o", out, "--lengths")
        return Measurement(
            name,
            package_command(*command, length),
            package_command(*command, 1024, "--samples", 1),
            minutes,
            threads=1,
        )

    saved = [
        scored(f"eval-{length}-{n}", minutes, _FOUR_TASKS, length, "--samples", 5, "--questions", n)
        for length, n, minutes in (("4K", 1, 1), ("4K", 5, 1), ("32K", 1, 3), ("32K", 5, 1))
    ]
    once = ("--samples", 1, "--questions", 5)
    return [
        *saved,
        scored("eval-64K", 1, "niah_single_1", "64K", *once),
        scored("eval-64K-dense", 3, "niah_single_1", "64K", *once, "--attention-mode", "dense"),
        scored("eval-1M", 12, "niah_single_1", "1M", *once),
    ]
