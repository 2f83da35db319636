"""Which process holds what: a grid of ranks, dp x cp, over all processes of the run.

Ranks next to each other share a sequence (cp), so that its traffic stays inside a machine; parameters are
sharded over all ranks of the grid, whichever way it is cut.
"""

import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a run are used; dp_shard * cp must be their number.

    Attributes:
        dp_shard: groups that read different sequences; None takes all processes that cp leaves.
        cp: ranks over which each sequence is split.

    Raises:
        ValueError: a number below 1.
    """

    dp_shard: int | None = None
    cp: int = 1

    def __post_init__(self) -> None:
        for field, value in (("dp_shard", self.dp_shard), ("cp", self.cp)):
            if value is None and field == "dp_shard":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")

    def resolve(self, world: int) -> "ParallelConfig":
        """The same with dp_shard filled in for `world` processes; ValueError if they do not divide."""
        shard = self.dp_shard or max(1, world // self.cp)
        if shard * self.cp != world:
            allowed = [n for n in range(1, world + 1) if world % n == 0]
            asked = (
                f"cp = {self.cp}" if self.dp_shard is None else f"dp_shard * cp = {self.dp_shard} * {self.cp}"
            )
            raise ValueError(
                f"{asked} does not fit {world} process{'es' * (world > 1)}: dp_shard * cp must be {world}. "
                f"Choose cp among {', '.join(map(str, allowed))}, or start another number of processes"
            )
        return replace(self, dp_shard=shard)


@dataclass(frozen=True, eq=False)
class ParallelMesh:
    """The grid, seen from one rank.

    Attributes:
        config: with dp_shard filled in.
        device: of this rank.
        devices: mesh of all ranks, dimensions `dp` and `cp`.
        shard: the same ranks in one dimension, `shard`: what parameters are sharded over.
        rank, world: place among all ranks, and their number.
    """

    config: ParallelConfig
    device: torch.device
    devices: DeviceMesh
    shard: DeviceMesh
    rank: int
    world: int

    @property
    def dp(self) -> int:
        return self.devices["dp"].size()

    @property
    def cp(self) -> int:
        return self.devices["cp"].size()

    @property
    def dp_rank(self) -> int:
        """Which of the dp groups this rank belongs to: it decides which sequences it reads."""
        return self.devices.get_local_rank("dp")

    @property
    def cp_rank(self) -> int:
        """Which stretch of each sequence this rank holds."""
        return self.devices.get_local_rank("cp")

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return self.devices.get_group("dp")

    @property
    def cp_group(self) -> dist.ProcessGroup:
        return self.devices.get_group("cp")


def init_parallel(
    config: ParallelConfig, *, device: str | None = None, timeout_s: float = 600
) -> ParallelMesh:
    """Join the processes that torchrun started (or be the only one) and lay out the grid.

    Args:
        config: how to use them.
        device: `cuda` (NCCL) or `cpu` (gloo); CUDA if there is any, when None.
        timeout_s: seconds after which a rank that hears nothing from the others fails.

    Raises:
        ValueError: an unknown device, or a number of processes that does not fit.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    config = config.resolve(_world())
    local = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}. "
                "Start as many processes a machine as it has GPUs (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        # CPU tensors go through gloo even then: a checkpoint's bookkeeping is on the CPU
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        wait = timedelta(seconds=timeout_s)
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=wait)
        else:
            dist.init_process_group(backend, timeout=wait, store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    assert config.dp_shard is not None, "filled by resolve"
    devices = init_device_mesh(kind, (config.dp_shard, config.cp), mesh_dim_names=("dp", "cp"))
    shard = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    return ParallelMesh(
        config,
        torch.device(kind, local) if kind == "cuda" else torch.device(kind),
        devices,
        shard,
        dist.get_rank(),
        world,
    )


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def close_parallel() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
