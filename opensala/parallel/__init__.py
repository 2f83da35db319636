"""Training over many processes: parameters sharded (FSDP2), sequences split (context parallelism),
checkpoints that reshard.

One process of a run, started by torchrun or alone:

    mesh = init_parallel(ParallelConfig(cp=4))                # dp x cp ranks; dp_rank: which data to read
    model = context_parallel(model, mesh)                     # every row split over the cp ranks
    model = shard_model(model, mesh, compute_dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())         # after sharding
    extra = load_checkpoint(folder, model, optimizer)         # written by any number of ranks

    parts = [shard_sequence(batch, mesh) for batch in step]   # this rank's stretch, targets shifted first
    tokens = total_over_ranks(sum(p["weights"].double().sum() for p in parts), mesh)
    for part in parts:
        targets, weights = part.pop("targets"), part.pop("weights")
        losses = cross_entropy(model(**part, use_cache=False).logits, targets) * weights
        share_of_loss(losses.sum(), tokens, mesh).backward()  # the mean over the tokens of all ranks
    clip_gradients(model, 1.0)
    optimizer.step()
    save_checkpoint(folder, model, optimizer, mesh, {"step": 1})  # on all ranks

A loss that reads `model.lm_head.weight` itself goes through `on_whole_weights`. `whole_weights` gathers a
model for `save_pretrained`; `average_gradients` is for models that are not sharded. docs/parallel.md says how
it works.

It knows nothing of recipes, data or schedules.
"""

from .batch import IGNORED, shard_sequence
from .checkpoint import load_checkpoint, save_checkpoint
from .context import context_parallel
from .exchange import all_gather
from .mesh import ParallelConfig, ParallelMesh, close_parallel, init_parallel
from .reduce import agree, from_first, share_of_loss, total_over_ranks
from .sharding import (
    average_gradients,
    clip_gradients,
    on_whole_weights,
    set_whole,
    shard_each,
    shard_model,
    whole_state,
    whole_tensor,
    whole_weights,
    with_whole_weights,
)
from .volume import ContextVolume, context_volume

__all__ = [
    "IGNORED",
    "ContextVolume",
    "ParallelConfig",
    "ParallelMesh",
    "agree",
    "all_gather",
    "average_gradients",
    "clip_gradients",
    "close_parallel",
    "context_parallel",
    "context_volume",
    "from_first",
    "init_parallel",
    "load_checkpoint",
    "on_whole_weights",
    "save_checkpoint",
    "set_whole",
    "shard_each",
    "shard_model",
    "shard_sequence",
    "share_of_loss",
    "total_over_ranks",
    "whole_state",
    "whole_tensor",
    "whole_weights",
    "with_whole_weights",
]
