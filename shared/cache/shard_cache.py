"""Shards of remote caches kept on this machine: bounded in bytes, shared by all its processes, kept between runs.

What was used longest ago goes first, and never what a process holds. All agreement is by the kernel's locks on the
files themselves, so that a killed process holds nothing: who uses a file has it locked shared, who fetches one has its
`.part` locked alone, who makes room has `.lock` locked alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.atomic import LOCK, PART
from shared.errors import UserError
from shared.report import warn

SHARDS = "shards"
"""FOLDER/CACHE/shards/...: all that is counted and removed. Other files of FOLDER/CACHE are not looked at."""


class Part:
    """A file that this process alone is fetching: written to `handle`, it gets its name when it is whole."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self.handle = path, handle

    def finish(self) -> int | None:
        """It is whole: give it its name. The handle comes back, holding it; None where it has already been removed."""
        _touch(self.handle)
        os.rename(part_of(self.path), self.path)
        fcntl.flock(self.handle, fcntl.LOCK_SH)  # not at once: it may be removed between the one lock and the other
        if _is_at(self.handle, self.path):
            return self.handle
        os.close(self.handle)
        return None

    def give_up(self) -> None:
        """Remove what there is of it."""
        part_of(self.path).unlink(missing_ok=True)
        os.close(self.handle)


def begin(path: Path, *, wait: bool) -> Part | None:
    """The right to fetch `path`, which nobody else has meanwhile. None where another has it, or had: look again.

    With `wait`, not before the other is done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(part_of(path), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # Asked again and again, since waiting in the kernel would be for the file, which goes on being held when it
        # has its name.
        while _is_at(handle, part_of(path)):
            with suppress(BlockingIOError):
                _lock(handle, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(handle, part_of(path)):
                    mine, handle = handle, -1
                    return Part(path, mine)
                break
            if not wait:
                break
            time.sleep(0.02)
        return None
    finally:
        if handle >= 0:
            os.close(handle)


def hold(path: Path, num_bytes: int) -> int | None:
    """Keep a file from being removed, and note its use: the handle holds it until it is closed. None where there is
    no file of this size."""
    while True:
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        _lock(handle, path, fcntl.LOCK_SH)
        if _is_at(handle, path):
            break
        os.close(handle)  # removed while this waited for the lock
    if os.fstat(handle).st_size == num_bytes:
        with suppress(PermissionError):  # another user's: its age is that one's business
            _touch(handle)
        return handle
    os.close(handle)
    return None


class ShardCache:
    """A folder whose fetched shards, those of all caches, have at most `limit_bytes` together."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._warned = False

    def make_room(self, part: Part, num_bytes: int, let_go: Callable[[], bool], *, crowd: bool) -> bool:
        """Remove what was used longest ago until `part` may grow to `num_bytes`, which are then reserved: until the
        limit is kept and the disk has room.

        `let_go` gives up something that this process holds, or says that there is nothing more. Where all that is left
        is held, False comes back; with `crowd` the limit is exceeded instead, and a warning says so.
        """
        while (too_many := self._make_room(part, num_bytes)) > 0:
            if let_go():
                continue
            if not crowd:
                return False
            if not self._warned:
                self._warned = True
                warn(
                    f"the shards in use at once need {too_many:,} bytes more than {self.folder} has for them: raise "
                    f"remote.shard_cache_bytes ({self.limit_bytes:,}) where the disk allows, or choose another "
                    "remote.folder"
                )
            os.ftruncate(part.handle, num_bytes)
            break
        return True

    def finish(self, part: Part) -> int | None:
        """`part.finish()` while nobody counts: a file whose name changes as its folder is read could be overlooked, and
        too much be fetched beside it."""
        with self._alone():
            return part.finish()

    def _make_room(self, part: Part, num_bytes: int) -> int:
        """Bytes that are still too many; where there are none, the room is reserved."""
        with self._alone():
            files = [file for file in self._files() if file[2] != str(part_of(part.path))]
            free = shutil.disk_usage(self.folder).free - sum(unwritten for *_, unwritten in files)
            too_many = num_bytes + max(sum(file[1] for file in files) - self.limit_bytes, -free)
            for _, size, path, _ in sorted(files):
                if too_many <= 0:
                    break
                if _removed(path):
                    too_many -= size
            if too_many <= 0:
                os.ftruncate(part.handle, num_bytes)  # counted by others from now on
            return too_many

    def _files(self) -> Iterator[tuple[int, int, str, int]]:
        """(last use, bytes, path, bytes still to be written) of every shard, those being fetched too."""
        for cache in os.scandir(self.folder):
            for folder, _, names in os.walk(os.path.join(cache.path, SHARDS)):
                for name in names:
                    path = os.path.join(folder, name)
                    with suppress(FileNotFoundError):
                        stat = os.stat(path)
                        unwritten = max(stat.st_size - stat.st_blocks * 512, 0) if name.endswith(PART) else 0
                        yield stat.st_mtime_ns, stat.st_size, path, unwritten

    @contextmanager
    def _alone(self) -> Iterator[None]:
        handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, self.folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def part_of(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(path.name + PART)


def _touch(handle: int) -> None:
    """Note that the file is used now; by the clock, since the kernel's own stamps are some milliseconds apart."""
    now = time.time_ns()
    os.utime(handle, ns=(now, now))


def _removed(path: str) -> bool:
    """Remove a file that nobody holds or fetches; whether it is gone."""
    try:
        handle = os.open(path, os.O_RDWR)  # NFS locks for writing only what is open for it
    except FileNotFoundError:
        return True
    except PermissionError:  # another user's
        return False
    try:
        _lock(handle, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(handle, path):
            os.unlink(path)
        return True
    except BlockingIOError:  # held
        return False
    finally:
        os.close(handle)


def _lock(handle: int, path: str | Path, how: int) -> None:
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be locked ({error.strerror}), by which processes agree on fetched shards: choose a "
            "remote.folder on a local disk"
        ) from error


def _is_at(handle: int, path: str | Path) -> bool:
    """Whether the open file is the one that now has this path."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (here.st_ino, here.st_dev) == (there.st_ino, there.st_dev)
