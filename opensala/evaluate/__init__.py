"""Evaluation: suites, scoring, resumable runs, reports, and this engine as a model of lm-eval."""
