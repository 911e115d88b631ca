"""What is trained, on or in the base. The folder is the registry: one file per adapter, each defining `ADAPTER`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from shared.errors import UserError, nearest

if TYPE_CHECKING:
    from train.adapters.base import Adapter


def names() -> list[str]:
    """The adapters that are there."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def get(name: str) -> type[Adapter]:
    """The adapter of this name. Raises `UserError` naming those there are."""
    if name not in names():
        raise UserError(f"unknown adapter '{name}': {nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}").ADAPTER
