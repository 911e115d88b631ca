"""Workers in other processes, in tests: who is writing what, and an end for one of them in the middle of a shard."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
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


def alive(pid: int) -> bool:
    """Whether there is such a process; one that is dead and not yet waited for is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Killer:
    """While the `with` block runs, kills so many workers, each while it is in the middle of writing a shard."""

    def __init__(self, cache: Path, count: int = 1) -> None:
        self.cache, self.count = cache, count
        self.killed: list[tuple[int, str]] = []
        """Process, and the unit that it was making."""
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
        while len(self.killed) < self.count and not self._stop.wait(0.0005):
            for pid, part in writers(self.cache):
                with suppress(ProcessLookupError), stopped(pid):
                    if part.name.split(".")[1] == "tar" and part.exists():  # it is in the middle, and stays there
                        os.kill(pid, signal.SIGKILL)
                        self.killed.append((pid, f"{part.parent.name}/{part.name.split('.')[0]}"))
                        break


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still for the length of the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
