"""Make the SmolLM2 hybrid again, from the original's weights to the tables beside it, unattended.

    python scripts/reproduce.py runs/smollm2 [--device cuda]
    python scripts/reproduce.py runs/smoke --smoke

Each step is a command of its own whose output goes to DIR/log.txt. A step that is done is not done again, and
a conversion that was stopped goes on from its last saved state: give the same command again. `--smoke` takes
the same steps with a random model of a thousandth of the size and the texts of this Python installation, in a
minute or two and without a network.
"""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from opensala.runs import done_before, mark_done, package_command, run_process

HERE = Path(__file__).parent
NAME, BASE = "smollm2-135m-sala", "smollm2-135m"
ROWS = "512=4000,1024=1200,2048=900,4096=450,8192=160,16384=90,32768=24"
# What the published hybrid was given (docs/smollm2.md), and what two CPU cores do in some hours.
CUDA = "--device cuda --micro-tokens 32K --align-seconds 18 --distill-seconds 175 --long-seconds 42"
CPU = (
    "--align-batch 8 --align-tokens 500K --distill-batch 4 --distill-tokens 3M "
    "--long-batch 1 --long-tokens 500K"
)
SMOKE = (
    "--layers 0,3 --align-steps 4 --align-batch 2 --distill-steps 4 --distill-batch 2 --distill-length 512 "
    "--long-steps 2 --long-batch 1 --long-length 1024 --calibrate-tokens 2048 --lora-rank 4 --length 512 "
    "--probe-sequences 2 --compute float32 --quiet"
)


@dataclass(frozen=True)
class Step:
    """A command, and what it leaves; `resume` is added where that folder is already there."""

    name: str
    command: tuple[str, ...]
    resume: Path | None = None


@dataclass(frozen=True)
class Sizes:
    """The teacher, and how much of everything: rows of questions, options of conversion and measurement."""

    teacher: str
    rows: str
    convert: str
    delta_mb: float
    measure: str


def script(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(HERE / name), *map(str, arguments))


def plan(directory: Path, sizes: Sizes, smoke: bool) -> list[Step]:
    """The steps in their order."""
    corpus, teacher = directory / "corpus", sizes.teacher
    packed, tasks, run = directory / "packed", directory / "tasks", directory / "run"
    train, delta, hybrid = corpus / "train.jsonl", directory / "delta", directory / "hybrid"
    first = (
        [Step("small", script("reproduce.py", directory, "--prepare-smoke"))]
        if smoke
        else [
            Step("pull", package_command("pull", BASE)),
            Step("corpus", script("corpus/build.py", corpus)),
        ]
    )
    convert = package_command("convert", "run", teacher, "-o", run, "--recipe", "smollm2_135m")
    data = ("--tokens", str(packed), "--tokens", str(tasks))
    return [
        *first,
        Step("pack", package_command("convert", "pack", teacher, train, "-o", packed, "--quiet")),
        Step("tasks", script("corpus/tasks.py", teacher, train, tasks, "--rows", sizes.rows)),
        Step("convert", (*convert, *data, *sizes.convert.split()), resume=run),
        Step(
            "delta",
            script(
                "make_delta.py",
                NAME,
                run,
                *("--tokens", packed / "train" / "train.npy", "--output", delta, "--teacher", teacher),
                *("--limit-mb", sizes.delta_mb),
            ),
        ),
        Step("merge", package_command("convert", "merge", teacher, delta, "-o", hybrid)),
        Step(
            "measure",
            script(
                "measure_real.py",
                hybrid,
                *("--teacher", teacher_folder(teacher), "--heldout", corpus / "heldout.jsonl"),
                *("--rows", directory / "real.csv", *sizes.measure.split()),
            ),
        ),
        Step("tables", script("reproduce.py", directory, "--tables-only")),
    ]


def teacher_folder(teacher: str) -> str:
    """Where the teacher lies, or will lie once it is pulled."""
    from opensala.hub import models_folder

    return str(models_folder() / BASE) if teacher == BASE else teacher


