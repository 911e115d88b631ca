"""Files that are whole or absent: written beside their final name, flushed to the disk, then renamed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import UserError, disk_full

PART = ".part"
"""The ending of what is still being written. A reader never opens it; the next run replaces it."""


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` only when the block ends well. A full disk raises `UserError`."""
    part = path.with_name(path.name + PART)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_directory(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise disk_full(error, f"writing {path}") or error from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def writing_directory(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` only when the block ends well, every file in it flushed to the disk."""
    part = path.with_name(path.name + PART)
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        yield part
        for file in sorted(part.rglob("*")):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
            else:
                sync_directory(file)
        sync_directory(part)
        os.replace(part, path)
        sync_directory(path.parent)
    except OSError as error:
        raise disk_full(error, f"writing {path}") or error from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all."""
    with writing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, keys in the order given, non-ASCII text as it is."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Hold `folder` for this process; another one that wants it gets a `UserError` at once.

    The lock is the kernel's on the folder itself: it leaves no file, and a killed process holds it no longer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is {doing} {folder}; wait for it or choose another folder") from error
        yield
    finally:
        os.close(handle)
