"""When to stop: held-out losses that no longer fall by more than they scatter.

The grid of held-out samples, times and noise is the same at every look, so two looks are compared sample by sample:
of the paired differences, the mean is held against its standard error, which is far smaller than that of either loss.
The best look's weights are kept, and training ends when `patience` looks in a row were no better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.report import warn
from train import checkpoints


@dataclass(frozen=True)
class EarlyStopOptions:
    """Ending a run whose held-out loss no longer falls."""

    patience: int = 0
    """Looks (validation.every) in a row without improvement, after which training ends; 0 never ends it. A ControlNet's
    loss may rest for a long time before it begins to follow its condition: give it some thousand steps."""
    errors: float = 1.0
    """How many standard errors of the paired differences a look must be below the best one to count as better. 2 where
    few held-out samples make looks uncertain."""
    first_step: int = 0
    """Looks before this step are never counted against the run. Raise it above the warm-up, or to where you know that
    control sets in."""

    def check(self) -> None:
        """Refuse impossible values. Raises `UserError`."""
        for name in ("patience", "first_step"):
            if getattr(self, name) < 0:
                raise UserError(f"early_stop.{name} must be 0 or more, not {getattr(self, name)}")
        if not (math.isfinite(self.errors) and self.errors >= 0):
            raise UserError(f"early_stop.errors must be 0 or more, but is {self.errors}")

    @property
    def on(self) -> bool:
        """Whether training may end early."""
        return self.patience > 0

    def unused(self) -> list[str]:
        """Options that were changed from their default but have no effect beside the others: warn of them."""
        names = () if self.on else ("errors", "first_step")
        return [name for name in names if getattr(self, name) != getattr(EarlyStopOptions, name)]


class EarlyStop:
    """The best look so far, and how many have come since."""

    def __init__(self, options: EarlyStopOptions) -> None:
        self.options = options
        self.best_step: int | None = None
        """The step of the best look; None before the first."""
        self.looks_since = 0
        """Looks after it that were no better, from `first_step` on."""
        self._best: list[float] = []
        self._grid = ""

    def look(self, step: int, losses: list[float], grid: str) -> bool:
        """Take in the look after `step`: the loss of each held-out sample, in the order of every look. `grid` says what
        they were computed on; where that has changed, looks do not compare, and the best is looked for anew.
        Back comes whether this look is the best."""
        assert losses
        if self.best_step is not None and (grid != self._grid or len(losses) != len(self._best)):
            warn(
                f"early_stop: held-out losses are computed on {grid}, those before were on {self._grid}: the best of "
                "them is looked for from here on"
            )
            self.best_step = None
        if self.best_step is None or better(losses, self._best, self.options.errors):
            self.best_step, self.looks_since, self._best, self._grid = step, 0, list(losses), grid
            return True
        if step >= self.options.first_step:
            self.looks_since += 1
        return False

    @property
    def asks(self) -> bool:
        """Whether training should end."""
        return self.options.on and self.looks_since >= self.options.patience

    def mark(self, folder: Path) -> None:
        """Mark the best look's checkpoint, where it is there, in the run's `folder`, so that it stays."""
        if self.best_step is not None and (path := checkpoints.path_of(folder, self.best_step)).is_dir():
            checkpoints.mark_best(folder, path)

    def words(self) -> str:
        """Why, in a sentence."""
        return (
            f"early_stop: the held-out loss was no better in the last {self.looks_since} looks than after step "
            f"{self.best_step}, whose weights are kept as `best`; raise early_stop.patience to go on"
        )

    def state(self) -> dict[str, Any]:
        """For the checkpoint, plain JSON values."""
        return {
            "best_step": self.best_step, "looks_since": self.looks_since, "losses": self._best, "grid": self._grid,
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.best_step, self.looks_since = state["best_step"], state["looks_since"]
        self._best, self._grid = list(state["losses"]), state["grid"]


def taken_up(options: EarlyStopOptions, checkpoint: Path | None) -> EarlyStop:
    """As a run's `checkpoint` has it, or new."""
    made = EarlyStop(options)
    state = None if checkpoint is None else checkpoints.state(checkpoint).get("trainer", {}).get("early_stop")
    if options.on and state is not None:
        made.load_state(state)
    return made


def better(losses: list[float], best: list[float], errors: float) -> bool:
    """Whether `losses` are below `best`, sample by sample, by more than so many standard errors of the mean difference.
    Of a single sample there is no standard error: it is better where it is lower."""
    differences = [old - new for old, new in zip(best, losses, strict=True)]
    mean = math.fsum(differences) / len(differences)
    if len(differences) == 1:
        return mean > 0
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    return mean > errors * math.sqrt(variance / len(differences)) and mean > 0
