"""One clear sentence at the edge, and an exit code that scripts can rely on."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from shared.errors import (
    EXIT_INCOMPLETE,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    UserError,
    disk_full,
    nearest,
    run_command_line,
)


def ends(main: Callable[[], int | None], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        run_command_line(main)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


def fails_with(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def test_a_command_s_own_code_is_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(lambda: None, capsys) == (0, "")
    assert ends(lambda: EXIT_INCOMPLETE, capsys) == (3, "")


def test_a_user_error_is_one_sentence_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(fails_with(UserError("no such cache: x")), capsys) == (EXIT_REFUSED, "error: no such cache: x\n")


def test_ctrl_c_says_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = ends(fails_with(KeyboardInterrupt()), capsys)
    assert code == EXIT_INTERRUPTED == 130
    assert said == "interrupted: run the same command again to resume\n"


def test_a_full_disk_is_a_refusal_wherever_it_was_met(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = ends(fails_with(OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")), capsys)
    assert code == EXIT_REFUSED
    assert said.startswith("error: the disk is full: writing runs/a/metrics.jsonl failed.")
    assert said.count("\n") == 1
    code, said = ends(fails_with(OSError(errno.EDQUOT, "Disk quota exceeded")), capsys)
    assert said.startswith("error: the disk is full: writing a file failed.")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_file_that_may_not_be_touched_is_a_refusal_that_names_it(
    code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code, said = ends(fails_with(OSError(code, "no right", "cache/latents/00000.tar.part")), capsys)
    assert exit_code == EXIT_REFUSED
    assert said.startswith("error: cache/latents/00000.tar.part: no right. Nothing finished is lost; ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), AssertionError("ours"), ValueError("ours")])
def test_our_own_mistakes_keep_their_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_command_line(fails_with(error))


def test_only_a_full_disk_is_a_full_disk() -> None:
    assert disk_full(OSError(errno.EIO, "Input/output error"), "writing x") is None
    assert isinstance(disk_full(OSError(errno.ENOSPC, ""), "writing x"), UserError)


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("lineart", ["canny", "line_art"], "did you mean 'line_art'?"),
        ("zzz", ["depth", "canny"], "there is: canny, depth"),
        ("zzz", [], "there is nothing"),
    ],
)
def test_the_nearest_name_or_the_list_of_what_there_is(name: str, known: list[str], expected: str) -> None:
    assert nearest(name, iter(known)) == expected
