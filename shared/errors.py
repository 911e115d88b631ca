"""How the project says no: one clear sentence at the edge, a traceback only for its own mistakes."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import NoReturn

EXIT_REFUSED = 2
"""The command was refused: bad input, missing files, a full disk. What was finished before is kept."""
EXIT_INCOMPLETE = 3
"""The command finished, but left samples out; each is named with its reason."""
EXIT_INTERRUPTED = 130
"""Ctrl-C. Running the same command again resumes."""


class UserError(Exception):
    """Something the user can mend: says what is wrong, where, and what to do. Printed without a traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean ...?` for a misspelt `name`, else the list of what is `known`: the end of an error message."""
    known = sorted(known)
    if not known:
        return "there is nothing"
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"there is: {', '.join(known)}"


def disk_full(error: OSError, doing: str) -> UserError | None:
    """The `UserError` for a full disk or quota, or None where `error` is something else."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return UserError(
        f"the disk is full: {doing} failed. Nothing finished is lost; free some space and run the same command again."
    )


def denied(error: OSError) -> UserError | None:
    """The `UserError` for a file that this user may not touch, or None where `error` is something else."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or error.filename is None:
        return None
    return UserError(
        f"{error.filename}: {error.strerror}. Nothing finished is lost; mend its permissions or choose another folder, "
        "and run the same command again."
    )


def run_command_line(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with its code; a `UserError` becomes one sentence on stderr and exit code 2."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_REFUSED
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except OSError as error:
        refusal = disk_full(error, f"writing {error.filename or 'a file'}") or denied(error)
        if refusal is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        code = EXIT_REFUSED
    sys.stdout.flush()
    sys.exit(code)
