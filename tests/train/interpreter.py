"""Programs whose Triton kernels run on the CPU, in Triton's interpreter. Whether they do is read from the environment as
Triton is imported: they run in processes of their own, all forked from one that has done the imports."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

IMPORTED = ("bitsandbytes.functional", "tests.train.test_optimizer", "train.int8_arithmetic", "train.kernels")


def interpreted(program: str) -> str:
    """What the program prints. Fails where it does."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(program), file=server.stdin, flush=True)
    code, out, err = json.loads(server.stdout.readline())
    assert code == 0, err
    assert isinstance(out, str)
    return out


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks; it ends when its input does, with this process."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __name__], cwd=Path(__file__).parents[2], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def _run(program: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program in a forked process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if (pid := os.fork()) == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 1
            try:
                exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def main() -> None:
    """Read programs, one JSON string a line; answer each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
