"""MiniCPM-SALA in the released checkpoint format: configuration, layers, cache, model."""

from .cache import SALACache
from .causal import MiniCPMSALAForCausalLM
from .config import MiniCPMSALAConfig
from .modeling import MiniCPMSALAModel, MiniCPMSALAPreTrainedModel, describe_attention

__all__ = [
    "MiniCPMSALAConfig",
    "MiniCPMSALAForCausalLM",
    "MiniCPMSALAModel",
    "MiniCPMSALAPreTrainedModel",
    "SALACache",
    "describe_attention",
]
