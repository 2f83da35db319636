"""The thirteen task types of RULER (arXiv 2404.06654) in our own words, at any length, offline and from a
seed.

The types, their parameters and their token budgets are RULER's; every sentence is ours. Scores are therefore
not comparable digit by digit with published ones: `opensala.evaluate` also reads the files RULER itself
    writes.
It knows tokenizers (to measure lengths), but no model.
"""

from .fit import TOLERANCE, FittedDocument, fit_document
from .tasks import TASKS, RulerTask, ruler_task
from .types import RulerDocument, RulerQuestion

__all__ = [
    "TASKS",
    "TOLERANCE",
    "FittedDocument",
    "RulerDocument",
    "RulerQuestion",
    "RulerTask",
    "fit_document",
    "ruler_task",
]
