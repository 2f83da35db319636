"""Evaluation: suites, scoring, resumable runs, reports, and this engine as a model of lm-eval.

Importing this package (`import opensala` does) sees to it that lm-eval knows a model called `opensala`,
whichever of the two is imported first, and without importing lm-eval.
"""

from .registration import register_with_lm_eval

__all__ = ["register_with_lm_eval"]

register_with_lm_eval()
