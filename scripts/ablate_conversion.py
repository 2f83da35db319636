"""What parts of the conversion are worth on a teacher: short distillations that differ in one thing each.

    python scripts/ablate_conversion.py TEACHER --tokens train.npy --tokens questions_1024.npy
    --output runs/ablations --device cuda
    python scripts/ablate_conversion.py --output runs/ablations --plot docs/images/hype.png

The mixers of all layers are calibrated and aligned once; every variant starts from a copy of them and is
distilled on the same batches in the same order (another seed: another order). Gates and QK-norm are part of
a mixer, so the variants without them are aligned on their own, on the same batches. The loss is the
divergence from the teacher and nothing else. A line for each variant goes to OUTPUT/ablations.jsonl as soon
as it is measured; a variant that is there already is not measured again. `--plot` draws the curves of HyPE
from that file and prints a table of all variants.
"""

import argparse
import copy
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensala.convert.align import Alignment
from opensala.convert.aligning import calibrate_mixers
from opensala.convert.config import ConvertConfig, Execution, Probes, smollm2_135m
from opensala.convert.distilling import distillation_of, fade, prepare, validated
from opensala.convert.files import RunFiles
from opensala.convert.loop import PhaseLoop, Settings
from opensala.convert.opening import configured
from opensala.convert.ranks import Ranks
from opensala.convert.report import plot_curves
from opensala.convert.selection import select_layers
from opensala.convert.teacher import read_config, teacher_config
from opensala.convert.transfer import assemble, lightning_mixers
from opensala.convert.work import Work
from opensala.model import MiniCPMSALAForCausalLM
from opensala.ops.backends import backend_everywhere

BASE = "hype_at_once"
CURVES = {BASE: "HyPE at once", "hype_faded": "HyPE, faded in", "rope_kept": "RoPE kept"}
FEWER = (0, 17, 18, 29)  # of SmolLM2's eight: the ends, and the layers whose heads copy (docs/smollm2.md)
GATES = ("z_proj", "o_gate")
FILE = "ablations.jsonl"


