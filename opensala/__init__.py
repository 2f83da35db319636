"""OpenSALA: MiniCPM-SALA hybrid sparse/linear language models, from conversion to million-token inference.

Importing this package registers the model with transformers' Auto classes. It needs no GPU and no extra.
"""

from . import starting as _starting  # noqa: F401, I001 -- before what takes seconds to import
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, MiniCPMSALAModel, SALACache

__version__ = "0.1.0"
__all__ = ["MiniCPMSALAConfig", "MiniCPMSALAForCausalLM", "MiniCPMSALAModel", "SALACache", "__version__"]

AutoConfig.register(MiniCPMSALAConfig.model_type, MiniCPMSALAConfig)
AutoModel.register(MiniCPMSALAConfig, MiniCPMSALAModel)
AutoModelForCausalLM.register(MiniCPMSALAConfig, MiniCPMSALAForCausalLM)
