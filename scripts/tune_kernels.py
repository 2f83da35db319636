"""Look for better launch configurations of block-sparse attention in prefill, on a CUDA GPU, in a minute.

    python scripts/tune_kernels.py [--output DIR] [--seconds 45] [--only merge,pair,band,op] [--each N]
        [--rehearse]

The case is one layer of the released model: the last 4,096 queries of 64K tokens in bf16, neighbours alike.
Compiling takes most of the time, so all variants are compiled first, by processes side by side that share
Triton's cache on disk; then they are timed one after the other. A variant of one kernel is launched on the
arguments of a real call and compared with what the configuration in use makes of them; a variant of the
whole op (and the best of each kernel together) with rows in float64. Every row goes to DIR/tune_kernels.csv
at once. `--each` limits the variants of each kernel; the first are the most telling.

A variant that does not compile, does not fit the GPU, or is not ready in time is noted and left out.
`--rehearse` does all this at a tiny size, in Triton's interpreter where there is no GPU.
"""

import csv
import importlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import typer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

MODULES = [f"opensala.ops.sparse.triton_{n}" for n in ("shared", "index", "band", "pairs", "attend")]
CONFIGS = {"merge": "triton_attend.merge_config", "pair": "triton_pairs.pair_config"}
CONFIGS["band"] = "triton_pairs.band_config"
NUMBERS = {"PART_BYTES": "triton_pairs.PART_BYTES", "PORTION": "triton_shared.PORTION"}
OUTPUTS = {"merge": ("out", "lse"), "pair": ("parts", "part_lse"), "band": ("out", "lse")}
COLUMNS = ("kernel", "variant", "ms", "error", "registers", "spills", "shared", "compile_s", "note")
TOLERANCE = 2e-2  # of bf16, relative to the largest element or 1
COMPILING = 0.7  # of the time, at most
TIMES = 11
MIB = 1 << 20


class Variant(NamedTuple):
    """Changes to configurations (by kernel) and constants; `kernel` is what is timed: one, or "op"."""

    kernel: str
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        parts = [
            " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else f"{n}={x}"
            for n, x in self.changes.items()
        ]
        return "; ".join(parts) or "in use"


class Launch(NamedTuple):
    """A launch of a kernel that was asked for."""

    module: str
    kernel: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def task(self) -> tuple[str, str, list[Any], dict[str, Any]]:
        """What another process needs to compile it: dtypes in place of tensors."""
        return self.module, self.kernel, [getattr(x, "dtype", x) for x in self.args], self.options


class Recorder:
    """In place of a kernel: notes every launch, and passes it on unless `dry`."""

    def __init__(self, kernel: Any, notes: list[Launch], dry: bool) -> None:
        self.kernel, self.notes, self.dry = kernel, notes, dry

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            function = self.kernel.fn
            short = function.__name__.removesuffix("_kernel")
            kept = with_any_counts(self.kernel, args)
            if not self.dry and short in OUTPUTS:
                first = all(n.kernel != function.__name__ for n in self.notes)
                kept = with_fresh_outputs(self.kernel, short, args) if first else ()
            self.notes.append(Launch(function.__module__, function.__name__, grid, kept, options))
            if not self.dry:
                self.kernel[grid](*args, **options)

        return launch


