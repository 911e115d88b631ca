"""Files that are whole or absent: written beside their final name, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import UserError, disk_full
from shared.report import say, warn

PART = ".part"
"""The ending of what is still being written. A reader never opens it; the next run replaces it."""

_writer = ""


def write_as(writer: str) -> None:
    """From now on the files that this process is writing bear `writer` before their ending: for a process that others
    may take for dead and do the work of, so that two never write into one file."""
    global _writer
    _writer = f".{writer}"


def part_of(path: Path) -> Path:
    """What `path` is called while this process is writing it."""
    return path.with_name(f"{path.name}{_writer}{PART}")


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` only when the block ends well. A full disk raises `UserError`."""
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_directory(path.parent)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and (refusal := disk_full(error, f"writing {path}")):
            raise refusal from error
        raise


@contextmanager
def writing_directory(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` only when the block ends well, every file in it flushed to the disk.

    Nothing, or an empty folder, may be at `path`. A full disk raises `UserError`.
    """
    part = path.with_name(path.name + PART)
    if part.exists():
        shutil.rmtree(part)  # left by a process that was killed
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
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)  # what stays is removed by the next writer
        if isinstance(error, OSError) and (refusal := disk_full(error, f"writing {path}")):
            raise refusal from error
        raise


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` by `data`, whole or not at all."""
    with writing(path) as file:
        file.write(data)


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON, keys in the order given, non-ASCII text as it is."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `json_bytes` of `value`, whole or not at all."""
    write_bytes(path, json_bytes(value))


def make_directory(path: Path) -> None:
    """Make a folder, and those above it, where they are not there yet, so that they survive a power cut."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


LOCK = ".lock"
"""Made only on file systems that cannot lock a folder (NFS)."""


@contextmanager
def alone(folder: Path, doing: str, *, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for this process; another one that wants it gets a `UserError` at once, and so does this one where
    it may not write there. With `wait`, wait for the one that holds it.

    The lock is the kernel's on the folder itself: it leaves no file, and a killed process holds it no longer. NFS
    locks only files that are open for writing, so there it is on an empty file in the folder. Where there are no locks
    at all, a warning says so.
    """
    make_directory(folder)
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(
            f"{folder} is read-only for this user, and {doing} it means to write there; change its permissions or "
            "choose another folder"
        )
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            _lock(handle, f"another process is {doing} {folder}: waiting for it" if wait else None)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            os.close(handle)
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
            _lock(handle, f"another process is {doing} {folder}: waiting for it" if wait else None)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"another process is {doing} {folder}; wait for it or choose another folder") from error
    except OSError as error:
        warn(f"{folder} cannot be locked ({error.strerror}): see to it that no other process is {doing} it")
    try:
        yield
    finally:
        os.close(handle)


def _lock(handle: int, waiting: str | None) -> None:
    """Take the kernel's lock. Where another process holds it: say this, and wait; without it `BlockingIOError`."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise
        say(waiting)
        fcntl.flock(handle, fcntl.LOCK_EX)
