"""Making `model="opensala"` known to lm-eval.

lm-eval finds models in a registry that takes the name of a class ("module:class") in place of the class. It
has no entry points through which an installed package could add to it, so whoever wants the name asks for it.
"""

NAME, TARGET = "opensala", "opensala.evaluate.requests:ResumingLM"


def register_with_lm_eval() -> None:
    """Add the model to lm-eval's registry; harmless if done twice.

    Raises:
        ValueError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ValueError("lm-eval is not installed: pip install 'opensala[eval]'") from error
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
