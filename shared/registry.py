"""What there is of a kind: a folder is the registry, and folders beyond the tree may add to it.

`UNDERDRAWING_PATH` names folders (separated as in PATH) that are laid out as the tree is. A file
`FOLDER/preprocess/conditions/stipple.py` is then a condition as one in `preprocess/conditions/` is: it is imported as
`preprocess.conditions.stipple`, and could be moved into the tree as it stands.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Collection, Iterator, MutableSequence
from pathlib import Path
from types import ModuleType
from typing import Final

from shared.errors import UserError, nearest

VARIABLE: Final = "UNDERDRAWING_PATH"
ROOMS: Final = ("shared/families", "preprocess/conditions", "train/adapters")
"""The folders of the tree that are registries."""
_TREE: Final = Path(__file__).parents[1]


def folders() -> list[Path]:
    """The folders beyond the tree, absolute, in the order in which they are named."""
    named = os.environ.get(VARIABLE, "").split(os.pathsep)
    return list(dict.fromkeys(Path(name).expanduser().absolute() for name in named if name))


def check() -> None:
    """Refuse (`UserError`) folders beyond the tree that are not there, add nothing, or have a name twice."""
    stands: dict[str, Path] = {f"{room}/{name}": _TREE for room in ROOMS for name in _modules(_TREE / room)}
    for folder in folders():
        if not folder.is_dir():
            raise UserError(f"{VARIABLE} names {folder}, but there is no such folder")
        found = [f"{room}/{name}" for room in ROOMS for name in _modules(folder / room)]
        if not found:
            raise UserError(
                f"{VARIABLE} names {folder}, which adds nothing: lay it out as the tree is, with files in "
                f"{', '.join(ROOMS)}"
            )
        for name in found:
            if name in stands:
                raise UserError(f"{folder / name} has the name of one in {stands[name] / name}: give it another")
            stands[name] = folder


class Registry:
    """The modules of one package, and of the folders beyond the tree that are laid out as it is. Each is one thing."""

    def __init__(self, package: str, path: MutableSequence[str], kind: str, apart: Collection[str] = ("base",)) -> None:
        """`path`: the package's `__path__`, which grows by those folders. `kind`: in a sentence. `apart`: modules that
        are no such thing; packages, and names that begin with an underscore, never are."""
        self.package, self.path, self.kind, self.apart = package, path, kind, apart
        path.extend(str(folder / package.replace(".", "/")) for folder in folders())

    def names(self) -> list[str]:
        """What there is, sorted."""
        return sorted(
            module.name
            for module in pkgutil.iter_modules(self.path)
            if not module.ispkg and not module.name.startswith("_") and module.name not in self.apart
        )

    def module(self, name: str) -> ModuleType:
        """The one called `name`, imported. Raises `UserError` naming those there are."""
        if name not in self.names():
            raise UserError(f"unknown {self.kind} '{name}': {nearest(name, self.names())}")
        return importlib.import_module(f"{self.package}.{name}")


def _modules(folder: Path) -> Iterator[str]:
    """The names that a folder's files and packages are imported by."""
    return (module.name for module in pkgutil.iter_modules([str(folder)]))
