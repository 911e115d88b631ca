"""The conditions: what a ControlNet sees beside the noise. The folder is the registry: one file, one condition.

A new condition is a new file here that holds one final subclass of `base.Condition` whose `name` is the file's. Nothing
else changes. Importing a condition is light; what it needs to draw, it imports when it is opened.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Final

from preprocess.conditions.base import Condition
from shared.errors import UserError, nearest

_SHARED: Final = frozenset({"base", "detection", "weights"})
"""The files here that are no conditions: what several of them share."""


def names() -> list[str]:
    """The conditions there are, sorted: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def get(name: str) -> type[Condition[Any]]:
    """The condition called `name`, or a `UserError` that says what there is."""
    if name not in names():
        raise UserError(f"no condition is called '{name}': {nearest(name, names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Condition) and value.__module__ == module.__name__
    ]
    assert [condition.name for condition in found] == [name], f"{module.__name__} must hold one Condition, '{name}'"
    return found[0]
