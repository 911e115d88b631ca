"""The conditions: what a ControlNet sees beside the noise. The folder is the registry: one file, one condition.

A new condition is a new file here, or in a folder beyond the tree (see `shared.registry`), that holds one final
subclass of `base.Condition` whose `name` is the file's. Nothing else changes. Importing a condition is light; what it
needs to draw, it imports when it is opened.
"""

from __future__ import annotations

from typing import Any

from preprocess.conditions.base import Condition
from shared.registry import Registry

_REGISTRY = Registry(__name__, __path__, "condition", apart=("base", "detection", "weights"))


def names() -> list[str]:
    """The conditions there are, sorted."""
    return _REGISTRY.names()


def get(name: str) -> type[Condition[Any]]:
    """The condition called `name`, or a `UserError` that says what there is."""
    module = _REGISTRY.module(name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Condition) and value.__module__ == module.__name__
    ]
    assert [condition.name for condition in found] == [name], f"{module.__name__} must hold one Condition, '{name}'"
    return found[0]
