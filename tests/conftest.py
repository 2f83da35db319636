"""Shared settings: uninitialised memory reads as NaN, so that an output nobody wrote fails its test.

Without a GPU, Triton's kernels run in its interpreter, which has to be asked for before they are imported.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from opensala import MiniCPMSALAConfig, MiniCPMSALAForCausalLM  # noqa: E402 -- the variable above comes first

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def tiny_config(**changes: Any) -> MiniCPMSALAConfig:
    """Two layers of each kind, small blocks: sparse attention leaves blocks out from 112 tokens on."""
    values: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "lightning_nh": 4,
        "lightning_nkv": 4,
        "lightning_head_dim": 8,
        "mixer_types": ["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"],
        "sparse_config": {
            "kernel_size": 8,
            "kernel_stride": 4,
            "block_size": 16,
            "init_blocks": 1,
            "window_size": 32,
            "topk": 5,
            "dense_len": 64,
        },
        "dim_model_base": 16,
        "scale_emb": 4,
        "eos_token_id": 2,
    }
    return MiniCPMSALAConfig(**{**values, **changes})


def two_layer_config(**changes: Any) -> MiniCPMSALAConfig:
    """A layer of each kind with blocks of the released sizes: every text of a test is attended densely."""
    values: dict[str, Any] = {
        "vocab_size": 80,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mixer_types": ["minicpm4", "lightning-attn"],
        "eos_token_id": 2,
    }
    return MiniCPMSALAConfig(**{**values, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> MiniCPMSALAForCausalLM:
    torch.manual_seed(seed)
    model = MiniCPMSALAForCausalLM(tiny_config(**changes)).eval()
    for parameter in model.parameters():  # larger than usual: attention must have something to prefer
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def model() -> MiniCPMSALAForCausalLM:
    return tiny_model()


@pytest.fixture
def build() -> Callable[..., MiniCPMSALAForCausalLM]:
    return tiny_model


@pytest.fixture
def one_thread():
    """Sums in one order: what is compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
