"""What our ops are compared with: torch's dense attention in all its forms, and flash-linear-attention where
it is installed."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KINDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
MATH_LIMIT = 4096  # tokens: it writes the whole score matrix to memory


def dense_attention(q: Tensor, k: Tensor, v: Tensor, kind: str | None = None) -> Tensor:
    """Causal `scaled_dot_product_attention` of q `[B, T, Hq, D]`, k and v `[B, T, Hkv, D]`; torch chooses if
    kind is None.

    Raises:
        RuntimeError: torch has no such kernel for these tensors.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if kind is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if kind == "efficient":  # it knows no groups
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    with sdpa_kernel(KINDS[kind]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kind != "efficient")


def usable_kinds(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[str], list[str]]:
    """The forms of dense attention that run on tensors like these, and for each other one why not."""
    usable, refused = [], []
    for kind in KINDS:
        if kind == "math" and q.shape[1] > MATH_LIMIT:
            refused.append(f"math: above {MATH_LIMIT} tokens its score matrix is too large")
            continue
        try:
            dense_attention(q[:, :256], k[:, :256], v[:, :256], kind)
        except RuntimeError as error:
            refused.append(f"{kind}: {str(error).splitlines()[0]}")
        else:
            usable.append(kind)
    return usable, refused


def fla_installed() -> bool:
    return importlib.util.find_spec("fla") is not None


def simple_gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Callable[[], Tensor]:
    """flash-linear-attention's chunked form of the same recurrence; decay `[H]` as in
    `lightning_attention`."""
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda: chunk_simple_gla(q, k, v, g_gamma=-decay)[0]


def nsa(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int) -> Callable[[], Tensor]:
    """flash-linear-attention's attention over given blocks (native sparse attention), selection given, no
    window."""
    from fla.ops.nsa import parallel_nsa

    gate, lists = torch.ones(q.shape[:3], dtype=q.dtype, device=q.device), blocks.long()
    return lambda: parallel_nsa(
        q, k, v, g_slc=gate, block_indices=lists, block_counts=blocks.shape[-1], block_size=block_size
    )


def moba(q: Tensor, k: Tensor, v: Tensor, block_size: int, count: int) -> Callable[[], Tensor]:
    """flash-linear-attention's mixture of block attention: it selects by block means and attends; needs
    flash-attn."""
    from fla.ops.moba import parallel_moba

    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    bounds = torch.tensor([0, q.shape[1]], dtype=torch.int32, device=q.device)
    return lambda: parallel_moba(q, k, v, bounds, q.shape[1], block_size, count)