def with_fresh_outputs(kernel: Any, short: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a launch with copies of what it writes."""
    return tuple(
        x.clone() if n in OUTPUTS[short] else x for n, x in zip(kernel.arg_names, args, strict=False)
    )


def with_any_counts(kernel: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with one value for all numbers on which compiling does not depend: chunks that differ in
    them alone are compiled once."""
    from opensala.ops.sparse.triton_rows import COUNTS

    return tuple(
        2 if n in COUNTS and type(x) is int and x < 1 << 31 else x
        for n, x in zip(kernel.arg_names, args, strict=False)
    )


@contextmanager
def recorded(dry: bool) -> Iterator[list[Launch]]:
    """The launches of the kernels of block-sparse attention, in order."""
    notes: list[Launch] = []
    with ExitStack() as stack:
        for name in MODULES:
            module = importlib.import_module(name)
            for attribute, kernel in list(vars(module).items()):
                if attribute.endswith("_kernel"):
                    stack.enter_context(patch.object(module, attribute, Recorder(kernel, notes, dry)))
        yield notes


@contextmanager
def changed(changes: dict[str, Any]) -> Iterator[None]:
    """The package with these configurations and constants."""
    with ExitStack() as stack:
        for name, value in changes.items():
            path = f"opensala.ops.sparse.{(CONFIGS | NUMBERS)[name]}"
            module, attribute = path.rsplit(".", 1)
            if name in CONFIGS:
                value = _overriding(getattr(importlib.import_module(module), attribute), value)
            stack.enter_context(patch.object(importlib.import_module(module), attribute, value))
        yield


def _overriding(config: Callable[..., dict[str, Any]], more: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    return lambda *args: {**config(*args), **more}


def chosen_variants(only: set[str], each: int) -> list[Variant]:
    """What is in use, and the first variants of the kernels in `only`."""
    found = variants()
    for kernel in (*CONFIGS, "op"):
        mine = [v for v in found if v.kernel == kernel and v.changes]
        for left_out in mine[each if kernel in only else 0 :]:
            found.remove(left_out)
    return found


def variants() -> list[Variant]:
    """All variants, the most telling of each kernel first."""
    found = [Variant(kernel, {}) for kernel in (*CONFIGS, "op")]
    merges: list[dict[str, Any]] = [
        {"R": r, "TOGETHER": together, "num_warps": warps}
        for r, together, warps in (
            (2, 16, 4),
            (1, 32, 4),
            (2, 8, 2),
            (1, 8, 1),
            (1, 16, 2),
            (4, 16, 8),
            (8, 8, 8),
        )
    ]
    bands: list[dict[str, Any]] = [{"num_stages": 2}, {"num_stages": 2, "maxnreg": 128}, {"BN": 32}]
    bands += [{"BN": 32, "maxnreg": 128}, {"num_stages": 4}]
    pairs: list[dict[str, Any]] = [{"num_stages": 2}, {"PQ": 8, "num_warps": 8}]
    pairs += [{"num_stages": 1}, {"num_stages": 4}, {"num_warps": 8}, {"PQ": 8}]
    ops: list[dict[str, Any]] = [{"PART_BYTES": n * MIB} for n in (256, 512, 2048)]
    ops += [{"PORTION": 3}, {"PORTION": 4}, {"band": {"BQ": 16, "num_warps": 16, "num_stages": 2}}]
    ops += [{"band": {"BQ": 4, "num_warps": 4, "num_stages": n}} for n in (2, 3)]
    for kernel, changes in (("merge", merges), ("band", bands), ("pair", pairs)):
        found += [Variant(kernel, {kernel: c}) for c in changes]
    return found + [Variant("op", c) for c in ops]


class Problem:
    """One call: q `[1, T, Hq, D]`, k and v `[1, L, Hkv, D]`, block lists `[1, T, Hkv, K]`."""

    def __init__(self, tiny: bool, device: str) -> None:
        import torch

        from opensala.bench.cases import Shape
        from opensala.bench.gpu.kernels import draw
        from opensala.bench.gpu.sizes import TINY, K, Sizes

        sizes = TINY if tiny else Sizes()
        self.device = torch.device(device)
        self.spec = sizes.spec._replace(topk=5) if tiny else sizes.spec  # some that are not forced
        self.length = 160 if tiny else 64 * K
        dtype = torch.float32 if device == "cpu" else torch.bfloat16  # the interpreter gets bf16 wrong
        shape = Shape(sizes.chunk, sizes.heads, sizes.kv_heads, sizes.dim, dtype, self.spec)
        queries = "random" if tiny else "correlated"  # few that are alike would share every block
        self.q, self.k, self.v = draw(shape, self.device, queries, self.length)
        lists = (1, sizes.chunk, sizes.kv_heads, self.spec.num_blocks)
        self.blocks = torch.zeros(lists, dtype=torch.int32, device=device)  # enough to see the launches

    def select(self) -> None:
        """Choose the blocks; without Triton, as those kernels would have to be compiled too."""
        from opensala.ops import select_blocks

        try:
            blocks = select_blocks(self.q, self.k, self.spec, backend="torch")
        except RuntimeError as problem:  # out of memory, above all
            say(f"select_blocks in Triton, as in torch: {one_line(problem)}")
            blocks = select_blocks(self.q, self.k, self.spec, backend="triton")
        self.blocks = blocks.contiguous()

    def attend(self) -> Any:
        from opensala.ops.sparse.triton_pairs import attend_by_block
        from opensala.ops.sparse.triton_rows import positive_factor, rows_of

        rows = rows_of(self.q, self.length, None, None)
        q, factor = positive_factor(self.q, self.q.shape[-1] ** -0.5)
        return attend_by_block(q, self.k, self.v, self.blocks, self.spec.block_size, rows, factor)[0]

    def exact(self) -> dict[int, Any]:
        """A few rows in float64."""
        from opensala.ops import sparse_attention

        count, found = self.q.shape[1], {}
        for i in (0, count // 3, count - 2):
            end = self.length - count + i + 1
            q, k, v = self.q[:, i : i + 1], self.k[:, :end], self.v[:, :end]
            q, k, v = (x.double().cpu() for x in (q, k, v))
            mine = self.blocks[:, i : i + 1].cpu()
            found[i] = sparse_attention(q, k, v, mine, self.spec.block_size, backend="naive")
        return found

    def wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compile_task(task: tuple[str, str, list[Any], dict[str, Any]]) -> tuple[float, str]:
    """In a process of its own: compile into the cache on disk. Returns seconds, and what went wrong if
    anything."""
    module, kernel, args, options = task
    started = time.perf_counter()
    try:
        getattr(importlib.import_module(module), kernel).warmup(*args, grid=(1,), **options)
    except Exception as problem:  # whatever the compiler raises: the others go on
        return time.perf_counter() - started, one_line(problem)
    return time.perf_counter() - started, ""


def one_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"[:200]


def measured(problem: Problem, work: Callable[[], Any], times: int = TIMES) -> float:
    """Median milliseconds of one work."""
    import torch

    if problem.device.type != "cuda":
        started = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - started)
    work()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    torch.cuda._sleep(2_000_000)  # a millisecond in which the launches queue up
    for begin, end in events:
        begin.record()
        work()
        end.record()
    problem.wait()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def difference(got: Any, wanted: Any) -> float:
    """Largest difference over the largest element, or 1; equal infinities do not differ."""
    import torch

    got, wanted = got.float(), wanted.float().to(got.device)
    apart = torch.where(got == wanted, 0.0, (got - wanted).abs())
    largest = wanted.abs().nan_to_num(0, 0, 0).max().clamp(min=1)
    return (apart.max() / largest).item()


class Tuner:
    """The variants with what is known about each."""

    def __init__(self, problem: Problem, output: Path, end: float, chosen: list[Variant]) -> None:
        self.problem, self.end, self.path = problem, end, output / "tune_kernels.csv"
        self.variants = chosen
        self.rows: list[dict[str, Any]] = []
        self.plans: list[list[Launch]] = []
        self.real: dict[str, Launch] = {}
        self.wanted: dict[str, Any] = {}
        output.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)

    def plan(self) -> None:
        """Find out what each variant launches; nothing is computed."""
        for variant in self.variants:
            with changed(variant.changes), recorded(dry=True) as notes:
                self.problem.attend()
            short = f"{variant.kernel}_kernel"
            self.plans.append([n for n in notes if variant.kernel == "op" or n.kernel == short])

    def compile(self, workers: int, until: float) -> None:
        """Compile everything in processes side by side; meanwhile, choose the blocks."""
        tasks = {repr(launch.task()): launch.task() for plan in self.plans for launch in plan}
        with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving it ends what still runs
            self.jobs = {name: pool.apply_async(compile_task, (task,)) for name, task in tasks.items()}
            self.problem.select()
            self.exact = self.problem.exact()
            while time.time() < until and not all(j.ready() for j in self.jobs.values()):
                say(f"{sum(j.ready() for j in self.jobs.values())} of {len(tasks)} kernels compiled")
                time.sleep(min(1.0, max(0.0, until - time.time())))
            self.results = {name: j.get() for name, j in self.jobs.items() if j.ready()}
        say(f"{len(self.results)} of {len(tasks)} kernels compiled")

    def state(self, plan: list[Launch]) -> tuple[float, str]:
        """Seconds that compiling took, and why the variant cannot be timed."""
        names = {repr(launch.task()) for launch in plan}
        done = [self.results[n] for n in names if n in self.results]
        faults = [fault for _, fault in done if fault] or ["not compiled in time"] * (len(done) < len(names))
        return sum(seconds for seconds, _ in done), "".join(faults[:1])

    def run(self) -> None:
        """Time all variants, and the best of each kernel together."""
        with recorded(dry=False) as notes:
            self.problem.attend()
        for launch in notes:
            self.real.setdefault(launch.kernel, launch)
        self.problem.wait()
        for variant, plan in zip(self.variants, self.plans, strict=True):
            seconds, note = self.state(plan)
            self.add(variant, seconds, note if variant.changes else "", plan)  # the call above compiled those
        best = {k: v.changes[k] for k in CONFIGS if (v := self.best(k)).changes}
        self.add(Variant("op", best), 0.0, "", [])
        for name, value in self.best("op").changes.items():
            if name in NUMBERS:
                self.add(Variant("op", {**best, name: value}), 0.0, "", [])

    def best(self, kernel: str) -> Variant:
        timed = [
            (r["ms"], v) for r, v in zip(self.rows, self.variants, strict=False) if r["kernel"] == kernel
        ]
        timed = [(ms, v) for ms, v in timed if ms]
        return min(timed, key=lambda x: x[0])[1] if timed else Variant(kernel, {})

    def add(self, variant: Variant, seconds: float, note: str, plan: list[Launch]) -> None:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"kernel": variant.kernel, "variant": variant.name}
        row |= {"compile_s": f"{seconds:.1f}", "note": note}
        if not note and time.time() > self.end:
            row["note"] = "no time left"
        if not row["note"]:
            try:
                row |= self.op(variant) if variant.kernel == "op" else self.kernel(variant, plan[0])
            except Exception as problem:  # too much shared memory, too many registers, ...
                row["note"] = one_line(problem)
        if row["ms"] and not row["error"] < TOLERANCE:
            row["note"] = f"WRONG; took {row['ms']:.4f} ms"
            row["ms"] = ""
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)

    def op(self, variant: Variant) -> dict[str, Any]:
        with changed(variant.changes):
            out = self.problem.attend()
            errors = [difference(out[:, i : i + 1].double(), x) for i, x in self.exact.items()]
            return {"ms": measured(self.problem, self.problem.attend), "error": max(errors)}

    def kernel(self, variant: Variant, planned: Launch) -> dict[str, Any]:
        """Launch one kernel on the arguments of the real call."""
        real, short = self.real[planned.kernel], variant.kernel
        kernel = getattr(importlib.import_module(real.module), real.kernel)
        args = with_fresh_outputs(kernel, short, real.args)
        compiled = kernel[planned.grid](*args, **planned.options)
        named = dict(zip(kernel.arg_names, args, strict=False))
        out, lse = (named[n] for n in OUTPUTS[short])
        out = out.masked_fill((lse == float("-inf"))[..., None], 0.0)  # never written
        if short not in self.wanted:
            self.wanted[short] = out.clone(), lse.clone()
        wanted = self.wanted[short]
        error = max(difference(out, wanted[0]), difference(lse, wanted[1]))
        ms = measured(self.problem, lambda: kernel[planned.grid](*args, **planned.options))
        facts = {"ms": ms, "error": error}
        if compiled is not None:
            facts |= {"registers": compiled.n_regs, "spills": compiled.n_spills}
            facts["shared"] = compiled.metadata.shared
        return facts

    def table(self) -> None:
        """Each kernel's variants, best first."""
        if "merge_kernel" in self.real:
            parts = self.real["merge_kernel"].args[:2]
            used = (parts[1] > float("-inf")).sum().item()
            moved = used * parts[0].shape[-1] * parts[0].element_size()
            print(f"merge: {used} of {parts[1].numel()} parts exist, {moved / 1e6:.0f} MB")
        for kernel in (*CONFIGS, "op"):
            rows = sorted(
                (r for r in self.rows if r["kernel"] == kernel), key=lambda r: r["ms"] or float("inf")
            )
            print(f"{kernel}:")
            for r in rows:
                ms = f"{r['ms']:9.4f} ms, error {r['error']:.1e}" if r["ms"] else " " * 28
                used = f"{r['registers']} regs {r['spills']} spilt {r['shared']} B" * (r["registers"] != "")
                print(f"  {ms}  {r['variant']:62} {used} {r['note']}".rstrip())


