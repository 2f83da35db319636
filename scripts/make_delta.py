"""Make the delta of a published model that ships with the package, from the run of its conversion.

    python scripts/make_delta.py smollm2-135m-sala RUN --tokens packed/train/train.npy

RUN is the folder of a conversion (`opensala convert run smollm2-135m ...`): its outcome, metrics.jsonl and
config.json. The base must have been pulled. Texts say which errors of the few bits count (16 pieces of
1,024 tokens, spread over the file).
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from opensala.convert.outcome import shrink_outcome
from opensala.convert.published import FORMAT, MANIFEST, assembled, weights_checksum
from opensala.convert.teacher import load_teacher
from opensala.hub import CATALOG, DELTAS, installed, sha256_of
from opensala.runs import read_json, write_json

DTYPE = "bfloat16"
PIECES, LENGTH = 16, 1024
METHOD = "HALO: alignment, distillation at 1,024 tokens, then at 4,096 tokens with sparse attention"
NOTICE = """{name} is a derivative of SmolLM2-135M-Instruct (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct),
by Hugging Face (HuggingFaceTB), licensed under the Apache License, Version 2.0 (http://www.apache.org/licenses/LICENSE-2.0).

Changes: its self-attention was replaced by the mixers of MiniCPM-SALA (block-sparse attention without rotary
positions in layers {kept}, Lightning attention in the others) and trained by distillation; feed-forward
matrices were changed by low-rank additions. This folder holds the differences only, under the same licence.
"""


def pieces(file: Path) -> torch.Tensor:
    """`[16, 1024]` ids."""
    ids = np.load(file, mmap_mode="r")
    starts = np.linspace(0, len(ids) - LENGTH, PIECES).astype(int)
    return torch.from_numpy(np.stack([ids[s : s + LENGTH] for s in starts]).astype(np.int64))


def trained(run: Path) -> dict[str, dict[str, int]]:
    """Steps and tokens of each phase, from the last line each wrote."""
    config = json.loads((run / "config.json").read_text())
    steps = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        steps[record["phase"]] = record["step"] + 1
    phases = {name: config[name] for name in steps}
    return {
        name: {
            "steps": count,
            "length": phases[name]["length"],
            "tokens": count * phases[name]["batch"] * phases[name]["length"],
        }
        for name, count in steps.items()
    }


def added(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The phases of a conversion and of one that went on from it, numbered where both have one."""
    found = dict(earlier)
    for name, phase in later.items():
        number = 1 + sum(key.split(" ")[0] == name for key in earlier)
        found[name if number == 1 else f"{name} {number}"] = phase
    return found


def base_of(name: str, given: str | None) -> tuple[Path | str, dict[str, str]]:
    """Where the base lies, and what names it in the manifest: the catalogue's, or a folder of one's own."""
    if given is not None and given != DELTAS[name].base:
        weights = Path(given) / "model.safetensors"
        return given, {"name": Path(given).name, "sha256": sha256_of(weights)}
    base = installed(DELTAS[name].base)
    if base is None:
        raise typer.BadParameter(f"opensala pull {DELTAS[name].base} first")
    return base, {"name": DELTAS[name].base, "sha256": CATALOG[DELTAS[name].base].sha256}


def main(
    name: Annotated[str, typer.Argument(help="Of the delta in the catalogue.")],
    run: Annotated[Path, typer.Argument(help="Folder of the conversion, its outcome in outcome/.")],
    tokens: Annotated[Path, typer.Option(help="Array of ids of training texts (.npy).")],
    limit_mb: Annotated[float, typer.Option(help="Size of the tensors' files, in 10^6 bytes.")] = 24.43,
    outcome: Annotated[Path | None, typer.Option(help="Where the outcome lies, if elsewhere.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write instead of the one in the package.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder of the base, if it is another one.")] = None,
    method: Annotated[str, typer.Option(help="How it was trained, in a line.")] = METHOD,
    attn_scale_base: Annotated[
        float | None,
        typer.Option(help="Scale of the sparse layers' logits, as scripts/choose_scale.py says."),
    ] = None,
) -> None:
    base, named = base_of(name, teacher)
    start = read_json(run / "config.json").get("start")  # of a run that went on from another delta
    earlier = read_json(Path(start) / MANIFEST)["trained"] if start else {}
    folder = output or DELTAS[name].folder
    shutil.rmtree(folder, ignore_errors=True)
    source = outcome or run / "outcome"
    shrink_outcome(
        load_teacher(base), source, folder, limit_mib=limit_mb * 1e6 / 2**20, tokens=pieces(tokens)
    )
    record = read_json(folder / "outcome.json")
    if attn_scale_base is not None:
        record["config"]["attn_scale_base"] = attn_scale_base
        write_json(folder / "outcome.json", record)
    kinds = record["config"]["mixer_types"]
    kept = [i for i, kind in enumerate(kinds) if kind == "minicpm4"]
    (folder / "NOTICE").write_text(NOTICE.format(name=name, kept=", ".join(map(str, kept))))
    files = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT,
        "name": name,
        "licence": DELTAS[name].licence,
        "base": named,
        "files": files,
        "dtype": DTYPE,
        "weights": weights_checksum(assembled(base, folder, getattr(torch, DTYPE))),
        "method": method,
        "kept_layers": kept,
        "trained": added(earlier, trained(run)),
        "result": read_json(run / "result.json"),
    }
    write_json(folder / MANIFEST, manifest)
    print(sum(file.stat().st_size for file in folder.iterdir()), "bytes in", folder)


if __name__ == "__main__":
    typer.run(main)
