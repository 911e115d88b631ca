"""Model families. The folder is the registry: one file per family, each defining `FAMILY`. What several of them are
made of lies in `parts`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from shared.errors import UserError, nearest

if TYPE_CHECKING:
    from shared.families.base import Family


def names() -> list[str]:
    """The families that are there."""
    return sorted(
        module.name for module in pkgutil.iter_modules(__path__) if module.name != "base" and not module.ispkg
    )


def get(name: str) -> Family:
    """The family of this name. Raises `UserError` naming those there are."""
    if name not in names():
        raise UserError(f"unknown model family '{name}': {nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}").FAMILY
