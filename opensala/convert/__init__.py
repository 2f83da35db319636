"""HALO: a pretrained softmax Transformer becomes a MiniCPM-SALA hybrid (arXiv 2601.22156, with the changes of
2602.11761).

Transfer of weights, alignment of the new mixers, choice of the layers that stay, distillation, and the run
that does all of it. Builds on the model and the data; knows nothing of continual training or of the engine.
"""

from .config import ConvertConfig, halo, sala, tiny
from .run import convert
from .selection import Scores, importance, select_layers
from .teacher import FAMILIES, load_teacher
from .transfer import assemble, lightning_mixers, student_config

__all__ = [
    "FAMILIES",
    "ConvertConfig",
    "Scores",
    "assemble",
    "convert",
    "halo",
    "importance",
    "lightning_mixers",
    "load_teacher",
    "sala",
    "select_layers",
    "student_config",
    "tiny",
]
