"""How long training waits for its data: a run of the demo's tiny FLUX, with the demo's own recipes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import stages
from examples import shapes
from preprocess.config import PreprocessConfig
from preprocess.pipeline import preprocess
from shared import config
from train.config import TrainConfig
from train.trainer import train

ROOT = Path(__file__).parent.parent
PREPROCESS_RECIPE, TRAIN_RECIPE = ROOT / "preprocess/recipes/demo.yaml", ROOT / "train/recipes/demo.yaml"
MODEL = ROOT / "examples/tiny-flux"


@dataclass(frozen=True)
class Figures:
    """Of all steps but the first, for which nothing could be read ahead."""

    steps: int
    waited_seconds: float
    worked_seconds: float

    @property
    def share(self) -> float:
        """Of the time from step to step."""
        return self.waited_seconds / (self.waited_seconds + self.worked_seconds)

    def line(self) -> str:
        """`training wait=...`, a share."""
        return f"training wait={self.share:.4f}"


def measure(folder: Path, pictures: int, steps: int) -> Figures:
    """Draw pictures, preprocess them, train; what the run's own record says."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data, cache, runs = folder / "pictures", folder / "cache", folder / "runs"
    shapes.write_dataset(data, pictures, seed=0)
    words = ["--recipe", PREPROCESS_RECIPE, "--model", MODEL, "--data", data, "--cache", cache, "--device", "cpu"]
    preprocess_options = config.load(PreprocessConfig, [*map(str, words)], command="preprocess")
    assert preprocess_options is not None
    stages.run(preprocess, preprocess_options)
    words = ["--recipe", TRAIN_RECIPE, "--cache", cache, "--runs", runs, "--steps", steps, "--checkpoint.every", steps]
    words += ["--device", "cpu", "--tracker", "none", "--validation.every", 0, "--validation.pictures-every", 0]
    words += ["--validation.adherence-every", 0]
    train_options = config.load(TrainConfig, [*map(str, words)], command="train")
    assert train_options is not None
    stages.run(train, train_options)
    lines = (runs / train_options.run_name / "metrics.jsonl").read_text().splitlines()
    timed = [line for line in map(json.loads, lines) if "step_seconds" in line][1:]
    return Figures(
        steps=len(timed),
        waited_seconds=sum(line["data_wait_seconds"] for line in timed),
        worked_seconds=sum(line["step_seconds"] for line in timed),
    )


def report(figures: Figures) -> str:
    """One sentence."""
    worked, waited = figures.worked_seconds / figures.steps, figures.waited_seconds / figures.steps
    return (
        f"training the demo's tiny FLUX, {figures.steps} steps of batch 16: {worked * 1e3:.0f} ms a step, after "
        f"{waited * 1e3:.2f} ms of waiting for data"
    )
