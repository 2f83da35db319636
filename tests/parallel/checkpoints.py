"""What the processes of a group do about checkpoints: save on four, go on with two and one, refuse what does
not fit."""

import copy
import os
import resource

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from opensala import MiniCPMSALAForCausalLM
from opensala.parallel import (
    ParallelConfig,
    average_gradients,
    context_parallel,
    init_parallel,
    load_checkpoint,
    save_checkpoint,
    shard_model,
    shard_sequence,
    whole_weights,
)
from opensala.parallel.exchange import gather_tokens

from ..conftest import tiny_model
from .checks import backward, difference, rows


def train(model, optimizer, mesh, steps):
    """Steps on two rows, whoever reads them; `steps` are their numbers. Returns the last loss."""
    loss = 0.0
    for step in steps:
        optimizer.zero_grad()
        batch = rows(2, 7 + step)
        mine = {k: v[mesh.dp_rank :: mesh.dp] for k, v in batch.items()}
        loss = backward(model, mine, mesh)
        if not isinstance(next(model.parameters()), DTensor):
            average_gradients(model, mesh)
        optimizer.step()
    return loss


def build(mesh, sharded=True):
    model = context_parallel(tiny_model(seed=3).double().train(), mesh)
    model = shard_model(model, mesh) if sharded else model
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def save_on_four(folder):
    """Two steps, a checkpoint, one more step: what loss and weights it leads to."""
    mesh = init_parallel(ParallelConfig(2, 2), device="cpu")
    model, optimizer = build(mesh)
    save_checkpoint(folder / "start", model, optimizer, mesh)  # before the first step: no optimizer state
    assert not optimizer.state
    train(model, optimizer, mesh, range(2))
    (folder / "saved.partial").mkdir(exist_ok=True)
    if mesh.rank == 0:
        (folder / "saved.partial" / "left.distcp").write_text("by a run that was killed")
    dist.barrier()
    save_checkpoint(folder / "saved", model, optimizer, mesh, {"step": 2, "data": [1, "shard-7"]})
    with pytest.raises(ValueError) as exists:
        save_checkpoint(folder / "saved", model, optimizer, mesh)
    full, there = disk_full(folder, model, optimizer, mesh), sorted(p.name for p in folder.iterdir())
    loss = train(model, optimizer, mesh, [2])
    weights = whole_weights(model)
    if mesh.rank == 0:
        torch.save({"loss": loss, "weights": weights}, folder / "wanted.pt")
    return {
        "exists": str(exists.value),
        "full": full,
        "left": there,
        "inside": sorted(p.name for p in (folder / "saved").iterdir()),
    }


def disk_full(folder, model, optimizer, mesh):
    """A save in which no file may grow past 4 KB: the error, on every rank."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint(folder / "full", model, optimizer, mesh)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    return str(caught.value)


def numbers(model, optimizer):
    """What this rank holds: weights, and everything the optimizer remembers."""
    held = [*model.parameters(), *(x for p in model.parameters() for x in optimizer.state[p].values())]
    return [x.to_local() if isinstance(x, DTensor) else x for x in held]


def load_on(folder, sharded=True):
    """The checkpoint on this many ranks, then the step that came next."""
    world = int(os.environ["WORLD_SIZE"])
    mesh = init_parallel(ParallelConfig(1, world), device="cpu")
    model, optimizer = build(mesh, sharded)
    extra = load_checkpoint(folder / "saved", model, optimizer)
    loss = train(model, optimizer, mesh, [extra["step"]])
    wanted = torch.load(folder / "wanted.pt")
    got = copy.deepcopy(whole_weights(model))
    fresh, unused = build(mesh, sharded)
    load_checkpoint(folder / "start", fresh, unused)
    gaps = {n: difference(x, wanted["weights"][n]) for n, x in got.items()}
    save_checkpoint(folder / f"again {world} {sharded}", model, optimizer, mesh)
    again, restored = build(mesh, sharded)
    load_checkpoint(folder / f"again {world} {sharded}", again, restored)
    same = all(
        torch.equal(a, b) for a, b in zip(numbers(model, optimizer), numbers(again, restored), strict=True)
    )
    pretrained = exported(folder / f"pretrained {world} {sharded}", model, mesh)
    return {
        "extra": extra,
        "same": same,
        "pretrained": pretrained,
        "loss": abs(loss - wanted["loss"]) / wanted["loss"],
        "weights": max(gaps.values(), default=-1),
        "named": len(gaps),
        "unused": len(unused.state),
    }


def exported(folder, model, mesh):
    """Does a model saved in the released format and loaded again give the same logits?"""
    weights = whole_weights(model)
    if mesh.rank == 0:
        model.save_pretrained(folder, state_dict=weights)
    ids = rows(1, 9)["input_ids"]
    part = shard_sequence({"input_ids": ids}, mesh)
    with torch.no_grad():
        got = model(
            part["input_ids"],
            position_ids=part["position_ids"],
            cu_seqlens=part["cu_seqlens"],
            use_cache=False,
        ).logits
        got = gather_tokens(got, mesh.cp_group)
        if mesh.rank:
            return None
        wanted = MiniCPMSALAForCausalLM.from_pretrained(folder, dtype=torch.float64)(
            ids, use_cache=False
        ).logits
    return difference(got, wanted)


def load_the_wrong(folder):
    """Models and folders that a checkpoint does not fit."""
    mesh = init_parallel(ParallelConfig(), device="cpu")
    other = shard_model(tiny_model(intermediate_size=64), mesh)
    model, optimizer = build(mesh)
    said = {}
    (folder / "damaged").mkdir()
    for file in (folder / "saved").iterdir():
        (folder / "damaged" / file.name).write_bytes(
            file.read_bytes()[: 5000 if file.suffix == ".distcp" else None]
        )
    for name, trial in {
        "damaged": lambda: load_checkpoint(folder / "damaged", model, optimizer),
        "shape": lambda: load_checkpoint(folder / "saved", other, None),
        "names": lambda: load_checkpoint(folder / "saved", tiny_model(attn_qk_norm=True), None),
        "nothing": lambda: load_checkpoint(folder / "absent", model, optimizer),
    }.items():
        with pytest.raises(ValueError) as caught:
            trial()
        said[name] = str(caught.value)
    return said
