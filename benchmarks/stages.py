"""Run a stage in this process, its words kept back: they come out where it fails."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import TypeVar

Options = TypeVar("Options")


def run(stage: Callable[[Options], int], options: Options) -> None:
    """Run `preprocess` or `train` with its options; asserts that it ends well."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = stage(options)
    assert code == 0, printed.getvalue()
