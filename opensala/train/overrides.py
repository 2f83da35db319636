"""Changes to a recipe from text: `stable.peak=1e-3`, `micro_tokens=8192`, and paths for its sources.

Every name and value is checked against the recipe, so that a typing error is refused before anything is read
or written.
"""

import difflib
import math
from dataclasses import replace
from typing import Any

from ..model.config import check_choice
from .recipe import Halo, Recipe, Stage
from .schedule import Schedule


def _parsed(name: str, text: str, old: Any) -> Any:
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(old, int):
            number = float(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if isinstance(old, float) or old is None:
            number = float(text)
            if not math.isfinite(number):
                raise ValueError
            return number
    except (KeyError, ValueError, OverflowError):
        kind = (
            "true or false"
            if isinstance(old, bool)
            else "a whole number"
            if isinstance(old, int)
            else "a number"
        )
        raise ValueError(f"{name} must be {kind}, got {text!r}") from None
    return text


def _changed(item: Any, path: list[str], text: str, name: str) -> Any:
    """A frozen dataclass with one field, however deep, replaced by the parsed text."""
    names = tuple(item.__dataclass_fields__)
    head, *rest = path
    if head not in names and isinstance(item, Stage) and head in Schedule.__dataclass_fields__:
        return replace(item, schedule=_changed(item.schedule, path, text, name))
    if head not in names or (
        not rest and not isinstance(getattr(item, head), (bool, int, float, str, type(None)))
    ):
        allowed = [*names, *(Schedule.__dataclass_fields__ if isinstance(item, Stage) else ())]
        near = difflib.get_close_matches(head, allowed, n=1)
        raise ValueError(
            f"{name}: there is no field {head!r} to set{f', did you mean {near[0]!r}?' if near else ''} "
            f"Fields: {', '.join(allowed)}"
        )
    old = getattr(item, head)
    return replace(item, **{head: _changed(old, rest, text, name) if rest else _parsed(name, text, old)})


def override(recipe: Recipe, setting: str) -> Recipe:
    """Apply `field=value` (of the recipe) or `stage.field=value`, as `stable.peak=1e-3` or
    `halo.config.length=256`.

    Raises:
        ValueError: a stage or field that does not exist (with the nearest name), or a value of the wrong
            kind.
    """
    name, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"--set takes FIELD=VALUE or STAGE.FIELD=VALUE, got {setting!r}")
    path = name.split(".")
    if len(path) == 1 or path[0] in ("optimizer", "guard"):
        return _changed(recipe, path, text, name)
    stage = recipe.stage(path[0])
    new = _changed(stage, path[1:], text, name)
    return replace(recipe, stages=tuple(new if s is stage else s for s in recipe.stages))


def bind(recipe: Recipe, paths: dict[str, str]) -> Recipe:
    """Give sources their paths by name, in every stage; `halo` names the conversion's texts. ValueError for a
    name that no stage has."""
    known = {s.name for stage in recipe.stages if isinstance(stage, Stage) for s in stage.mixture}
    known |= {stage.name for stage in recipe.stages if isinstance(stage, Halo)}
    for name in paths:
        check_choice("a source of --data", name, tuple(sorted(known)))
    return replace(
        recipe,
        stages=tuple(
            replace(stage, mixture=tuple(replace(s, path=paths.get(s.name, s.path)) for s in stage.mixture))
            if isinstance(stage, Stage)
            else _fed(stage, paths.get(stage.name))
            for stage in recipe.stages
        ),
    )


def _fed(stage: Halo, path: str | None) -> Halo:
    return stage if path is None else replace(stage, config=replace(stage.config, data=(path,)))
