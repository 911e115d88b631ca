"""A run's folder: its configuration, what it was made with, its figures step by step, its pictures.

runs/NAME/
  config.yaml      every option as it was resolved: `--recipe` reads it
  run.json         versions, git revision, model, cache fingerprints, components
  metrics.jsonl    one line per step, one per look at the held-out samples
  pictures/        step-00000500.png ...
  tensorboard/
  checkpoints/     see train/checkpoints.py
  controlnet       link to the newest checkpoint's ControlNet
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from shared import atomic, config
from shared.errors import UserError
from shared.report import git_revision, versions
from train.config import TrainConfig, changed_experiment

CONFIG, RUN, METRICS = "config.yaml", "run.json", "metrics.jsonl"


@dataclass
class Run:
    """The folder of one run."""

    folder: Path

    @classmethod
    def open(cls, options: TrainConfig, facts: dict[str, Any]) -> Run:
        """Begin a run or find it again. `facts` say what it stands on: "model", "cache" (fingerprints), ...

        Raises `UserError` where the folder holds another experiment: nothing of it is changed.
        """
        run = cls(Path(options.runs) / options.run_name)
        if (run.folder / RUN).is_file():
            run._refuse_other(options, facts)
        run.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(run.folder / CONFIG, config.to_yaml(options).encode())
        atomic.write_json(run.folder / RUN, {**facts, "versions": versions(), "git_revision": git_revision()})
        return run

    def _refuse_other(self, options: TrainConfig, facts: dict[str, Any]) -> None:
        before = yaml.safe_load((self.folder / CONFIG).read_text())
        if changed := changed_experiment(config.differences(before, config.to_dict(options))):
            listed = "; ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
            raise UserError(
                f"{self.folder} holds another experiment ({listed}). Give this one its own NAME, or use the old options"
            )
        stated = json.loads((self.folder / RUN).read_text())
        facts = json.loads(json.dumps(facts))  # as they come back from the file: tuples as lists
        for key, value in facts.items():
            if stated.get(key) != value:
                raise UserError(
                    f"{self.folder} was trained on another {key} ({stated.get(key)}) than there is now ({value}). "
                    "Give this experiment its own NAME, or restore the old one"
                )

    def keep_metrics_until(self, step: int) -> None:
        """Drop the figures of steps that will be run again, since no checkpoint holds what they led to."""
        path = self.folder / METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # cut off by a kill
            if json.loads(line)["step"] <= step:
                kept.append(line)
        atomic.write_bytes(path, "".join(kept).encode())

    def log(self, step: int, figures: dict[str, Any]) -> None:
        """Append one line of figures; those that are not numbers (NaN) are left out."""
        finite = {k: v for k, v in figures.items() if not (isinstance(v, float) and not math.isfinite(v))}
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of figures."""
        return [json.loads(line) for line in (self.folder / METRICS).read_text().splitlines()]

    def save_picture(self, step: int, picture: NDArray[np.uint8]) -> Path:
        """Write `pictures/step-....png`."""
        path = self.folder / "pictures" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic.writing(path) as file:
            Image.fromarray(picture).save(file, format="PNG")
        return path
