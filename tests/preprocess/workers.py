"""Workers in other processes, in tests: who is writing what, and an end for one of them in the middle of a shard."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self


def writers(cache: Path) -> list[tuple[int, Path]]:
    """(process, file) of all that is being written by workers of their own process. The name says whose it is."""
    found = []
    for part in cache.glob("*/*.part"):
        if match := re.search(r"-(\d+)-[0-9a-f]{8}\.part$", part.name):
            found.append((int(match[1]), part))
    return found


def parent_of(pid: int) -> int:
    """The process that started this one. Raises `OSError` where there is no such process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    """Whether there is such a process; one that is dead and not yet waited for is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Killer:
    """While the `with` block runs, kills one worker while it is in the middle of writing a shard."""

    def __init__(
        self,
        cache: Path,
        victim: Callable[[int], bool] = lambda pid: True,
        kill: Callable[[int], None] = lambda pid: os.kill(pid, signal.SIGKILL),
    ) -> None:
        """`victim`: whether this process will do. `kill`: how."""
        self.cache, self._victim, self._kill = cache, victim, kill
        self.killed: list[int] = []
        """The process."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self.killed and not self._stop.wait(0.0005):
            for pid, part in writers(self.cache):
                with suppress(OSError), stopped(pid):
                    if (
                        ".tar." in part.name and part.exists() and self._victim(pid)
                    ):  # in the middle, and it stays there
                        self._kill(pid)
                        self.killed.append(pid)
                        break


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still for the length of the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
