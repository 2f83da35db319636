"""The modules of the package that hold Triton kernels."""

import importlib
import pkgutil
from types import ModuleType

import opensala.ops


def triton_modules() -> list[ModuleType]:
    """Those whose names begin with `triton`, imported; whether kernels are interpreted is decided then."""
    names = [m.name for m in pkgutil.walk_packages(opensala.ops.__path__, "opensala.ops.")]
    return [importlib.import_module(name) for name in names if name.rpartition(".")[2].startswith("triton")]
