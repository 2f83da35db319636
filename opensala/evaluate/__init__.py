"""Evaluation: suites, scoring, resumable runs, reports, and this engine as a model of lm-eval."""

from .registration import register_with_lm_eval

__all__ = ["register_with_lm_eval"]
