"""Sizes of a run: those of the released 9B model, and tiny ones for the rehearsal."""

from dataclasses import dataclass, field
from typing import Any

from ...model import MiniCPMSALAConfig
from ...ops import BlockSpec

K = 1024


def released_config(**changes: Any) -> MiniCPMSALAConfig:
    """The released 9B model: 9.48B parameters; `lightning_nkv` has another default when it is absent."""
    return MiniCPMSALAConfig(**{"lightning_nkv": 32, **changes})


@dataclass(frozen=True)
class Sizes:
    """What is measured how large; lengths in tokens.

    Attributes:
        product: side of the square matrix product of the ceilings.
        copied: bytes of the copy.
        lengths: whole sequences through each kernel.
        far: contexts of which only the last chunk goes through the kernels.
        chunk: tokens of a chunk, of the engine too.
        decoding: contexts of a decoding step of the sparse kernels.
        prompts: prompts that the whole model reads.
        long_prompt: the last one, stopped by time.
        warm_up: a prompt read before, so that everything is compiled.
        decoded: tokens generated behind each prompt.
        model: changes to the released configuration.
        ahead: groups that processes of their own run beside the tests, so that kernels are compiled early.
        shorten: how many times shorter than usual the texts are on which results are checked.
    """

    product: int = 8192
    copied: int = 1 << 30
    lengths: tuple[int, ...] = (64 * K, 256 * K)
    far: tuple[int, ...] = (512 * K, 1024 * K)
    chunk: int = 4096
    decoding: tuple[int, ...] = (8 * K, 256 * K, 1024 * K)
    prompts: tuple[int, ...] = (64 * K, 256 * K)
    long_prompt: int = 1024 * K
    warm_up: int = 9000
    decoded: int = 32
    heads: int = 32
    kv_heads: int = 2
    dim: int = 128
    lightning_heads: int = 32
    hidden: int = 4096
    intermediate: int = 16384
    spec: BlockSpec = BlockSpec()
    model: dict[str, Any] = field(default_factory=dict)
    ahead: tuple[str, ...] = ("kernels", "model,million")
    shorten: int = 1

    def config(self) -> MiniCPMSALAConfig:
        """The whole model's configuration. Weights of standard deviation 0.02 keep the softmax of random
        queries and keys from being one-hot, as 0.1 would make it."""
        return released_config(**{"initializer_range": 0.02, **self.model})


# One layer of each kind: the kernels are those of the whole model, at contexts of every length that matters
# to what is compiled.
AHEAD = Sizes(
    lengths=(64 * K,),
    far=(256 * K, 512 * K, 1024 * K),
    decoded=4,
    ahead=(),
    model={"num_hidden_layers": 2, "mixer_types": ["minicpm4", "lightning-attn"]},
)
_BLOCKS = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "init_blocks": 1,
    "window_size": 16,
    "topk": 2,
}
TINY = Sizes(
    product=128,
    copied=1 << 16,
    lengths=(80,),
    far=(96,),
    chunk=32,
    decoding=(80,),
    prompts=(65, 80),
    long_prompt=96,
    warm_up=50,
    decoded=2,
    heads=2,
    kv_heads=1,
    dim=16,
    lightning_heads=2,
    hidden=32,
    intermediate=48,
    spec=BlockSpec(**_BLOCKS),
    shorten=16,
    ahead=("ceilings",),
    model={
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "lightning_nh": 2,
        "lightning_nkv": 2,
        "lightning_head_dim": 16,
        "mixer_types": ["minicpm4", "lightning-attn"],
        "sparse_config": {**_BLOCKS, "dense_len": 48},
        "dim_model_base": 16,
        "eos_token_id": 2,
    },
)
