"""Python's commands in processes of their own that begin with everything imported: each is forked from one process that
has imported much and computed nothing. A fresh interpreter takes ten seconds of the processor for the same imports.

    monkeypatch.setattr(module, "subprocess", forked)   # in the place of the standard library's

Not for tests of what a process imports, nor where a library reads the environment as it is imported."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CompletedProcess, TimeoutExpired
from typing import IO, Any, Self

import fsspec
import pytest

__all__ = [
    "DEVNULL", "PIPE", "STDOUT", "CompletedProcess", "Multiprocessing", "Popen", "TimeoutExpired", "context", "run",
]  # fmt: skip

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "tests.train.conftest",
    "bitsandbytes.optim",
    "cv2",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.controlnets.controlnet_flux",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "optimum.quanto",
    "preprocess.pipeline",
    "tests.preprocess.test_kill",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "transformers.models.t5.modeling_t5",
    "transformers.models.t5.tokenization_t5",
)
"""There is one such server for all of a test process: the first that asks starts it."""


def context() -> ForkServerContext:
    """For processes that begin with everything imported. The first call waits until it is."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        context.set_forkserver_preload(list(PRELOADED))
        first = context.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()
    return context


class Multiprocessing:
    """In the place of `multiprocessing`, where a module starts processes by `get_context("spawn").Process`: they are
    forked where everything is imported, and have this process's environment, as spawned ones do."""

    def get_context(self, method: str) -> Self:
        """Of this class too."""
        assert method == "spawn", method
        return self

    def Pipe(self) -> tuple[Connection, Connection]:  # noqa: N802
        """As there."""
        return context().Pipe()

    def Process(  # noqa: N802
        self, *, target: Callable[..., object], args: tuple[Any, ...], **named: Any
    ) -> ForkServerProcess:
        """As there."""
        return context().Process(target=_in_environment, args=(dict(os.environ), target, args), **named)


def _in_environment(environment: dict[str, str], target: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)  # read as it was imported
    target(*args)


class Popen:
    """`subprocess.Popen` of `[sys.executable, "-m", module, ...]` or `[sys.executable, "-c", program, ...]`; what it
    prints goes into files."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: IO[Any],
        stderr: IO[Any] | int = STDOUT,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        assert command[0] == sys.executable, command
        files = (stdout.name, stdout.name if isinstance(stderr, int) else stderr.name)
        environment = dict(os.environ if env is None else env)
        server = context()
        ours, theirs = server.Pipe(duplex=False)
        arguments = (list(command[1:]), files, str(cwd or Path.cwd()), environment, start_new_session, theirs)
        self.args = list(command)
        self._process = server.Process(target=_begin, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        ours.recv()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `poll` says."""
        return self.poll()

    def poll(self) -> int | None:
        """The exit code, minus a signal's number; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            assert timeout is not None
            raise TimeoutExpired(self.args, timeout)
        return code

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def run(
    command: Sequence[str],
    *,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = False,
    **unused: object,
) -> CompletedProcess[str]:
    """`subprocess.run` of such a command; what it prints comes back as text, whatever of `capture_output`, `stdout`,
    `stderr` and `text` is asked for."""
    assert unused.keys() <= {"capture_output", "stdout", "stderr", "text"}, unused
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        code = Popen(command, stdout=out, stderr=err, cwd=cwd, env=env).wait()
        done = CompletedProcess(list(command), code, out.read(), err.read())
    if check and code:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    return done


def _begin(
    words: list[str],
    files: tuple[str, str],
    cwd: str,
    environment: dict[str, str],
    new_session: bool,
    begun: Connection,
) -> None:
    """In the forked process: be what `python` with these words would be."""
    if new_session:
        os.setsid()
    begun.send(None)
    begun.close()
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores Ctrl-C
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    how, what, *rest = words
    sys.path.insert(0, cwd)
    sys.argv = [what if how == "-m" else how, *rest]
    if how == "-m":
        sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert how == "-c", words
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
