"""Does the measure of adherence tell a ControlNet that follows its drawing from one that cannot?

`python -m examples.check_adherence`, or `make check-adherence`: a control experiment in the tiny world. Two ControlNets
are trained from one cache, from one seed, on the same pictures in the same order, and differ in one thing: one sees
each picture's own drawing, the other another picture's, so that there is nothing to be followed. A third is not trained
at all. All three paint the same drawings, which nothing has seen, from the same noise. A measure worth logging puts the
first above the other two by more than chance; where one does not, the exit code is 1.

Two kinds of measure are tried: against the true mask of the shape, which only the tiny world knows, and those that
training logs (`train/adherence.py`), for which the detector draws what was painted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from examples.adherence import iou, segment
from examples.shapes import Drawing
from examples.tiny_world import (
    PREPROCESS_RECIPE,
    TRAIN_RECIPE,
    Painter,
    Pictures,
    draw_conditions,
    draw_pictures,
    stage,
    text_length_of,
)
from shared import atomic
from shared.config import load
from shared.errors import UserError, run_command_line
from shared.pictures import grid
from shared.report import quiet_libraries, say, warn
from train import adherence
from train.adapters.controlnet import parse_depth
from train.compare.statistics import mean_interval

EXIT_INSEPARABLE = 1
TRAINED, UNTRAINED, SHUFFLED = "trained", "untrained", "shuffled"
OTHER, CEILING = "trained, beside another's drawing", "originals through the VAE"
TRUE_IOU = "iou"
MEASURES = {TRUE_IOU: "IoU, true mask", "region_iou": "region IoU", "edge_f1": "edge F1", "ssim": "SSIM"}
"""Those of `train/adherence.py` under their own names."""


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
        """Of two values or more; those that are NaN do not apply. With fewer the interval is unbounded."""
        mean, interval = mean_interval([value for value in values if not math.isnan(value)] or [math.nan])
        return cls(mean, math.inf if interval is None else interval)

    def __str__(self) -> str:
        return f"{self.mean:.2f} +- {self.interval:.2f}"


Figures = Mapping[str, Mapping[str, Figure]]
"""Measure -> what was painted -> figure."""


def inseparable(figures: Figures) -> list[str]:
    """The measures by which the trained one is not above both others, or the intervals overlap."""

    def separates(of: Mapping[str, Figure]) -> bool:
        low = of[TRAINED].mean - of[TRAINED].interval
        return all(low > other.mean + other.interval for other in (of[UNTRAINED], of[SHUFFLED]))

    return [measure for measure, of in figures.items() if not separates(of)]


def check_adherence(options: CheckConfig) -> int:
    """Run the control experiment. Exit code 0 where every measure separates, else 1; the last line has the figures."""
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
            "--controlnet.embedder", options.embedder, "--validation.adherence-detector", "canny",
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
    if failed := inseparable(figures):
        warn(
            f"{' and '.join(MEASURES[name] for name in failed)} cannot tell the trained ControlNet from the other "
            "two: the intervals overlap. Train longer (--steps) or measure on more drawings (--test); if that does not "
            "help, do not trust it"
        )
    ious = figures[TRUE_IOU]
    print("adherence " + " ".join(f"{name}={ious[name].mean:.2f}" for name in (TRAINED, UNTRAINED, SHUFFLED)))
    return EXIT_INSEPARABLE if failed else 0


def measure(painted: Mapping[str, Pictures], painter: Painter) -> Figures:
    """The figures of the three ControlNets; beside them chance, the trained one's pictures held against the drawings of
    others, and what the VAE allows."""
    own = list(zip(painter.tests, painter.drawings, strict=True))
    rows = {name: _scores(pictures, own) for name, pictures in painted.items()}
    rows[OTHER] = _scores(painted[TRAINED], own[1:] + own[:1])
    rows[CEILING] = _scores(painter.reconstruct(), own)
    return {
        measure: {name: Figure.of([scores[measure] for scores in row]) for name, row in rows.items()}
        for measure in MEASURES
    }


def _scores(pictures: Pictures, wanted: Sequence[tuple[Drawing, NDArray[np.uint8]]]) -> list[dict[str, float]]:
    """Of each picture every measure, beside the test picture and the drawing that it should keep to."""
    return [
        {TRUE_IOU: iou(segment(picture).mask, test.mask), **adherence.compare(found, drawing)}
        for picture, found, (test, drawing) in zip(pictures, draw_conditions(pictures), wanted, strict=True)
    ]


def report(folder: Path, painted: Mapping[str, Pictures], painter: Painter, figures: Figures, seconds: float) -> None:
    """Say the figures; leave them in `report.json`, and pictures to look at in `grid.png`."""
    names = list(figures[TRUE_IOU])
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
