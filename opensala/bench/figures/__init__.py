"""Every figure of speed in README and docs measured again by one command (`make figures`): which figures
there are and where each comes from (`registry`, over `benchmarks/figures.toml`), the commands in their order
(`plan`), what these need (`needs`), and how they are carried out and set beside what is stated (`run`).
"""

from .plan import Measurement, plan
from .registry import ROOT, Figure, Registry, read_registry
from .run import Options, run

__all__ = ["ROOT", "Figure", "Measurement", "Options", "Registry", "plan", "read_registry", "run"]
