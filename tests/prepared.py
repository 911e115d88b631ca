"""Programs in processes of their own, forked from one that has imported what they need, in an environment of its own:
where a library reads the environment as it is imported, and `tests.forked`, which has imported all, would not do."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]


class Prepared:
    """A process that has imported some modules, and forks. It ends with this one."""

    def __init__(self, imported: Sequence[str], environment: Mapping[str, str]) -> None:
        self._imported, self._environment = imported, environment

    @functools.cached_property
    def _server(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__, *self._imported], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, **self._environment},
        )  # fmt: skip

    def run(
        self, program: str, words: Sequence[str] = (), *, cwd: Path = ROOT, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """What `python -c program words` leaves and prints; `env` replaces the environment that was there as the
        modules were imported."""
        server = self._server
        assert server.stdin is not None
        assert server.stdout is not None
        request = [program, list(words), str(cwd), None if env is None else dict(env)]
        print(json.dumps(request), file=server.stdin, flush=True)
        code, out, err = json.loads(server.stdout.readline())
        return subprocess.CompletedProcess([program, *words], code, out, err)


def _forked(program: str, words: list[str], cwd: str, environment: dict[str, str] | None) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if (pid := os.fork()) == 0:
            os._exit(_run(program, words, cwd, environment, out, err))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def _run(
    program: str, words: list[str], cwd: str, environment: dict[str, str] | None, out: IO[str], err: IO[str]
) -> int:
    """In the forked process; its exit code."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.chdir(cwd)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    sys.argv = ["-c", *words]
    code = 0
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    """Import what the command line names; read programs, one a line, and answer each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_forked(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
