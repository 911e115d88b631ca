"""What a training step costs beside what it is compared with: `python -m benchmarks.step`, or `make bench`.

On one GPU, with random models of FLUX.1-dev's size that are made there: nothing is downloaded. First the card's
ceilings (matrix products, attention, copies), then, below the memory of a 40 GB and a 24 GB card, whole steps of this
project and of the baselines on the same data: diffusers' example with and without recomputing, optimum-quanto's base
with cached inputs, with encoders online, and compiled; and how true the gradients are. The most telling cells come
first. Each has a process of its own, and each result is one line of --results; run the command again until nothing is
left. --table prints what there is.

Where there is no network: beside what comes with torch, transformers and accelerate this needs three wheels,
`pip download --no-deps --only-binary=:all: -d wheels diffusers==0.42.1 optimum-quanto==0.2.7 bitsandbytes==0.50.2`;
then `pip install --no-index --no-deps --target site wheels/*.whl` and
`PYTHONPATH=site python3 -m benchmarks.step --minutes 8` on the machine with the GPU.

The memory cap is the allocator's. It stands for a smaller card's memory, never for its speed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import slices, step_cells, tables
from benchmarks.step.cells import Cell, plan, tiny_plan
from benchmarks.step.planned import Planned
from benchmarks.step.results import Results
from benchmarks.step.sizes import FULL, SIZES, TINY
from shared.errors import UserError, nearest, run_command_line
from shared.report import git_revision, quiet_libraries, say, versions


def main() -> int:
    """Read the options; measure, print, or measure one cell in this process."""
    options = _options()
    found = "cuda" if torch.cuda.is_available() else "cpu"
    kind = found if options.device == "auto" else options.device
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    if options.cell is not None:
        quiet_libraries()
        answer = step_cells.measure(Cell(**json.loads(options.cell)), SIZES[options.size], device, Path(options.folder))
        Path(options.answer).write_text(json.dumps(answer | {"environment": environment(device)}))
        return 0
    size = TINY if options.tiny else FULL
    cells = tiny_plan() if options.tiny else plan()
    if options.only:
        known = {word for cell in cells for word in (cell.part, cell.way) if word}
        if unknown := [word for word in options.only if word not in known]:
            raise UserError(f"--only {unknown[0]}: {nearest(unknown[0], known)}")
        cells = [cell for cell in cells if cell.part in options.only or cell.way in options.only]
    results = Results(options.results, size.name)
    left = 0
    if not options.table:
        if size is FULL and device.type != "cuda":
            raise UserError(
                "models of the full size are measured on a GPU, and there is none: --tiny shows that it runs"
            )
        left = slices.run(cells, results, kind, options.minutes, options.results.parent / "compiled")
    planned = Planned(options.results.with_suffix(".planned.json"), count_missing=options.plan)
    say("\n" + tables.report(results, cells, planned))
    if left:
        say(f"{left} cells are left: the same command goes on")
    return 0


def environment(device: torch.device) -> dict[str, Any]:
    """Where a figure was measured."""
    found: dict[str, Any] = {**versions(), "commit": git_revision()}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="how long this slice may take")
    parser.add_argument("--results", type=Path, default=Path("runs/bench/step.jsonl"), help="one JSON line a cell")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what there is")
    parser.add_argument("--plan", action="store_true", help="count the planned peaks too: some seconds each, no GPU")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="these parts or ways only: ceilings, ours, quanto")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters: shows that it runs")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    for internal in ("--cell", "--size", "--folder", "--answer"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run_command_line(main)
