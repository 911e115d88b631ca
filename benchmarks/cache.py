"""What the cache costs beside what it is compared with: `python -m benchmarks.cache`, or `make bench-cache`.

    loader      reading FLUX samples: plain reading of the same bytes, webdataset, MosaicML streaming, Arrow, Hugging
                Face datasets, one safetensors file a sample; page cache warm and cold
    waiting     how long training waits for its data
    bytes       on disk, beside the least that the numbers could take
    preprocess  wall time, beside the encoders' own
    index       opening and looking up, by the number of rows

Ratios are of figures that were measured in turn in this very run. They end it, one line each for loader, bytes and
preprocess. Nothing else should run meanwhile; a machine of another kind has other ratios.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import disk, index, loader, machine, overhead, waiting
from benchmarks.flux_cache import FluxSamples
from benchmarks.overhead import Encoders
from shared.errors import UserError, run_command_line
from shared.report import quiet_libraries, say

PARTS = ("loader", "waiting", "bytes", "preprocess", "index")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    loader: tuple[FluxSamples, ...] = (FluxSamples(512, 256), FluxSamples(1024, 128))
    """The closing line is of the first."""
    rounds: int = 7
    cold_rounds: int = 3
    steps: int = 40
    """Of training."""
    disk: tuple[FluxSamples, ...] = (
        FluxSamples(512, 64),
        FluxSamples(512, 64, posterior="mean"),
        FluxSamples(1024, 64),
        FluxSamples(1024, 64, posterior="mean"),
        FluxSamples(512, 80, images_per_caption=10),
    )
    encoders: Encoders = field(default_factory=Encoders)
    preprocess_rounds: int = 3
    index_rows: tuple[int, ...] = (1_000_000, 10_000_000)


QUICK = Plan(
    loader=(FluxSamples(512, 64),),
    rounds=3,
    cold_rounds=1,
    steps=10,
    disk=(FluxSamples(512, 32), FluxSamples(512, 40, images_per_caption=10)),
    encoders=Encoders(count=7, t5_layers=3),
    preprocess_rounds=1,
    index_rows=(100_000, 1_000_000),
)
"""A look, in two minutes."""


def measure(plan: Plan, folder: Path, parts: Sequence[str]) -> list[str]:
    """Measure these parts with what they need on disk below `folder`, and print their tables; the closing lines come
    back. Raises `UserError` where a package is not installed or the disk is too small."""
    if "loader" in parts:
        loader.check_packages()
    _check_disk(plan, folder, parts)
    closing = []
    if "loader" in parts:
        for samples in plan.loader:
            with _part(folder, f"loader, {samples.resolution} px") as place:
                figures = loader.measure(place, samples, plan.rounds, plan.cold_rounds)
                say(loader.report(figures))
                if samples == plan.loader[0]:
                    closing.append(figures.closing_line())
    if "waiting" in parts:
        with _part(folder, "waiting") as place:
            waited = waiting.measure(place, pictures=64, steps=plan.steps)
            say(f"{waiting.report(waited)}\n{waited.line()}")
    if "index" in parts:
        with _part(folder, "index") as place:
            say(index.report(index.measure(place, plan.index_rows)))
    if "bytes" in parts:
        with _part(folder, "bytes") as place:
            sizes = disk.measure(place, plan.disk)
            say(disk.report(sizes))
            closing.append(disk.closing_line(sizes))
    if "preprocess" in parts:
        with _part(folder, "preprocess") as place:
            costs = overhead.measure(place, plan.encoders, plan.preprocess_rounds)
            say(overhead.report(costs))
            closing.append(costs.closing_line())
    return closing


@contextmanager
def _part(folder: Path, title: str) -> Iterator[Path]:
    """A folder for one part, removed after it."""
    say(f"\n== {title} ==")
    began, place = time.perf_counter(), folder / "part"
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place)
    say(f"({time.perf_counter() - began:.0f} s)")


def _check_disk(plan: Plan, folder: Path, parts: Sequence[str]) -> None:
    layouts = 1 + sum(kind.writes for kind in loader.OTHERS)
    needed = {
        "loader": max(layouts * samples.count * samples.sample_bytes for samples in plan.loader),
        "index": max(plan.index_rows) * index.ROW_BYTES,
        "bytes": max(samples.minimum_bytes for samples in plan.disk),
    }
    most = max((needed.get(part, 0) for part in parts), default=0)
    if (free := shutil.disk_usage(folder).free) < 1.1 * most + 1e9:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, the benchmarks need {1.1 * most / 1e9 + 1:.1f} GB: choose another "
            "--folder, or --quick"
        )


def main() -> int:
    """Read the options, measure, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a look, in two minutes: fewer samples and rounds")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="these parts only"
    )
    parser.add_argument(
        "--rows", nargs="+", type=int, help="sizes of the index; 100000000 takes 20 GB of disk and of time"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the layouts are written, and removed; default: the temporary one"
    )
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    if options.rows:
        plan = replace(plan, index_rows=tuple(options.rows))
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="bench-cache-", dir=options.folder) as folder:
        say(machine.description(Path(folder)))
        closing = measure(plan, Path(folder), options.only)
    say("\n" + "\n".join(closing))
    return 0


if __name__ == "__main__":
    run_command_line(main)
