"""What somebody else may change about a model's modules between two steps."""

from collections.abc import Iterable

from torch import nn


class ModuleWatch:
    """Modules as they are when it is made; asked before every step, so all is kept as plain containers."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._members = [m.__dict__ for m in modules]
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._parameters = [(m._parameters, name) for m in modules for name in m._parameters]

    def disturbed(self) -> str | None:
        """Why the modules have to be called one by one (something must see each call, or replaces one), or
        None."""
        if any(self._hooks):
            return "a hook must see each call of a module"
        for modules, name, child in self._children:
            if modules.get(name) is not child:
                return f"{name} was replaced by a {type(modules.get(name)).__name__}"
        if any("forward" in members for members in self._members):
            return "the forward of a module was replaced"
        return None

    def addresses(self) -> list[int]:
        """Where each parameter lies now, 0 for one that is None: another list means that somebody moved or
        replaced some."""
        found = [parameters[name] for parameters, name in self._parameters]
        return [0 if p is None else p.data_ptr() for p in found]
