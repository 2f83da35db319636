"""Parameters, gradients and optimizer state sharded over all ranks, by FSDP2.

A decoder layer is one unit: its weights are gathered when it runs, forward and backward, and freed behind it.
Embedding, last norm and head belong to the root, which stays gathered from the forward pass to the backward
pass.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..model.modeling import MiniCPMSALADecoderLayer
from .mesh import ParallelMesh


def shard_model(
    model: nn.Module, mesh: ParallelMesh, *, compute_dtype: torch.dtype | None = None
) -> nn.Module:
    """Shard the model in place and return it. Make the optimizer afterwards: it must hold the sharded
    parameters.

    Args:
        model: on any device; its parameters become shards on the mesh's device.
        compute_dtype: dtype of weights and activations in forward and backward (torch.bfloat16); the shards,
            which the optimizer updates, keep the dtype they have, and gradients are summed in float32.

    Raises:
        RuntimeError: parameters that stayed whole.
    """
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, MiniCPMSALADecoderLayer)]
    for layer in [*layers, model]:
        fully_shard(layer, mesh=mesh.shard, mp_policy=_policy(compute_dtype))
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if whole or not layers:
        raise RuntimeError(
            f"sharding left {len(whole)} parameters whole ({', '.join(whole[:3])}) and found "
            f"{len(layers)} decoder layers"
        )
    return model


def shard_each(
    modules: Iterable[nn.Module], mesh: ParallelMesh, *, compute_dtype: torch.dtype | None = None
) -> None:
    """Shard modules in place, each a unit of its own that is run, and learns, without the others.

    Their weights are shards again behind every forward pass, so that they may be read and written then.
    Arguments as of `shard_model`.
    """
    for module in modules:
        fully_shard(module, mesh=mesh.shard, mp_policy=_policy(compute_dtype), reshard_after_forward=True)


def _policy(compute_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Activations follow the embedding; loss weights stay float32."""
    return MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=compute_dtype and torch.float32, cast_forward_inputs=False
    )


def with_whole_weights(model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """`function(model, *args)` while the weights of the model's root (embedding, last norm, head) are whole;
    a plain call for a model that is not sharded. See `on_whole_weights`."""
    if not isinstance(model, FSDPModule):
        return function(model, *args)
    name = f"_with_whole_weights_{function.__module__}.{function.__qualname__}"
    call = getattr(model, name, None) or on_whole_weights(model, function, name)
    return call(*args)


def whole_tensor(x: Tensor) -> Tensor:
    """A tensor in full, on every rank, whether it was sharded or not; all ranks must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Every weight in full on every rank, on the CPU where it was sharded, else as it is; all ranks must
    call it."""
    return {
        name: whole_tensor(x).detach().cpu() if isinstance(x, DTensor) else x.detach()
        for name, x in module.state_dict().items()
    }


@torch.no_grad()
def set_whole(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter, sharded or not, a value that every rank has in full."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.to_local()), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def on_whole_weights(
    model: nn.Module, function: Callable[..., Any], name: str = "run_on_whole_weights"
) -> Callable[..., Any]:
    """`function(model, ...)` as a call during which the root's weights (embedding, head) are whole, as in
    `model(...)`.

    A loss in chunks reads `model.lm_head.weight` itself, outside of the model's forward; on a sharded model
    that is a shard. Outputs must be tensors, or tuples, lists or dicts of them. A model that is not sharded
    needs none of this.
    """
    setattr(model, name, MethodType(function, model))
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, name)
    return getattr(model, name)


def average_gradients(model: nn.Module, mesh: ParallelMesh) -> None:
    """Average the gradients over all ranks, of a model that is not sharded (FSDP does it itself)."""
    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.all_reduce(parameter.grad, group=mesh.shard.get_group())
            parameter.grad /= mesh.world


def clip_gradients(model: nn.Module, most: float) -> float:
    """Scale all gradients so that their norm over all ranks is at most `most`; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight in full, on the CPU of rank 0 (empty on the others); all ranks must call it. For
    `save_pretrained`."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: x for name, x in weights.items() if isinstance(x, Tensor)}
