"""A run's folder: its configuration, what it was made with, its figures step by step, its pictures.

runs/NAME/
  config.yaml      every option as it was resolved at the last start: `--recipe` reads it
  run.json         model, cache fingerprints, condition; of each start the step, versions, git revision, components,
                   memory, and how far 8-bit arithmetic was from exact
  metrics.jsonl    one line per step, one per look at the held-out samples
  pictures/        step-00000500.png, and each held-out sample alone: step-00000500/00.png ...; held-out.json says which
                   they are, held-out/ has what does not change: drawing, painted without control, original
  baseline/        see train/baseline.py
  tensorboard/
  checkpoints/     see train/checkpoints.py
  controlnet       link to the newest checkpoint's ControlNet; lora, or of a whole base what its pipeline calls it,
                   transformer or unet
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from shared import atomic, config, families
from shared.errors import UserError
from shared.report import Component, git_revision, versions
from train.config import TrainConfig, changed_experiment
from train.objectives import Kind, ObjectiveOptions

CONFIG, RUN, METRICS = "config.yaml", "run.json", "metrics.jsonl"


@dataclass
class Run:
    """The folder of one run."""

    folder: Path

    def refuse_other(self, options: TrainConfig, facts: dict[str, Any]) -> dict[str, Any] | None:
        """Raise `UserError` where the folder holds another experiment. `facts` say what this one stands on: "model",
        "cache" (fingerprints), ... Nothing is written. Back come the options of the last start; None at the first."""
        if not (self.folder / RUN).is_file():
            return None
        try:
            recorded = yaml.safe_load((self.folder / CONFIG).read_text())
            before = config.completed(recorded, config.to_dict(type(options)()))
            stated = json.loads((self.folder / RUN).read_text())
            kind, now = families.get(facts["family"]).objective, config.to_dict(options)
            really = config.differences(_left_open(before, kind), _left_open(now, kind))
            changed = changed_experiment({k: v for k, v in config.differences(before, now).items() if k in really})
        except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
            raise UserError(
                f"{self.folder} is damaged, {CONFIG} or {RUN} cannot be read ({error}); choose another NAME"
            ) from error
        if changed:
            listed = "; ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
            raise UserError(
                f"{self.folder} holds another experiment ({listed}). Give this one its own NAME, or use the old options"
            )
        if other := config.differences({key: stated.get(key) for key in facts}, facts):
            listed = "; ".join(f"{key} was {_short(old)}, is {_short(new)}" for key, (old, new) in other.items())
            raise UserError(
                f"{self.folder} was trained on something else ({listed}). Give this experiment its own NAME, or "
                "restore what was there"
            )
        return before

    def begin(self, options: TrainConfig, facts: dict[str, Any], step: int, components: Sequence[Component]) -> None:
        """Write what the run is, and that it starts (again) after `step`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN
        starts = json.loads(path.read_text())["starts"] if path.is_file() else []
        start = {
            "step": step,
            "versions": versions(),
            "git_revision": git_revision(),
            "components": [asdict(component) for component in components],
        }
        atomic.write_bytes(self.folder / CONFIG, config.to_yaml(options).encode())
        atomic.write_json(path, {**facts, "starts": [*starts, start]})

    def note(self, facts: dict[str, Any]) -> None:
        """Add to what `run.json` says of the last start, in the place of what was noted there under the same names."""
        stated = json.loads((self.folder / RUN).read_text())
        stated["starts"][-1] |= facts
        atomic.write_json(self.folder / RUN, stated)

    def keep_metrics_until(self, step: int) -> None:
        """Drop the figures of steps that will be run again, since no checkpoint holds what they led to."""
        path = self.folder / METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                    kept.append(line)
            except ValueError:
                break  # cut off by a kill
        atomic.write_bytes(path, b"".join(kept))

    def log(self, step: int, figures: dict[str, Any]) -> None:
        """Append one line of figures; those that are not numbers (NaN) are left out."""
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps({"step": step, **_finite(figures)}) + "\n")

    def sync_metrics(self) -> None:
        """Flush the figures to the disk: no checkpoint survives a power cut without the figures before it."""
        if (self.folder / METRICS).exists():
            with open(self.folder / METRICS, "rb+") as file:
                os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of figures."""
        return [json.loads(line) for line in (self.folder / METRICS).read_text().splitlines()]

    def save_picture(self, step: int, picture: NDArray[np.uint8]) -> Path:
        """Write `pictures/step-....png`."""
        path = self.folder / "pictures" / f"step-{step:08d}.png"
        _save_png(path, picture)
        return path

    def save_paintings(self, step: int, pictures: Sequence[NDArray[np.uint8]]) -> None:
        """Write `pictures/step-.../00.png`, `01.png`, ...: the held-out samples, painted with control."""
        folder = self.folder / "pictures" / f"step-{step:08d}"
        for i, picture in enumerate(pictures):
            _save_png(folder / f"{i:02d}.png", picture)

    def save_held_out(
        self, samples: Sequence[dict[str, str]], pictures: Sequence[Mapping[str, NDArray[np.uint8]]]
    ) -> None:
        """Write `pictures/held-out.json`, what the samples are that are painted at each look, and of each what does not
        change (`pictures/held-out/00-drawing.png`, ...), unless that is there."""
        path = self.folder / "pictures" / "held-out.json"
        if path.is_file() and json.loads(path.read_text()) == samples:
            return
        for i, named in enumerate(pictures):
            for name, picture in named.items():
                _save_png(self.folder / "pictures" / "held-out" / f"{i:02d}-{name}.png", picture)
        atomic.write_json(path, samples)


def _save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.writing(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _finite(value) if isinstance(value, dict) else value
        for name, value in figures.items()
        if not (isinstance(value, float) and not math.isfinite(value))
    }


def _left_open(options: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    return {**options, "objective": ObjectiveOptions.left_open(options["objective"], kind)}


def _short(value: object) -> object:
    """A fingerprint by its first digits."""
    return value[:8] if isinstance(value, str) and len(value) == 64 else value
