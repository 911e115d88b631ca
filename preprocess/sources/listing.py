"""The files below a folder of this machine, and which of them are images by their names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from shared.errors import UserError

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
"""What makes a file a sample where nothing names it, in lower case. What it really is, its content decides."""

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""What names a folder's images, unless the options name another file."""
FILL50K = ("prompt.json", "train.jsonl")
"""What names them in fill50k, as ControlNet's authors have it and as the hub has: taken where there is none of the
others and its first line names a file that is there."""


def walk(data: Path) -> Iterator[str]:
    """The names of all files below `data`, relative to it, without hidden ones; every folder once, links or not."""
    visited = {_identity(data)}
    for folder, subfolders, files in os.walk(data, followlinks=True, onerror=refuse_to_read):
        entered: list[str] = []
        for subfolder in sorted(subfolders):
            identity = _identity(Path(folder, subfolder))
            if not subfolder.startswith(".") and identity not in visited:
                visited.add(identity)
                entered.append(subfolder)
        subfolders[:] = entered
        for file in files:
            if file.startswith("."):
                continue
            name = Path(folder, file).relative_to(data).as_posix()
            if not name.isascii():
                _refuse_other_encodings(name, data)
            yield name


def _identity(folder: Path) -> tuple[int, int]:
    """What two paths to one folder have in common: without it, a link to a parent would be walked forever."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _refuse_other_encodings(name: str, data: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the file name {os.fsencode(name)!r} in {data} is not UTF-8; rename the file") from error


def refuse_to_read(error: OSError) -> NoReturn:
    """The `UserError` for a file or folder that cannot be opened."""
    raise UserError(f"{error.filename} cannot be read: {error.strerror}; check its permissions") from error
