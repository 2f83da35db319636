"""Making `model="opensala"` known to lm-eval without importing it.

lm-eval finds models in a registry that takes the name of a class ("module:class") in place of the class, but
it has no entry points through which an installed package could add to that registry. So the name is added
when lm-eval's registry
is imported: at once if it is there already, otherwise by a finder that waits for that one module and then
    steps aside.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

NAME, TARGET = "opensala", "opensala.evaluate.requests:ResumingLM"
_REGISTRY = "lm_eval.api.registry"


def register_with_lm_eval() -> None:
    """Add the model to lm-eval's registry, now or as soon as it is imported; harmless if done twice or
    without lm-eval."""
    if _REGISTRY in sys.modules:
        _register(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _WaitForRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForRegistry())


def _register(registry: ModuleType) -> None:
    if NAME not in registry.model_registry:
        registry.model_registry.register(NAME, target=TARGET)


class _WaitForRegistry(importlib.abc.MetaPathFinder):
    """Finds one module, in the way that others would find it, with a loader that registers the model once it
    has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfterwards(spec.loader)
        return spec


class _RegisterAfterwards(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # what anybody who asks should see
        self._loader.exec_module(module)
        _register(module)
