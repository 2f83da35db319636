"""What somebody else may change about a model's modules between two steps."""

from collections.abc import Iterable
from itertools import repeat
from operator import contains, getitem, is_

from torch import nn


class ModuleWatch:
    """Modules as they are when it is made; asked before every step, so all is kept as plain containers."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._members = [m.__dict__ for m in modules]
        placed = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._owners = [owner for owner, _, _ in placed]
        self._names = [name for _, name, _ in placed]
        self._children = [child for _, _, child in placed]
        owned = [(m._parameters, name) for m in modules for name in m._parameters]
        self._parameter_owners = [owner for owner, _ in owned]
        self._parameter_names = [name for _, name in owned]

    def disturbed(self) -> str | None:
        """Why the modules have to be called one by one (something must see each call, or replaces one), or
        None."""
        # Loops in C: there are hundreds of modules, and every step asks.
        if any(self._hooks):
            return "a hook must see each call of a module"
        now = list(map(dict.get, self._owners, self._names))
        if not all(map(is_, now, self._children)):
            gone = next(i for i, child in enumerate(self._children) if now[i] is not child)
            return f"{self._names[gone]} was replaced by a {type(now[gone]).__name__}"
        if any(map(contains, self._members, repeat("forward"))):
            return "the forward of a module was replaced"
        return None

    def addresses(self) -> list[int]:
        """Where each parameter lies now, 0 for one that is None: another list means that somebody moved or
        replaced some."""
        found = map(getitem, self._parameter_owners, self._parameter_names)
        return [0 if p is None else p.data_ptr() for p in found]
