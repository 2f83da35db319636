"""`opensala check`: whether another engine serves a checkpoint. Parsing only."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from .options import Json


def check(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint.")],
    engine: Annotated[str, typer.Option("--for", help="The engine: sglang.")] = "sglang",
    tp: Annotated[int, typer.Option(help="GPUs that share each layer, over all nodes.")] = 1,
    as_json: Json = False,
) -> None:
    """Say whether another engine serves a checkpoint: names, shapes, keys of its configuration."""
    from ..model.sglang import check_sglang

    if engine != "sglang":
        raise ValueError(f"--for must be sglang, got {engine!r}")
    found = check_sglang(checkpoint, tp)
    served = not any(finding.refused for finding in found)
    if as_json:
        print(json.dumps({"served": served, "findings": [asdict(finding) for finding in found]}))
    else:
        for finding in found:
            print(f"{'refused' if finding.refused else 'differs'}: {finding.text}")
        print(f"{checkpoint}: {'served' if served else 'not served'} by SGLang with --tp-size {tp}")
    if not served:
        sys.exit(2)