def small_inputs(directory: Path) -> None:
    """What the smoke run begins with: a random Llama of four layers, and texts of this installation."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from opensala.data.documents import installed_texts
    from opensala.engine import shipped_model
    from opensala.train.recipes import TINY_TEMPLATE

    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    tokenizer.chat_template = TINY_TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 32768}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **heads, **ends)
    LlamaForCausalLM(config).save_pretrained(directory / "teacher")
    tokenizer.save_pretrained(directory / "teacher")
    (directory / "corpus").mkdir(exist_ok=True)
    for part, name in (("train", "train"), ("held_out", "heldout")):
        texts = installed_texts("prose", 400_000, part)
        rows = [{"text": "\n\n".join(texts[n : n + 40]), "group": "python"} for n in range(0, len(texts), 40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / "corpus" / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def tables(directory: Path) -> str:
    """Markdown: what each phase of the conversion reached, then the hybrid beside its teacher."""
    import csv

    results = json.loads((directory / "run" / "result.json").read_text())
    lines = ["| on held-out probes | loss | next token right | recall |", "|---|---|---|---|"]
    for name, found in results.items():
        lines.append(f"| {name} | {found['nll']:.3f} | {found['accuracy']:.1%} | {found['recall']:.3f} |")
    with open(directory / "real.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines += ["", "| measured | tokens | hybrid | teacher |", "|---|---:|---:|---:|"]
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["what"], row["kind"], row["tokens"]), {})[row["model"]] = row["figure"]
    for (what, kind, tokens), found in cells.items():
        student, teacher = found.get("student", ""), found.get("teacher", "")
        lines.append(f"| {what}, {kind} | {int(tokens):,} | {student} | {teacher} |")
    return "\n".join(lines) + "\n"


def finished(directory: Path, step: Step) -> bool:
    """Whether a step was done before. Exits if it was done with another command."""
    try:
        return done_before(directory, step.name, step.command) is not None
    except ValueError as error:
        raise SystemExit(str(error)) from None


def run_step(directory: Path, step: Step) -> None:
    """Run a step to its end, note that it is done. Exits with the command and where its output is if it
    fails."""
    command = list(step.command)
    if step.resume is not None and (step.resume / "config.json").exists():
        command.append("--resume")
    with open(directory / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        log.flush()
        ended = run_process(command, log)
    if ended.code:
        raise SystemExit(
            f"{step.name} failed with exit code {ended.code}: {shlex.join(command)}\n"
            f"its output is at the end of {directory / 'log.txt'}; the same command goes on from here"
        )
    mark_done(directory, step.name, step.command, ended)


def carry_out(directory: Path, steps: Sequence[Step], say: Callable[[str], None]) -> None:
    for number, step in enumerate(steps, 1):
        if finished(directory, step):
            say(f"{number}/{len(steps)} {step.name}: done before")
            continue
        say(f"{number}/{len(steps)} {step.name}: {shlex.join(step.command[1:])}")
        run_step(directory, step)


def main(
    directory: Annotated[Path, typer.Argument(help="Folder of the whole run.")],
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes, no network.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one.")
    ] = None,
    convert: Annotated[
        str | None, typer.Option(help="Options of the conversion, instead of the device's.")
    ] = None,
    prepare_smoke: Annotated[bool, typer.Option("--prepare-smoke", hidden=True)] = False,
    tables_only: Annotated[bool, typer.Option("--tables-only", hidden=True)] = False,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if prepare_smoke:
        return small_inputs(directory)
    if tables_only:
        (directory / "tables.md").write_text(tables(directory), encoding="utf-8")
        return None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = Sizes(BASE, ROWS, convert or (CUDA if device == "cuda" else CPU), 24.43, f"--device {device}")
    if smoke:
        measure = "--lengths 512 --samples 2 --each 1"
        sizes = Sizes(str(directory / "teacher"), "512=8,1024=4", convert or SMOKE, 1.0, measure)
    carry_out(directory, plan(directory, sizes, smoke), lambda text: print(text, file=sys.stderr, flush=True))
    print((directory / "tables.md").read_text(), end="")
    return None


if __name__ == "__main__":
    typer.run(main)
