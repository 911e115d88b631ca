"""Let the file system fail: every change that this process makes to a folder is counted, and the n-th goes wrong.

Installed for good, in a child process that does one thing. Python's own `open` and `os` are where it takes hold; the
torture compares what it counted with what lies on the disk, so that nothing is written behind its back.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

When = Literal["before", "half", "after"]
"""The operation was not begun; a write has written half of its bytes; the operation is done."""

# What this module itself uses, and everyone else before `install`.
_open, _replace, _unlink = builtins.open, os.replace, os.unlink


@dataclass(frozen=True)
class Operation:
    """One change to the folder, about to be made or just made."""

    number: int
    """0, 1, ... in this process."""
    kind: Literal["create", "write", "fsync", "rename", "mkdir", "unlink"]
    path: str
    """The file, or for `fsync` the folder; the old name for `rename`."""
    target: str = ""
    """The new name, for `rename`."""
    half: Callable[[], object] = lambda: None
    """Write the first half of the bytes; nothing for other kinds."""


class Fault(Protocol):
    """What goes wrong, asked around every operation."""

    def before(self, operation: Operation) -> bool:
        """Whether the operation may be done whole; else half of it is, as a disk that fills up does to a write. May
        raise, and may never come back."""

    def after(self, operation: Operation) -> None:
        """The operation is done."""


def die() -> NoReturn:
    """End this process as SIGKILL does: no clean-up of any kind runs."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


