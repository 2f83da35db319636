"""Checkpoints of sharded training: every rank writes its shards, any number of ranks reads them back.

A checkpoint is a folder in the format of torch.distributed.checkpoint, plus `state.json`. It appears under
its name only
when it is whole: it is written beside it and renamed, so that a crash leaves the checkpoints before it as
    they were. Its
index is a pickle, as that format has it: load only checkpoints you trust. All ranks must see the same file
system, and all must call these functions.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .mesh import ParallelMesh
from .reduce import agree

STATE_FILE = "state.json"
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter name: groups may be made anew
_ALL = StateDictOptions()
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    mesh: ParallelMesh,
    extra: dict[str, Any] | None = None,
    *,
    trained_only: bool = False,
) -> None:
    """Write weights, optimizer state and `extra` (what JSON can hold: step, position in the data) to a new
    folder.

    An optimizer that has not made a step yet has no state to write. With `trained_only` weights without
    gradients are left out; `load_checkpoint` is then told the same.

    Raises:
        ValueError: the folder exists.
        OSError: it could not be written, disk full included; nothing is left of it then. On every rank.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    state: dict[str, Any] = {"model": get_model_state_dict(model, options=_TRAINED if trained_only else _ALL)}
    if optimizer is not None and optimizer.state:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    note = json.dumps({"optimizer": "optimizer" in state, "world": mesh.world, "extra": extra or {}})

    taken = mesh.rank == 0 and folder.exists()
    agree(
        mesh,
        ValueError(f"checkpoint {folder} exists: remove it, or save under another name") if taken else None,
    )
    agree(mesh, _attempt(_begin, partial) if mesh.rank == 0 else None)
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial))
    except CheckpointException as error:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise _unwritten(folder, error) from None
    done = _attempt(_finish, partial, folder, note) if mesh.rank == 0 else None
    if done is not None:
        shutil.rmtree(partial, ignore_errors=True)
    agree(mesh, done)


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    trained_only: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint into a model (sharded or not, over any number of ranks) and its optimizer; returns
    `extra`.

    Raises:
        ValueError: no whole checkpoint there, or one of another model: tensors named, with both shapes; the
            weights are as they were. Or a file in it is damaged.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    if not (folder / STATE_FILE).is_file():
        raise ValueError(
            f"{folder} holds no checkpoint ({STATE_FILE} is missing): give a folder that save_checkpoint "
            "wrote"
        )
    note = json.loads((folder / STATE_FILE).read_text())
    reader = dcp.FileSystemReader(folder)
    saved = {
        name: getattr(entry, "size", None)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    chosen = _TRAINED if trained_only else _ALL
    weights = get_model_state_dict(model, options=chosen)
    _check(folder, "model.", weights, saved)
    state: dict[str, Any] = {"model": weights}
    if optimizer is not None and note["optimizer"]:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
        _check(folder, "optimizer.", state["optimizer"], saved)
    try:
        dcp.load(state, storage_reader=reader)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        kind = OSError if isinstance(cause, OSError) else ValueError
        raise kind(
            f"checkpoint {folder} cannot be read on rank {rank}: {cause}. Load an earlier one"
        ) from None
    set_model_state_dict(model, state["model"], options=chosen)
    if optimizer is not None and note["optimizer"]:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_OPTIONS)
    return note["extra"]


def _check(folder: Path, prefix: str, wanted: dict[str, Any], saved: dict[str, Any]) -> None:
    there = {name.removeprefix(prefix): size for name, size in saved.items() if name.startswith(prefix)}
    problems = [f"{name} is missing" for name in wanted if name not in there]
    problems += [f"{name} is not part of this run" for name in there if name not in wanted]
    problems += [
        f"{name} has shape {list(there[name])}, not {list(x.shape)}"
        for name, x in wanted.items()
        if isinstance(x, torch.Tensor) and there.get(name) is not None and there[name] != x.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"checkpoint {folder} is of another {'model' if prefix == 'model.' else 'optimizer'}: "
            f"{'; '.join(problems[:4])}{more}. Use the configuration it was written with"
        )


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped while saving
    partial.mkdir(parents=True)


def _finish(partial: Path, folder: Path, note: str) -> None:
    with open(partial / STATE_FILE, "w") as file:
        file.write(note)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)
    partial.rename(folder)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _attempt(action: Any, *args: Any) -> OSError | None:
    try:
        action(*args)
    except OSError as error:
        return OSError(error.errno, f"could not write the checkpoint: {error.strerror}", error.filename)
    return None


def _unwritten(folder: Path, error: CheckpointException) -> OSError:
    rank, (cause, _) = next(iter(error.failures.items()))
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    text = f"checkpoint {folder} failed on rank {rank}: {cause} ({free / 1e9:.2f} GB are free there)"
    return OSError(cause.errno, text) if isinstance(cause, OSError) and cause.errno else OSError(text)
