"""Does the measure of adherence tell a ControlNet that follows its drawing from one that cannot?

`python -m examples.check_adherence`, or `make check-adherence`: a control experiment in the tiny world. Two ControlNets
are trained from one cache, from one seed, on the same pictures in the same order, and differ in one thing: one sees
each picture's own drawing, the other another picture's, so that there is nothing to be followed. A third is not trained
at all. All three paint the same drawings, which nothing has seen, from the same noise. A measure worth logging puts the
first above the other two by more than chance; where it does not, the exit code is 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from examples import adherence
from examples.shapes import Drawing
from examples.tiny_world import (
    PREPROCESS_RECIPE,
    TRAIN_RECIPE,
    Painter,
    Pictures,
    draw_pictures,
    stage,
    text_length_of,
)
from shared import atomic
from shared.config import load
from shared.errors import UserError, run_command_line
from shared.pictures import grid
from shared.report import quiet_libraries, say, warn
from train.adapters.controlnet import parse_depth

DEVIATIONS = 1.96
"""Standard errors to either side of a mean that hold 95 % of a normal distribution."""
EXIT_INSEPARABLE = 1
TRAINED, UNTRAINED, SHUFFLED = "trained", "untrained", "shuffled"
OTHER, CEILING = "trained, beside another's drawing", "originals through the VAE"


@dataclass(frozen=True)
class CheckConfig:
    """Train on drawings and on exchanged drawings, and see that adherence tells the two apart: minutes on two cores."""

    folder: str = "demo-adherence"
    """Where everything goes. Running again resumes; remove it to start over."""
    model: str = "examples/tiny-flux"
    """The tiny FLUX."""
    count: int = 800
    """Pictures to train on."""
    held_out: int = 24
    """Pictures whose loss is followed while training."""
    test: int = 64
    """Drawings that the adherence is measured on. The intervals are over them; fewer make them wider."""
    steps: int = 500
    """Training steps of each of the two ControlNets."""
    depth: str = "1-1"
    """num_layers-num_single_layers of all three."""
    embedder: Literal["copy", "zero"] = "copy"
    """How the condition enters the ControlNet; see `python -m train --help`."""
    seed: int = 0
    """Of both trainings: data order, noise, times."""
    data_seed: int = 777
    """Of the pictures, and of which drawing comes to which."""

    def check(self) -> None:
        """Refuse impossible values."""
        if min(self.count, self.held_out, self.test) < 2:
            raise UserError("count, held_out and test must be 2 or more")
        parse_depth(self.depth)


@dataclass(frozen=True)
class Figure:
    """A mean over test drawings, and how far chance may have moved it."""

    mean: float
    interval: float
    """Half of the 95 % interval's width: it reaches from mean - interval to mean + interval."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Of two values or more."""
        return cls(float(np.mean(values)), float(DEVIATIONS * np.std(values, ddof=1) / math.sqrt(len(values))))

    def __str__(self) -> str:
        return f"{self.mean:.2f} +- {self.interval:.2f}"


def separates(figures: dict[str, Figure]) -> bool:
    """Whether the trained one is above both others, the intervals not overlapping."""
    trained = figures[TRAINED]
    low = trained.mean - trained.interval
    return all(low > other.mean + other.interval for other in (figures[UNTRAINED], figures[SHUFFLED]))


