"""What is trained, on or in the base. The folder is the registry: one file per adapter, each defining `ADAPTER`.
Folders beyond the tree may add to them: see `shared.registry`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.registry import Registry

if TYPE_CHECKING:
    from train.adapters.base import Adapter

_REGISTRY = Registry(__name__, __path__, "adapter")


def names() -> list[str]:
    """The adapters that are there."""
    return _REGISTRY.names()


def get(name: str) -> type[Adapter]:
    """The adapter of this name. Raises `UserError` naming those there are."""
    module = _REGISTRY.module(name)
    adapter: type[Adapter] = module.ADAPTER
    assert adapter.name == name, f"{module.__file__} must define ADAPTER, named '{name}' as the file is"
    return adapter
