"""Times of what runs on a device: many calls between two waits for it, and each call's own by events on the device."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], object]
Mark = Any
"""A moment on the device: an event, or on the CPU a reading of the clock."""


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Call, device: torch.device, count: int) -> float:
    """Of one call, the mean over `count` of them back to back."""
    wait(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    wait(device)
    return (time.perf_counter() - began) / count


def median_seconds(call: Call, device: torch.device, budget_seconds: float = 0.25, groups: int = 5) -> float:
    """Of one call: the median of groups of calls back to back, after warming up, in about `budget_seconds`."""
    once = min(seconds_of(call, device, 1) for _ in range(3))
    count = max(1, int(budget_seconds / groups / max(once, 1e-7)))
    return statistics.median(seconds_of(call, device, count) for _ in range(groups))


def steps(call: Call, device: torch.device, count: int, repeats: int) -> dict[str, float]:
    """Figures of a step, in milliseconds: `step_ms` is the mean over `repeats` times `count` steps back to back, so
    that what comes once in many steps counts; `step_ms_least` and `step_ms_most` are the repeats' range, the
    percentiles those of single steps."""
    means, single = [], []
    for _ in range(repeats):
        marks = [mark(device)]
        wait(device)
        began = time.perf_counter()
        for _ in range(count):
            call()
            marks.append(mark(device))
        wait(device)
        means.append((time.perf_counter() - began) / count * 1e3)
        single += [milliseconds(before, after) for before, after in itertools.pairwise(marks)]
    single.sort()
    return {
        "step_ms": statistics.fmean(means),
        "step_ms_least": min(means),
        "step_ms_most": max(means),
        "p10_ms": single[len(single) // 10],
        "p50_ms": single[len(single) // 2],
        "p90_ms": single[-1 - len(single) // 10],
    }


def mark(device: torch.device) -> Mark:
    """This moment in the device's work; nothing waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(before: Mark, after: Mark) -> float:
    """Between two marks that the device has passed."""
    if isinstance(before, float):
        return (after - before) * 1e3
    return float(before.elapsed_time(after))


def card(device: torch.device) -> dict[str, Any]:
    """What the driver says of the card at this moment: clocks, power, temperature and memory. Read only."""
    if device.type != "cuda":
        return {}
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "memory.used")
    try:
        printed = subprocess.run(
            [
                "nvidia-smi",
                f"--query-gpu={','.join(names)}",
                "--format=csv,noheader,nounits",
                "-i",
                str(device.index or 0),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": str(error)}
    return dict(zip(names, (word.strip() for word in printed.strip().split(",")), strict=False))
