"""Hybrids of published models: what differs comes with this package, the rest is pulled, and both make a
checkpoint like any other.

delta.json          name, `format`, base (name and sha256 of its file), sha256 of each file and of the
                    assembled weights, and how it was trained
outcome.json, outcome-N.safetensors    see `outcome`
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from ..hub import DELTAS, RECORD, Delta, building, installed, sha256_of
from ..hub import pull as pull_base
from ..model import MiniCPMSALAForCausalLM
from ..runs import read_json, write_json
from .outcome import load_outcome
from .teacher import load_teacher

FORMAT = 1
MANIFEST = "delta.json"
_NOTICE = "NOTICE"


def pull(name: str, source: str | None = None, quiet: bool = False) -> Path:
    """Install a model by its name, unless it is there; returns its checkpoint folder.

    Of a hybrid the base is pulled first, unless it is there.

    Args:
        source: see `opensala.hub.pull`; of the base.

    Raises:
        ValueError: what `opensala.hub.pull` raises; a delta that is damaged, of another version or for
            another base; weights that are not those which were published. Nothing is left half-installed.
    """
    if name not in DELTAS:
        return pull_base(name, source, quiet)
    delta = DELTAS[name]
    record = read_manifest(delta)
    found = installed(name)
    if found is not None:  # of this very delta: weights may stay while the configuration changes
        made_of = read_json(found / RECORD) or {}
        if all(made_of.get(key) == record[key] for key in ("weights", "files")):
            return found
    base = pull_base(delta.base, source, quiet)
    of = (read_json(base / RECORD) or {}).get("sha256")
    if of != record["base"]["sha256"]:
        raise ValueError(
            f"{name} is made of another {delta.base} than the one in {base} (sha256 {str(of)[:12]}..., "
            f"expected {record['base']['sha256'][:12]}...): remove that folder and pull again"
        )
    return _assembled(delta, record, base)


def read_manifest(delta: Delta) -> dict[str, Any]:
    """The manifest of a delta whose files are whole.

    Raises:
        ValueError: a file that is missing or not the one that was published, another format or base.
    """
    record: dict[str, Any] | None = read_json(delta.folder / MANIFEST)
    if record is None:
        raise ValueError(f"{delta.folder} holds no {MANIFEST}: install opensala again")
    if record["format"] != FORMAT:
        raise ValueError(
            f"{delta.name}: its delta has format {record['format']}, this version reads {FORMAT}: install "
            "the opensala that it came with"
        )
    if record["base"]["name"] != delta.base:
        raise ValueError(f"{delta.name}: its delta is for {record['base']['name']}, not for {delta.base}")
    for file, expected in record["files"].items():
        path = delta.folder / file
        if not path.is_file() or sha256_of(path) != expected:
            raise ValueError(f"{path} is missing or damaged: install opensala again")
    return record


def _assembled(delta: Delta, record: dict[str, Any], base: Path) -> Path:
    target = base.parent / delta.name
    with building(target, delta.unpacked) as partial:
        model = assembled(base, delta.folder, getattr(torch, record["dtype"]))
        found = weights_checksum(model)
        if found != record["weights"]:
            raise ValueError(
                f"{delta.name}: the assembled weights are not those that were published (sha256 "
                f"{found[:12]}..., expected {record['weights'][:12]}...): remove {base} and pull again"
            )
        try:
            model.save_pretrained(partial)
        except SafetensorError as error:
            raise ValueError(f"{target.parent}: {error}: nothing was installed") from error
        AutoTokenizer.from_pretrained(base).save_pretrained(partial)
        shutil.copyfile(delta.folder / _NOTICE, partial / _NOTICE)
        own = {"name": delta.name, "licence": delta.licence, "base": record["base"]}
        own |= {"weights": found, "files": record["files"]}
        write_json(partial / RECORD, own)
    return target


def assembled(base: str | Path, outcome: str | Path, dtype: torch.dtype) -> MiniCPMSALAForCausalLM:
    """The hybrid of a base and an outcome, in its dtype."""
    teacher = load_teacher(base)
    model = load_outcome(teacher, outcome)
    model.generation_config = teacher.generation_config
    return model.to(dtype)


def weights_checksum(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and bytes of all parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, x in sorted(model.named_parameters()):
        digest.update(f"{name} {list(x.shape)} {x.dtype}\n".encode())
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