@dataclass(frozen=True)
class Variant:
    """One thing that is otherwise. `changes`: of the configuration; `mixers`: a key of `MIXERS`."""

    name: str
    layers: tuple[int, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    mixers: str = "whole"


def filled(kept: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Kept layers and as many more as make `count`, each in the middle of the widest gap that is left."""
    found = sorted(kept)
    while len(found) < count:
        gaps = [(b - a, -a) for a, b in zip(found, found[1:], strict=False)]
        width, start = max(gaps)
        if width < 2:
            raise ValueError(f"layers: {list(kept)} leave no room for {count} between their ends")
        found = sorted([*found, -start + width // 2])
    return tuple(found)


def variants(kept: tuple[int, ...], fewer: tuple[int, ...], total: int, fade_tokens: int) -> list[Variant]:
    """All of them for a teacher of `total` layers, the most telling first: what runs out of time is last."""
    uniform = select_layers(None, len(kept), layers=total, fix_ends=True, rule="uniform")
    more = filled(kept, round(total / 2))
    return [
        Variant(BASE, kept),
        Variant("hype_faded", kept, {"hype_fade": fade_tokens}),
        Variant("rope_kept", kept, {"hype": False}),
        Variant("uniform", tuple(uniform)),
        Variant(f"layers_{len(fewer)}", fewer),
        Variant(f"layers_{len(more)}", more),
        Variant("no_gates", kept, mixers="no gates"),
        Variant("attn_qk_norm", kept, {"attn_qk_norm": True}),
        Variant("no_qk_norm", kept, mixers="no QK-norm"),
    ]


def freeze_gates(module: nn.Module) -> None:
    """Gates stay zero: a factor of exactly one, with the output projection that is doubled for them."""
    for name, part in module.named_modules():
        if name.rpartition(".")[2] in GATES:
            part.requires_grad_(False)


def drop_qk_norm(mixers: nn.Module) -> None:
    """Take the norms of queries and keys out of Lightning mixers."""
    for mixer in mixers.children():
        mixer.config = copy.copy(mixer.config)  # one object for the mixers of all layers
        mixer.config.qk_norm = False  # type: ignore[union-attr]
        del mixer.q_norm, mixer.k_norm


MIXERS = {"whole": None, "no gates": freeze_gates, "no QK-norm": drop_qk_norm}


class Records(RunFiles):
    """Keeps the lines of a phase's metrics, and leaves nothing on disk."""

    def __init__(self, like: RunFiles) -> None:
        super().__init__(like.path, None, like.ranks)
        self.lines: list[dict[str, Any]] = []

    def log(self, record: dict[str, Any]) -> None:
        self.lines.append(record)


class UnsavedLoop(PhaseLoop):
    """A phase of minutes, which nobody resumes: its states would cost more than it does."""

    def _restore(self, trainee: Any) -> tuple[int, bool]:
        return 0, False

    def _save(self, trainee: Any, step: int, done: bool) -> None:
        pass


def loop_of(work: Work, name: str, **more: Any) -> tuple[UnsavedLoop, Records]:
    """The loop of a phase of `work`, and where its metrics are."""
    config, records = work.config, Records(work.files)
    phase, length = config.phases()[name], config.length_of(name)
    settings = Settings(name, phase, length, work.device, phase.steps, config.validate_every)
    loop = UnsavedLoop(
        records,
        settings,
        work.execution,
        work.clock,
        lambda step: work.batch(name, step),
        nn.Module(),
        quiet=work.quiet,
        **more,
    )
    return loop, records


class Ablation:
    """Variants of one conversion. `work` is loaded: teacher, data and probes are shared by all of them."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.teacher = self._score(work, work.teacher)
        self.sets: dict[str, tuple[nn.ModuleList, dict[str, Any]]] = {}
        self.took = 0.0  # seconds of the last variant

    def expected(self, variant: Variant) -> float:
        """Seconds that a variant takes, if it takes those of what went before."""
        alignments = [note["seconds"] for _, note in self.sets.values()]
        return self.took + (0.0 if variant.mixers in self.sets else max(alignments, default=0.0))

    def aligned(self, kind: str) -> tuple[nn.ModuleList, dict[str, Any]]:
        """Aligned mixers of a kind, made when first asked for, and what their alignment came to."""
        if kind not in self.sets:
            begun, part, prepared = time.perf_counter(), copy.copy(self.work), MIXERS[kind]
            part.mixers = lightning_mixers(part.teacher, part.config.lightning_nkv)
            if prepared is not None:
                prepared(part.mixers)
            before = calibrate_mixers(part, "calibration")
            trained = Alignment(part.teacher, part.mixers, part.config.align, part.compute, part.config.clip)
            loop_of(part, "align")[0].run(trained)
            after = calibrate_mixers(part, "calibration_aligned")
            part.mixers.requires_grad_(False)
            errors = {"transferred": before.before, "calibrated": before.after, "aligned": after.after}
            note = {name: statistics.mean(values) for name, values in errors.items()}
            self.sets[kind] = part.mixers, {**note, "seconds": time.perf_counter() - begun}
        return self.sets[kind]

    def part(self, variant: Variant, seed: int) -> Work:
        """The work with a variant's configuration and mixers, and a seed's order of the data."""
        part = copy.copy(self.work)
        part.config = replace(part.config, layers=variant.layers, seed=seed, **variant.changes)
        part.batches = copy.copy(part.batches)
        part.batches.config = part.config  # the order follows the seed; the probes stay those of the base
        part.mixers = self.aligned(variant.mixers)[0]
        return part

    def student(self, part: Work, variant: Variant) -> MiniCPMSALAForCausalLM:
        """The variant before its distillation, with weights of its own."""
        built = configured(part.config, part.teacher.config, list(variant.layers))
        built.qk_norm = variant.mixers != "no QK-norm"
        student = assemble(part.teacher, built, dict(enumerate(part.mixers)), torch.float32)
        student.set_attention_mode("dense")
        return student

    def run(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Distil a variant; its line of the file. A loss that is not finite or a lack of memory is noted
        there as `error`, and the next variant goes on."""
        self.aligned(variant.mixers)  # its seconds are its own
        self._clear()
        begun, part = time.perf_counter(), self.part(variant, seed)
        note = {"variant": variant.name, "seed": seed, "layers": list(variant.layers)}
        note |= {"alignment": self.aligned(variant.mixers)[1], "teacher": self.teacher}
        student = self.student(part, variant)
        try:
            found = self._distilled(part, student, variant)
        except (ValueError, torch.OutOfMemoryError) as error:
            found = {"error": str(error)}
        note |= found
        if part.device.type == "cuda":
            note["peak_gib"] = torch.cuda.max_memory_allocated(part.device) / 2**30
        self.took = time.perf_counter() - begun
        return note | {"seconds": self.took}

    def _distilled(self, part: Work, student: MiniCPMSALAForCausalLM, variant: Variant) -> dict[str, Any]:
        phase = part.config.distill
        trained = distillation_of(part, student, phase)
        if variant.mixers == "no gates":
            freeze_gates(student)
            trained.parameters = [p for p in student.parameters() if p.requires_grad]
            trained.begin(phase)
        prepare(part, student, phase)
        done = 0

        def before(step: int) -> None:
            nonlocal done
            done = step + 1
            fade(part, student, step)

        def measured() -> dict[str, float]:
            fade(part, student, done if done < phase.steps else None)
            return validated(part, student)

        fade(part, student, 0)
        with torch.no_grad():
            start = validated(part, student)
        loop, records = loop_of(part, "distill", validate=measured, before=before)
        loop.run(trained)
        a_step = phase.batch * part.config.length_of("distill")
        curve = [[(line["step"] + 1) * a_step, line["loss"]] for line in records.lines]
        points = [{"tokens": (r["step"] + 1) * a_step} | r["valid"] for r in records.lines if "valid" in r]
        speed = statistics.median(line["tokens_per_second"] for line in records.lines)
        measures = [{"tokens": 0, **start}, *points]
        return {"tokens_per_second": speed, "curve": curve, "measured": measures, "final": points[-1]}

    @staticmethod
    def _score(work: Work, model: MiniCPMSALAForCausalLM) -> dict[str, float]:
        with work.measuring(), torch.no_grad():
            score = work.prober.builtin(model)
        return {"recall": score.recall, "nll": score.nll}

    def _clear(self) -> None:
        gc.collect()
        if self.work.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.work.device)


def configuration(options: argparse.Namespace) -> ConvertConfig:
    """The base: the recipe of SmolLM2 with the phases and probes that were asked for.

    Raises ValueError for phases of less than a batch.
    """
    base = smollm2_135m(options.teacher)
    length, align_length = options.length, min(options.length, 512)
    align = replace(base.align, seconds=None, batch=options.batch, length=align_length)
    align = align.for_tokens(options.align_tokens, align_length, "align")
    # the divergence alone: what answers count more in the recipe would blur the curves
    distill = replace(base.distill, seconds=None, batch=options.batch, length=length)
    distill = replace(distill, answer_weight=1.0, cross_entropy=0.0)
    distill = distill.for_tokens(options.distill_tokens, length, "distill")
    return replace(
        base,
        device=options.device,
        compute=options.compute,
        tokens=tuple(options.tokens),
        layers=options.layers,
        length=align_length,
        lightning_nkv=teacher_config(read_config(options.teacher)).num_key_value_heads,
        align=replace(align, warmup=max(1, min(5, align.steps // 10))),
        distill=replace(distill, warmup=max(1, min(20, distill.steps // 10))),
        long=None,
        probes=Probes(align_length, options.probes, min(options.probes, 16)),
        validate_every=math.ceil(options.measure_every / (options.batch * length)),
        calibrate_tokens=options.calibrate_tokens,
        seed=options.seeds[0],
    )


def known_lines(path: Path) -> list[dict[str, Any]]:
    """What a file of this script holds, without variants that failed; nothing where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if "error" not in record]


def planned(options: argparse.Namespace, total: int) -> list[tuple[Variant, int]]:
    """Variants and seeds to run, in order, without those that the file has.

    Raises ValueError for a name in `--only` that no variant has.
    """
    every = variants(options.layers, options.fewer, total, options.fade_tokens)
    names = [variant.name for variant in every]
    unknown = [name for name in options.only or [] if name not in names]
    if unknown:
        raise ValueError(f"only: must be among {', '.join(names)}, got {', '.join(unknown)}")
    done = {(record["variant"], record["seed"]) for record in known_lines(options.output / FILE)}
    chosen = [variant for variant in every if not options.only or variant.name in options.only]
    return [(v, seed) for seed in options.seeds for v in chosen if (v.name, seed) not in done]


def measure(options: argparse.Namespace) -> None:
    """Run what is planned, as far as the time goes."""
    begun, config, run = time.monotonic(), configuration(options), options.output / "run"
    total = teacher_config(read_config(options.teacher)).num_hidden_layers
    todo = planned(options, total)
    execution = Execution(micro_tokens=options.micro_tokens, recompute=options.recompute)
    execution.check()
    resumed = (run / "config.json").exists()
    with backend_everywhere(None):
        work = Work(config, run, resumed, options.quiet, execution, Ranks())
        assert work.folder is not None, "one process"
        with work.folder.held(), (options.output / FILE).open("a") as file:
            work.load()
            ablation = Ablation(work)
            print(f"loaded in {time.monotonic() - begun:.0f} s; {len(todo)} to run", file=sys.stderr)
            for variant, seed in todo:
                over = time.monotonic() - begun + ablation.expected(variant)
                if options.seconds and over > options.seconds:
                    print(f"no time for {variant.name}, seed {seed}, and what follows", file=sys.stderr)
                    return
                record = ablation.run(variant, seed)
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(summary(record, time.monotonic() - begun), file=sys.stderr, flush=True)


def summary(record: dict[str, Any], elapsed: float) -> str:
    """One line about a variant that has just ended."""
    name = f"{elapsed:.0f} s: {record['variant']}, seed {record['seed']}"
    if "error" in record:
        return f"{name}: {record['error']}"
    last, teacher = record["final"], record["teacher"]
    return (
        f"{name}: KL {last['kl']:.3f}, nll {last['nll']:.3f} (teacher {teacher['nll']:.3f}), "
        f"recall {last['recall']:.3f}; {record['tokens_per_second']:,.0f} tokens/s, "
        f"{record['seconds']:.0f} s, {record.get('peak_gib', 0.0):.1f} GiB"
    )


def mean_and_spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """The mean, and behind it the standard deviation where there are several values."""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table of all variants: means over seeds ± standard deviations.

    The difference is taken seed by seed, so what the order of the data does to both falls out of it.
    """
    base = {r["seed"]: r["final"]["kl"] for r in records if r["variant"] == BASE}
    first = next(iter(records[0]["measured"][1:]))["tokens"]
    columns = ["variant", "layers kept", "seeds", f"KL at {first:,} tokens", "KL at the end", "KL less base"]
    columns += ["nll", "perplexity / teacher's", "recall"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for name in dict.fromkeys(r["variant"] for r in records):
        rows = [r for r in records if r["variant"] == name]
        early = [r["measured"][1]["kl"] for r in rows]
        less = [r["final"]["kl"] - base[r["seed"]] for r in rows if r["seed"] in base]
        ratios = [math.exp(r["final"]["nll"] - r["teacher"]["nll"]) for r in rows]
        ends = [mean_and_spread([r["final"][key] for r in rows]) for key in ("kl", "nll", "recall")]
        cells = [name, ", ".join(map(str, rows[0]["layers"])), str(len(rows)), mean_and_spread(early)]
        cells += [ends[0], mean_and_spread(less, sign="+") if less and name != BASE else "", ends[1]]
        yield f"| {' | '.join([*cells, mean_and_spread(ratios, 2), ends[2]])} |"
    teacher, ends = records[0]["teacher"], sorted({r["final"]["tokens"] for r in records})
    yield ""
    yield (
        f"Teacher: nll {teacher['nll']:.3f}, recall {teacher['recall']:.3f}. "
        f"Ends at {', '.join(f'{n:,}' for n in ends)} tokens."
    )


def report(options: argparse.Namespace) -> None:
    """Draw the curves of HyPE (seeds averaged) and print the table."""
    records = known_lines(options.output / FILE)
    if not records:
        raise ValueError(
            f"output: {options.output / FILE} holds no finished variant: run without --plot first"
        )
    curves = {}
    for name, label in CURVES.items():
        rows = [r["curve"] for r in records if r["variant"] == name]
        if rows:
            steps = zip(*rows, strict=True)
            curves[label] = [(step[0][0] / 1e3, statistics.mean(y for _, y in step)) for step in steps]
    title = "Distillation with HyPE and with RoPE kept"
    plot_curves(curves, title, ("thousands of tokens", "KL from the teacher, nats a token"), options.plot)
    print("\n".join(table(records)))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("teacher", nargs="?", help="folder of the teacher")
    add("--tokens", action="append", default=[], help="packed tokens, as of `opensala convert`; repeatable")
    add("--output", type=Path, required=True, help="folder for ablations.jsonl")
    add("--plot", type=Path, help="draw OUTPUT/ablations.jsonl to this file, print its table, and end")
    add("--device", default="cpu")
    add("--compute", default="auto", help="float32, bfloat16 or auto")
    add("--align-tokens", type=int, default=1_048_576)
    add("--distill-tokens", type=int, default=1_000_000)
    add("--calibrate-tokens", type=int, default=65_536)
    add("--fade-tokens", type=int, default=300_000, help="over which HyPE fades in")
    add("--measure-every", type=int, default=300_000, help="tokens between measurements")
    add("--length", type=int, default=1024, help="tokens of a sequence")
    add("--batch", type=int, default=32, help="sequences of a step")
    add("--micro-tokens", type=int, default=16_384, help="tokens of one pass")
    add("--recompute", action="store_true", help="less memory for a third more work")
    add("--probes", type=int, default=64, help="documents with facts, and as many of held-out text")
    add("--layers", type=numbers, default=smollm2_135m("").layers, help="kept by the base, with commas")
    add("--fewer", type=numbers, default=FEWER, help="kept by the variant with fewer")
    add("--seeds", type=numbers, default=(1, 2, 3), help="orders of the data, with commas")
    add("--only", nargs="+", help="names of variants")
    add("--seconds", type=float, help="begin no variant that would not be over by then")
    add("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    if options.plot is None and not (options.teacher and options.tokens):
        parser.error("a teacher and --tokens are needed, or --plot")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    try:
        if options.plot is None:
            measure(options)
        else:
            report(options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
