"""Model families. The folder is the registry: one file per family, each defining `FAMILY`. What several of them are
made of lies in `parts`. Folders beyond the tree may add to them: see `shared.registry`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.registry import Registry

if TYPE_CHECKING:
    from shared.families.base import Family

_REGISTRY = Registry(__name__, __path__, "model family")


def names() -> list[str]:
    """The families that are there."""
    return _REGISTRY.names()


def get(name: str) -> Family:
    """The family of this name. Raises `UserError` naming those there are."""
    module = _REGISTRY.module(name)
    family: Family = module.FAMILY
    assert family.name == name, f"{module.__file__} must define FAMILY, named '{name}' as the file is"
    return family