def say(line: str) -> None:
    print(f"tune_kernels: {line}", file=sys.stderr, flush=True)


def main(
    output: Annotated[Path, typer.Option(help="Folder for tune_kernels.csv.")] = Path("build"),
    seconds: Annotated[float, typer.Option(min=1, help="Wall-clock seconds for everything.")] = 45.0,
    only: Annotated[str, typer.Option(help="What is varied.")] = "merge,pair,band,op",
    each: Annotated[int, typer.Option(min=0, help="Most variants of each kernel.")] = 99,
    rehearse: Annotated[bool, typer.Option(help="Tiny sizes; no GPU needed.")] = False,
) -> None:
    """Look for better launch configurations of block-sparse attention in prefill."""
    began = time.time()
    unknown = set(only.split(",")) - {*CONFIGS, "op"}
    if unknown:
        raise typer.BadParameter(f"--only takes merge, pair, band and op, got {', '.join(sorted(unknown))}")
    if rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that compile
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (torch.cuda.is_available() or interpreted):
        raise typer.BadParameter("no CUDA GPU here; --rehearse needs none")
    with torch.no_grad():
        torch.manual_seed(0)
        problem = Problem(rehearse, "cpu" if interpreted else "cuda")
        tuner = Tuner(problem, output, began + seconds, chosen_variants(set(only.split(",")), each))
        tuner.plan()
        workers = 1 if interpreted else max(1, (os.cpu_count() or 2) - 1)
        tuner.compile(workers, began + COMPILING * seconds)
        tuner.run()
    print(f"{'interpreter' if interpreted else torch.cuda.get_device_name()}, torch {torch.__version__}")
    tuner.table()
    say(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