class Nothing:
    """Nothing goes wrong."""

    def before(self, operation: Operation) -> bool:
        return True

    def after(self, operation: Operation) -> None:
        pass


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the n-th operation."""

    number: int
    when: When

    def before(self, operation: Operation) -> bool:
        if operation.number == self.number and self.when != "after":
            if self.when == "half":
                operation.half()
            die()
        return True

    def after(self, operation: Operation) -> None:
        if operation.number == self.number:
            die()


@dataclass
class Full:
    """The disk is full from the n-th operation on: a write is cut short, what comes then fails. Removing succeeds.

    Where it does not stay full (somebody else frees space), only the first failure is one.
    """

    number: int
    stays: bool
    failures: int = 0

    def before(self, operation: Operation) -> bool:
        if operation.number < self.number or operation.kind == "unlink" or (self.failures and not self.stays):
            return True
        if operation.number == self.number and operation.kind == "write":
            return False
        self.failures += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def after(self, operation: Operation) -> None:
        pass


@dataclass
class _Name:
    """A change of names that may not be on the disk yet."""

    path: str
    """The name that it made or took."""
    undo: Callable[[], object]

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path)


@dataclass
class PowerCut:
    """Before the n-th operation the power is cut: what was not flushed to the disk is lost, all or some of it.

    Bytes of a file that were not fsynced are cut off at random. Of the changes to a folder's names since it was last
    fsynced, a random number of the last ones never happened.
    """

    number: int
    seed: str
    stash: Path
    """A folder on the same disk, for what is replaced or removed and may come back."""
    dirty: set[str] = field(default_factory=set)
    """Files with bytes that were not flushed."""
    names: list[_Name] = field(default_factory=list)
    _kept: str | None = None

    def before(self, operation: Operation) -> bool:
        if operation.number == self.number:
            self._cut(random.Random(self.seed))
            die()
        if operation.kind in ("rename", "unlink"):
            self._kept = self._keep(operation.target or operation.path)
        return True

    def after(self, operation: Operation) -> None:
        path, target, kept = operation.path, operation.target, self._kept
        if operation.kind == "create":
            self.names.append(_Name(path, lambda: _unlink(path)))
        elif operation.kind == "mkdir":
            self.names.append(_Name(path, lambda: shutil.rmtree(path)))
        elif operation.kind == "unlink":
            self.names.append(_Name(path, lambda: kept and _replace(kept, path)))
        elif operation.kind == "rename":
            self.names.append(_Name(target, lambda: (_replace(target, path), kept and _replace(kept, target))))
            self.dirty = {target if file == path else file for file in self.dirty}
        elif operation.kind == "write":
            self.dirty.add(path)
        else:
            self.dirty.discard(path)
            self.names = [name for name in self.names if name.folder != path]

    def _keep(self, path: str) -> str | None:
        """Another name for the file at `path`, under which it outlives this one; None where there is no file."""
        if not os.path.isfile(path):
            return None
        self.stash.mkdir(exist_ok=True)
        kept = str(self.stash / str(len(list(self.stash.iterdir()))))
        os.link(path, kept)
        return kept

    def _cut(self, dice: random.Random) -> None:
        for path in sorted(self.dirty):
            if os.path.isfile(path):
                os.truncate(path, dice.randint(0, os.path.getsize(path)))
        lost: list[_Name] = []
        for folder in sorted({name.folder for name in self.names}):
            changes = [name for name in self.names if name.folder == folder]
            lost += changes[dice.randint(0, len(changes)) :]
        for name in reversed(self.names):
            if name in lost and os.path.isdir(name.folder):
                name.undo()


class _Raw(io.FileIO):
    """A file whose every write is an operation."""

    def __init__(self, path: str, do: Callable[..., Any]) -> None:
        super().__init__(path, "w")
        self.do = do

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        whole = super().write
        half = max(1, len(view) // 2)
        return self.do("write", str(self.name), lambda: whole(view), half=lambda: whole(view[:half]))


def install(folder: Path, fault: Fault, log: Path) -> None:
    """From now on every change below `folder` (which need not be there yet) that this process makes is an operation.

    A line for each that was done goes to `log`: its kind, and the path or new name, relative to the folder.
    """
    root = os.path.abspath(folder)
    numbers = itertools.count()
    opened: dict[int, str] = {}

    def ours(path: Any) -> str | None:
        if isinstance(path, int):
            return opened.get(path)
        name = os.path.abspath(os.fspath(path))
        return name if name == root or name.startswith(f"{root}/") else None

    def watched(path: Any) -> str | None:
        name = os.path.abspath(os.fspath(path))
        return name if name == os.path.dirname(root) else ours(name)  # whose flushing keeps the folder itself

    def do(kind: Any, path: str, whole: Callable[[], Any], *, target: str = "", half: Any = None) -> Any:
        operation = Operation(next(numbers), kind, path, target, half or (lambda: None))
        result = whole() if fault.before(operation) else operation.half()
        fault.after(operation)
        with _open(log, "a") as file:
            file.write(f"{kind} {os.path.relpath(target or path, root)}\n")
        return result

    def open_(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        name = None if isinstance(path, int) else ours(path)
        if name is None or not set(mode) & set("wax+"):
            return _open(path, mode, *more, **options)
        assert mode == "wb", f"{name} is opened in mode {mode}, which the torture does not know how to count"
        raw = do("create", name, lambda: _Raw(name, do))
        opened[raw.fileno()] = name
        return io.BufferedWriter(raw)

    def wrap(module: Any, function: str, kind: str) -> None:
        real = getattr(module, function)

        def wrapped(path: Any, *more: Any, **options: Any) -> Any:
            if (name := ours(path)) is None or options.get("dir_fd") is not None:
                return real(path, *more, **options)
            if os.path.lexists(name) == (kind == "mkdir"):
                return real(path, *more, **options)  # it fails as it always does
            target = os.path.abspath(os.fspath(more[0])) if kind == "rename" else ""
            return do(kind, name, lambda: real(path, *more, **options), target=target)

        setattr(module, function, wrapped)

    real_os_open = os.open

    def os_open(path: Any, flags: int, *more: Any, **options: Any) -> int:
        name = watched(path) if options.get("dir_fd") is None else None
        writes = flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
        assert name is None or not writes, f"{name} is opened by os.open, which the torture does not know how to count"
        handle = real_os_open(path, flags, *more, **options)
        opened.pop(handle, None)
        if name is not None:
            opened[handle] = name
        return handle

    builtins.open, io.open, os.open = open_, open_, os_open  # type: ignore[assignment]
    for function, kind in (
        ("fsync", "fsync"), ("replace", "rename"), ("rename", "rename"), ("mkdir", "mkdir"), ("unlink", "unlink"),
        ("remove", "unlink"),
    ):  # fmt: skip
        wrap(os, function, kind)


def promised(log: Path) -> set[str]:
    """The shards' indexes that the operations of a log made certain to stay: renamed, and their folder flushed since.
    Names relative to the folder."""
    renamed: set[str] = set()
    certain: set[str] = set()
    for line in log.read_text().splitlines() if log.exists() else ():
        kind, path = line.split(" ", 1)
        if kind == "rename" and path.endswith(".parquet") and "/" in path:
            renamed.add(path)
        elif kind == "unlink":
            renamed.discard(path)
            certain.discard(path)
        elif kind == "fsync":
            certain |= {name for name in renamed if os.path.dirname(name) == path}
    return certain
