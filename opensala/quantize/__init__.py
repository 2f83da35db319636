"""Weights in 4 or 8 bits, calibrated (GPTQ, arXiv 2210.17323), in the layout that others load.

What a quantised layer is and how it is loaded is known to `opensala.model`; here is how one is made, and what
it costs in quality.
"""

from .layers import DEFAULT_KINDS, KINDS
from .run import Plan, quantise_checkpoint

__all__ = ["DEFAULT_KINDS", "KINDS", "Plan", "quantise_checkpoint"]