def check_adherence(options: CheckConfig) -> int:
    """Run the control experiment. Exit code 0 where the measure separates, else 1; the last line has the figures."""
    began = time.perf_counter()
    folder = Path(options.folder)
    data, cache, runs = folder / "pictures", folder / "cache", folder / "runs"
    draw_pictures(data, options.count, options.held_out, options.data_seed, exchanged=True)
    conditions = {TRAINED: "canny", SHUFFLED: "precomputed"}
    stage(
        "preprocess", PREPROCESS_RECIPE, "--data", data, "--cache", cache, "--model", options.model,
        "--condition", *conditions.values(),
    )  # fmt: skip
    for name, condition in conditions.items():
        stage(
            "train", TRAIN_RECIPE, "--cache", cache, "--runs", runs, "--name", name, "--condition", condition,
            "--depth", options.depth, "--steps", options.steps, "--seed", options.seed,
            "--controlnet.embedder", options.embedder,
        )  # fmt: skip

    say(f"painting {options.test} drawings that nothing has seen")
    quiet_libraries()
    painter = Painter.open(options.model, options.test)
    untrained = painter.family.make_controlnet(
        painter.model, *parse_depth(options.depth), options.embedder, torch.float32
    )
    untrained.save_pretrained(folder / UNTRAINED)  # type: ignore[operator]
    controlnets = {
        TRAINED: runs / TRAINED / "controlnet",
        UNTRAINED: folder / UNTRAINED,
        SHUFFLED: runs / SHUFFLED / "controlnet",
    }
    length = text_length_of(runs / TRAINED)
    painted = {name: painter.paint(controlnet, length, 1.0)[0] for name, controlnet in controlnets.items()}
    figures = measure(painted, painter)

    report(folder, painted, painter, figures, time.perf_counter() - began)
    if not (separated := separates(figures["iou"])):
        warn(
            "the measure does not separate the trained ControlNet from the other two: their intervals overlap. "
            "Train longer (--steps) or measure on more drawings (--test); if that does not help, do not trust it"
        )
    ious = {name: figures["iou"][name].mean for name in (TRAINED, UNTRAINED, SHUFFLED)}
    print("adherence " + " ".join(f"{name}={value:.2f}" for name, value in ious.items()))
    return 0 if separated else EXIT_INSEPARABLE


def measure(painted: dict[str, Pictures], painter: Painter) -> dict[str, dict[str, Figure]]:
    """Measure -> what was painted -> figure. Beside the three ControlNets there is chance, the trained one's pictures
    held against the drawings of others, and what the VAE allows."""
    tests = painter.tests
    others: list[Drawing] = tests[1:] + tests[:1]
    rows = {name: adherence.measure_each(pictures, tests) for name, pictures in painted.items()}
    rows[OTHER] = adherence.measure_each(painted[TRAINED], others)
    rows[CEILING] = adherence.measure_each(painter.reconstruct(), tests)
    return {
        measure: {name: Figure.of([getattr(picture, measure) for picture in row]) for name, row in rows.items()}
        for measure in MEASURES
    }


MEASURES = {"iou": "region IoU", "edge_f1": "edge F1, 2 px"}


def report(
    folder: Path, painted: dict[str, Pictures], painter: Painter, figures: dict[str, dict[str, Figure]], seconds: float
) -> None:
    """Say the figures; leave them in `report.json`, and pictures to look at in `grid.png`."""
    names = list(figures["iou"])
    width = max(map(len, names))
    say(f"\ndone in {seconds:.0f} s. Means over {len(painter.tests)} test drawings with their 95 % intervals:")
    say(f"{'':{width}}  " + "  ".join(f"{title:>14}" for title in MEASURES.values()))
    for name in names:
        say(f"{name:{width}}  " + "  ".join(f"{figures[measure][name]!s:>14}" for measure in MEASURES))
    columns = [painter.drawings, *(painted[name] for name in (TRAINED, UNTRAINED, SHUFFLED))]
    rows = [[column[i] for column in columns] + [painter.tests[i].image] for i in range(min(8, len(painter.tests)))]
    with atomic.writing(folder / "grid.png") as file:
        sheet = grid(rows, ("drawing", TRAINED, UNTRAINED, SHUFFLED, "original"))
        Image.fromarray(sheet).save(file, format="PNG")
    atomic.write_json(
        folder / "report.json",
        {
            "adherence": {
                measure: {
                    name: {"mean": round(figure.mean, 4), "interval": round(figure.interval, 4)}
                    for name, figure in of.items()
                }
                for measure, of in figures.items()
            },
            "seconds": round(seconds, 1),
        },
    )
    say(f"pictures in {folder / 'grid.png'}")


def main() -> int:
    """Read the options, then run the control experiment."""
    config = load(CheckConfig, command="python -m examples.check_adherence")
    return 0 if config is None else check_adherence(config)


if __name__ == "__main__":
    run_command_line(main)
