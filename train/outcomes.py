"""What became of a run, by what its folder says."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from train import checkpoints

DONE = ("trained", "early_stop")
"""Outcomes after which nothing is left to do."""


def ended(run: Path, steps: int) -> dict[str, Any]:
    """How a run of so many steps ended whose process ended well: "outcome", which is trained, early_stop or stopped,
    and "step"."""
    newest = next(iter(checkpoints.all_newest_first(run)), None)
    step = 0 if newest is None else checkpoints.step_of(newest)
    with suppress(OSError, ValueError, KeyError, IndexError):  # what cannot be read says nothing
        stated = json.loads((run / "run.json").read_text())["starts"][-1]["ended"]
        if stated["step"] == step:
            return {"outcome": stated["why"], "step": step}
    return {"outcome": "trained" if step >= steps else "stopped", "step": step}
