"""Mend a damaged cache: `python -m preprocess.repair --cache CACHE`. What is intact stays; only the rest is made again.

Every byte is compared with its checksum. Damaged shards keep their intact rows, then the ordinary run makes what is
missing and writes the damaged lists anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from preprocess.config import PreprocessConfig
from preprocess.status import cache_of, recorded_options
from shared import atomic
from shared.cache import schema
from shared.cache.repair import Mended, mend
from shared.cache.schema import CacheError
from shared.cache.storage import is_remote
from shared.config import load
from shared.errors import UserError, run_command_line
from shared.report import say, table

NAMED = 3
"""So many keys of dropped rows are named for each file; the table would grow too wide with more."""


def repair(options: PreprocessConfig) -> int:
    """Mend the cache of these options. Exit codes as `preprocess`; a sound cache is left as it is, without any run.

    Raises `UserError` where there is no cache, where another process holds it, and what `preprocess` raises.
    """
    from preprocess.pipeline import preprocess  # after --help and every refusal that needs no torch

    if is_remote(options.cache):
        raise UserError(f"{options.cache} cannot be repaired where it is: copy it to a folder, repair it, copy it back")
    cache = Path(options.cache).expanduser()
    if not cache.is_dir():
        raise CacheError(f"no such cache: {cache}")
    with atomic.alone(cache, "preprocessing into"):
        mended = mend(cache)
    if not mended:
        say(f"sound: {cache}, nothing to repair")
        return 0
    head = ("damaged", "what was wrong", "dropped", "rows kept", "rows to make")
    say(table(head, [_line(each) for each in mended], right=3))
    return preprocess(options)


def _line(mended: Mended) -> tuple[str, ...]:
    if not mended.num_kept and not mended.num_dropped:
        return (mended.file, mended.damage, "", "", "")
    more = len(mended.dropped) - NAMED
    named = ", ".join(mended.dropped[:NAMED]) + (f" and {more} more" if more > 0 else "")
    return (mended.file, mended.damage, named, f"{mended.num_kept:,}", f"{mended.num_dropped:,}")


def main() -> int:
    """The command line: the options of preprocessing, beginning with those that the cache was made with."""
    words = sys.argv[1:]
    cache = cache_of(words)
    recorded = recorded_options(cache)
    if cache.is_dir() and not recorded and not any(word.split("=")[0] in ("--data", "--recipe") for word in words):
        raise UserError(
            f"{cache / schema.OPTIONS}, which says what the cache was made with, is missing or damaged; give the "
            f"options of its last run: make repair CACHE={cache} DATA=... (and MODEL, CONDITION, RESOLUTION, ARGS as "
            "then)"
        )
    config = load(PreprocessConfig, command="python -m preprocess.repair", recorded=recorded)
    return 0 if config is None else repair(config)


if __name__ == "__main__":
    run_command_line(main)
