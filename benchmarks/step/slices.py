"""Cells one after the other, each in a process of its own, until the time is up; what is done is not done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.step.cells import Cell
from benchmarks.step.results import DONE, FAILED, TOO_LONG, Results
from shared.report import say

LEAST_SECONDS = 45.0
"""No cell is begun with less time left: making the models and compiling take that long by themselves."""


def run(cells: list[Cell], results: Results, device: str, minutes: float, compile_cache: Path) -> int:
    """Measure what is left of `cells`; how many still are comes back. A cell that the end of the slice interrupts is
    begun again in the next one, unless it had the whole slice for itself: then it is noted as too long."""
    deadline = time.monotonic() + 60 * minutes
    left = results.left(cells)
    say(f"{len(cells) - len(left)} of {len(cells)} cells are done; results in {results.path}")
    for number, cell in enumerate(left):
        seconds = deadline - time.monotonic()
        if number and seconds < LEAST_SECONDS:
            break
        say(f"{cell.name} ...")
        began = time.monotonic()
        figures = _in_own_process(cell, results.size, device, seconds, compile_cache)
        if figures is None:
            if number == 0:
                results.add(cell, TOO_LONG, {"seconds": seconds}, {})
                say(f"  did not end within {seconds:.0f} s")
            break
        environment = figures.pop("environment", {})
        outcome = figures.pop("outcome", DONE)
        figures["seconds"] = time.monotonic() - began
        results.add(cell, outcome, figures, environment)
        say(f"  {_in_short(outcome, figures)} ({figures['seconds']:.0f} s)")
    return len(results.left(cells))


def _in_own_process(cell: Cell, size: str, device: str, seconds: float, compile_cache: Path) -> dict[str, Any] | None:
    """A cell's figures, or None where it did not end in time. What it printed is kept with a failure."""
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        answer, log = Path(folder, "figures.json"), Path(folder, "log")
        environment = {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "HF_HUB_OFFLINE": "1",
        } | os.environ
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "benchmarks.step", "--cell", json.dumps(cell.to_dict()), "--size", size,
                    "--device", device, "--folder", str(compile_cache), "--answer", str(answer),
                ],
                stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:  # late, or this process was interrupted: it and its compilers go
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code == 0 and answer.is_file():
            figures: dict[str, Any] = json.loads(answer.read_text())
            return figures
        printed = log.read_text(errors="replace").strip().splitlines()
        return {"outcome": FAILED, "code": code, "printed": printed[-40:]}


def _in_short(outcome: str, figures: dict[str, Any]) -> str:
    if outcome == FAILED:
        return f"failed with code {figures['code']}: {(figures['printed'] or ['nothing printed'])[-1]}"
    if outcome != DONE:
        return f"{outcome}, {figures.get('while', '')}"
    if "step_ms" in figures:
        peak = f", peak {figures['peak_allocated_gib']:.2f} GiB" if "peak_allocated_gib" in figures else ""
        return (
            f"batch {figures['batch']}: {figures['step_ms']:.1f} ms, {figures['images_per_second']:.2f} images/s{peak}"
        )
    if "forward_ms" in figures:
        return f"{figures['forward_ms']:.1f} ms"
    if "gemm" in figures:
        return f"{next(iter(figures['gemm'].values())):.2f} TFLOP/s in a square product"
    return ", ".join(
        f"{name}: cosine {value['cosine']:.6f}, relative error {value['relative_error']:.2%}"
        for name, value in figures.items()
        if isinstance(value, dict) and "cosine" in value
    )
