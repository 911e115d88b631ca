"""`python -m shared.inspect`: write a page that shows what a cache holds."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from shared.config import load
from shared.errors import EXIT_INCOMPLETE, run_command_line
from shared.inspect.config import InspectConfig


def inspect(options: InspectConfig) -> int:
    """Look into a cache and write the page. Exit code 0, or 3 where the cache is damaged: the page says where."""
    from shared import atomic
    from shared.inspect.gather import gather
    from shared.inspect.page import page
    from shared.report import say, warn

    facts = gather(options)
    out = Path(options.out or _beside(options.cache))
    out.parent.mkdir(parents=True, exist_ok=True)
    data = page(facts, datetime.now()).encode()
    atomic.write_bytes(out, data)
    for note in facts.notes:
        warn(note)
    for problem in facts.problems:
        warn(f"DAMAGED: {problem}")
    say(
        f"{out}: {len(facts.gallery.samples):,} of {facts.num_samples:,} samples, {len(facts.failures.listed):,} "
        f"failures, {len(facts.outliers):,} outliers, {len(data) / 1e6:,.1f} MB; open it in a browser"
    )
    return EXIT_INCOMPLETE if facts.problems else 0


def _beside(cache: str) -> Path:
    """Where the page of a cache goes: beside its folder; of a remote one, here."""
    if "://" in cache:
        return Path(f"{cache.rstrip('/').rpartition('/')[2]}.html")
    folder = Path(cache).expanduser().resolve()
    return folder.with_name(f"{folder.name}.html")


def main() -> int:
    """Read the options, then look."""
    config = load(InspectConfig, command="python -m shared.inspect")
    return 0 if config is None else inspect(config)


if __name__ == "__main__":
    run_command_line(main)
