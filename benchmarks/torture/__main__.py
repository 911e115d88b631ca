"""Disturb preprocessing and damage finished caches, and count what comes of it: `make torture`.

Small data sets, a tiny model of the real classes, real processes and files. Runs are killed at random instants and
around random operations, cut off from power, and run out of disk at random operations; bits are flipped and files cut
off anywhere. Each time the command is run again, or the cache repaired, and the result compared with what an
undisturbed run made: row by row as a reader sees it, and byte by byte. The last line counts; the exit code is 1 unless
lost, duplicated and undetected are 0 and nothing else was amiss.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.torture.doses import Dose, torture
from shared.report import say


def main() -> int:
    """Torture, and print what came of it; the exit code is 0 where nothing was amiss."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture", description=__doc__)
    for name, value in vars(Dose()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="draws everything but the clock's part")
    parser.add_argument("--jobs", type=int, default=max(2, (os.cpu_count() or 2)), help="trials at a time")
    words = vars(parser.parse_args())
    seed, jobs = words.pop("seed"), words.pop("jobs")
    say(f"seed {seed} (again: --seed {seed})")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        tally = torture(Dose(**words), seed, jobs, Path(folder))
    for note, count in sorted(tally.notes.items()):
        say(f"{count:6} {note}")
    say(f"{tally.kills_of_others:6} kills of repair and prune\n{tally.power_cuts:6} power cuts")
    say(f"{time.monotonic() - began:6.0f} seconds")
    for problem in tally.problems:
        print(f"PROBLEM {problem}")
    print(
        f"torture kills={tally.kills} enospc={tally.enospc} flips={tally.flips} truncations={tally.truncations} "
        f"lost={tally.lost} duplicated={tally.duplicated} undetected={tally.undetected}"
    )
    return 1 if tally.problems or tally.lost or tally.duplicated or tally.undetected else 0


if __name__ == "__main__":
    sys.exit(main())
