"""Child processes that run one command each: forked from a process that has imported everything and computed nothing,
so that a run of the stage takes a second and can be killed without harm."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared.errors import run_command_line

KILLED = -signal.SIGKILL
PATIENCE_SECONDS = 120.0
"""A child that takes longer hangs."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Exit code; `KILLED` where it was."""
    out: str
    err: str
    seconds: float


class Child:
    """A command in a process of its own, just begun."""

    def __init__(self, command: Callable[[], int | None], folder: Path, prepare: Callable[[], object] | None = None):
        """`command` is run as the command line runs it, after `prepare`; what it prints goes to files in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / "out", folder / "err"
        for file in (self.out, self.err):
            file.write_bytes(b"")  # it may be killed before it comes to that
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _be(command, self.out, self.err, prepare)

    def kill_after(self, seconds: float) -> None:
        """SIGKILL so many seconds after the beginning, unless it has ended by then."""
        deadline = self.began + seconds
        while (left := deadline - time.monotonic()) > 0 and self._running():
            time.sleep(min(left, 0.005))
        self.kill()

    def kill(self) -> None:
        """SIGKILL; without effect on what has ended but was not waited for."""
        os.kill(self.pid, signal.SIGKILL)

    def _running(self) -> bool:
        # Without WNOWAIT the process would be gone, and its number free for another.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> Ended:
        """How it ended. Raises `TimeoutError` where it does not."""
        while self._running():
            if time.monotonic() - self.began > PATIENCE_SECONDS:
                self.kill()
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"a run hangs; its last words: {self.err.read_text()[-500:]}")
            time.sleep(0.002)
        seconds = time.monotonic() - self.began
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), self.out.read_text(), self.err.read_text(), seconds)


def _be(command: Callable[[], int | None], out: Path, err: Path, prepare: Callable[[], object] | None) -> None:
    """The child's whole life."""
    code = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.freeze()  # what another left behind is not closed here: Ctrl-C in a `__del__` is lost
        if prepare is not None:
            prepare()
        run_command_line(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
