"""Processes that a sweep starts: one at a time for each GPU, what they say, and how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

LAST_LINES = 8
"""Of what a child said, kept to say why it failed."""


class Child(Protocol):
    """A process: as `subprocess.Popen` has it."""

    def poll(self) -> int | None:
        """The exit code, -N where signal N ended it; None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to stop: the step in hand is finished and saved."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


def start(module: str, words: Sequence[str], log: Path, gpu: str | None) -> Child:
    """Run `python -m module words` with what it says appended to `log`; on that GPU, where one is named. It is not
    reached by the terminal's Ctrl-C, and stops when this process ends, however that comes."""
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "train.supervised", module, *words],
            stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip


class Talk:
    """What a child says, read from its log as it grows."""

    def __init__(self, log: Path) -> None:
        """From the log's present end on."""
        self._log, self._rest = log, b""
        self._at = log.stat().st_size if log.exists() else 0
        self.last: list[str] = []
        """The last lines."""

    def new_lines(self) -> list[str]:
        """Whole lines that have come since the last call."""
        if not self._log.exists():
            return []
        with self._log.open("rb") as file:
            file.seek(self._at)
            said = file.read()
        self._at += len(said)
        *lines, self._rest = (self._rest + said).split(b"\n")
        found = [line.decode(errors="replace").rstrip() for line in lines]
        self.last = [*self.last, *(line for line in found if line)][-LAST_LINES:]
        return found

    def why(self, code: int) -> str:
        """Why the child failed with this exit code: the error it named, or its last lines."""
        named = [line for line in self.last if line.startswith("error: ")]
        if named:
            return named[-1].removeprefix("error: ")
        ended = f"exit code {code}"
        if code < 0:
            ended = f"ended by {_signal_name(-code)}"
            if -code == signal.SIGKILL:
                ended += ", as the system does where memory is short"
        return "\n".join([ended, *self.last])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
