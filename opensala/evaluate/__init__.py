"""Evaluation: suites, scoring, resumable runs, reports, and this engine as a model of lm-eval.

Importing this package tells lm-eval, where it is installed, that there is a model called `opensala`, without loading
lm-eval's tasks or models.
"""

import importlib.util


def register_with_lm_eval() -> bool:
    """Make `model="opensala"` known to lm-eval; False if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        return False
    from lm_eval.api.registry import model_registry

    if "opensala" not in model_registry:
        model_registry.register("opensala", target="opensala.evaluate.lm:OpenSALALM")
    return True


register_with_lm_eval()
