"""`python -m train.compare`: one page that compares runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.config import load
from shared.errors import UserError, run_command_line


@dataclass(frozen=True)
class CompareConfig:
    """Compare runs on one HTML page, complete in itself: ranks with intervals, curves, pictures step by step, a table
    of all figures, and what differs between the configurations. Runs that are still training may be among them."""

    runs: tuple[str, ...] = ()
    """Runs' folders, or folders of runs, as a sweep's: runs/first, or runs/first/*."""
    out: str = "compare.html"
    """Where the page goes."""

    def check(self) -> None:
        """Refuse impossible values."""
        if not self.runs:
            raise UserError("--runs needs the folders of runs: --runs runs/a runs/b")


def main() -> int:
    """Read the options, then write the page."""
    options = load(CompareConfig, command="python -m train.compare")
    if options is None:
        return 0
    from shared.report import say
    from train.compare import write

    out = write([Path(run) for run in options.runs], Path(options.out))
    say(f"{out}: {out.stat().st_size / 1e6:,.1f} MB; open it in a browser")
    return 0


if __name__ == "__main__":
    run_command_line(main)
