"""Ways of computing the same training have the same loss curve: `python -m benchmarks.equal_curves`.

The real training stage on the tiny FLUX that ships with the project, a few hundred steps from the same seed in several
ways. First in fp32, where what differs may differ by rounding alone:

    lean         the int8 base in this project's linear, beside optimum-quanto's own
    recomputed   every block recomputed, beside none
    compiled     compiled blocks, beside the same blocks as they are
    hoisted      modulation computed ahead, beside modulation in the base (both unquantized: ahead, it is never in int8)

Then in bf16, at a learning rate whose updates are smaller than a bf16 weight's own steps, beside fp32 weights: how much
of what the weights would have moved is there in the end (`kept`, the projection of one movement on the other), and how
far the loss is from theirs.

    stochastic   bf16 weights, rounded stochastically
    master       bf16 weights with fp32 copies
    nearest      bf16 weights, rounded to nearest: what a plain bf16 optimizer does

One line each, and a picture of the curves.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from examples import shapes
from preprocess.config import PreprocessConfig
from preprocess.pipeline import preprocess
from shared.config import load
from shared.errors import run_command_line
from shared.report import quiet_libraries, say
from train.adapters.controlnet import WEIGHTS
from train.checkpoints import CONTROLNET
from train.config import TrainConfig
from train.trainer import train

RECIPES = ("preprocess/recipes/demo.yaml", "train/recipes/demo.yaml")
ROUNDING_TOLERANCE = 1e-3
"""Largest difference of two losses of the same step, relative: rounding of 1e-7 grows as training goes on."""
NEAR, FAR = 0.9, 0.5
"""Shares of fp32's movement: rounding that tracks it keeps at least `NEAR`, one that loses it at most `FAR`."""

Changes = dict[str, dict[str, Any]]
"""Section of the training's options to what is changed there; the section "" is the options themselves."""


@dataclass(frozen=True)
class Curve:
    """One training."""

    name: str
    changes: Changes
    beside: str | None = None
    """The training that it is compared with."""


EXACT: tuple[Curve, ...] = (
    Curve("quanto", {"base": {"weights": "quanto"}}),
    Curve("lean", {"base": {"weights": "int8"}}, "quanto"),
    Curve("recomputed", {"base": {"weights": "int8"}, "memory": {"recompute": "all"}}, "lean"),
    Curve("compiled", {"base": {"weights": "int8"}, "speed": {"compile": "yes"}}, "lean"),
    Curve("unquantized", {"base": {"weights": "none"}}),
    Curve("hoisted", {"base": {"weights": "none"}, "memory": {"hoist": "yes"}}, "unquantized"),
)
BF16: Changes = {"": {"precision": "bf16"}, "controlnet": {"weights": "bf16"}}
ROUNDED: tuple[Curve, ...] = (
    Curve("fp32", {"": {"precision": "bf16"}, "controlnet": {"weights": "fp32"}}),
    Curve("stochastic", {**BF16, "optimizer": {"rounding": "stochastic"}}, "fp32"),
    Curve("master", {**BF16, "optimizer": {"master": True}}, "fp32"),
    Curve("nearest", {**BF16, "optimizer": {"rounding": "nearest"}}, "fp32"),
)
LEARNING_RATE, SMALL_LEARNING_RATE = 1e-3, 2e-5


@dataclass(frozen=True)
class Trained:
    """What came of a training."""

    losses: NDArray[np.float64]
    """Of each step."""
    weights: dict[str, torch.Tensor]
    """The ControlNet's in the end, fp32."""


def make_cache(folder: Path, model: Path, count: int) -> Path:
    """A cache of drawn pictures, encoded by the tiny model."""
    shapes.write_dataset(folder / "pictures", count, 777, split="train")
    words = ["--recipe", RECIPES[0], "--data", str(folder / "pictures"), "--cache", str(folder / "cache")]
    options = load(
        PreprocessConfig, [*words, "--model", str(model), "--validation-fraction", "0"], command="preprocess"
    )
    assert options is not None
    with open(folder / "log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        code = preprocess(options)
    assert code == 0, "a drawn picture cannot be left out"
    return folder / "cache"


def run(curve: Curve, cache: Path, runs: Path, steps: int, learning_rate: float, batch: int) -> Trained:
    """Train in one way; a training that is there already is not done again."""
    words = ["--recipe", RECIPES[1], "--cache", str(cache), "--runs", str(runs), "--name", curve.name]
    options = load(TrainConfig, [*words, "--steps", str(steps), "--device", "cpu"], command="train")
    assert options is not None
    common: Changes = {
        "": {"tracker": "none"},
        "loader": {"batch_size": batch},
        "optimizer": {
            "learning_rate": learning_rate,
            "schedule": "constant",
            "final_fraction": 0.0,
            "warmup_steps": 0,
        },
        "validation": {"every": 0, "pictures_every": 0, "adherence_every": 0},
        "checkpoint": {"every": steps},
    }
    for changes in (common, curve.changes):
        options = _changed(options, changes)
    options.check()
    # What training says is kept apart, so that the comparison's own lines stand together.
    with open(runs.parent / "log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        code = train(options)
    assert code == 0
    lines = [json.loads(line) for line in (runs / curve.name / "metrics.jsonl").read_text().splitlines()]
    losses = np.array([line["loss"] for line in lines if "loss" in line])
    weights = {name: t.float() for name, t in load_file(runs / curve.name / CONTROLNET / WEIGHTS).items()}
    return Trained(losses, weights)


def _changed(options: TrainConfig, changes: Changes) -> TrainConfig:
    whole = dict(changes.get("", {}))
    for section, change in changes.items():
        if section:
            whole[section] = dataclasses.replace(getattr(options, section), **change)
    return dataclasses.replace(options, **whole)


def difference(one: Trained, other: Trained) -> float:
    """The largest difference of two losses of the same step, relative to the second."""
    return float(np.max(np.abs(one.losses - other.losses) / np.abs(other.losses)))


def kept(one: Trained, reference: Trained, start: dict[str, torch.Tensor]) -> float:
    """How much of the reference's movement from `start` is in the other's: their projection, 1 where they are alike."""
    product = norm = 0.0
    for name, begun in start.items():
        theirs = (reference.weights[name] - begun).double()
        product += float(((one.weights[name] - begun).double() * theirs).sum())
        norm += float(theirs.square().sum())
    return product / norm


def smoothed(losses: NDArray[np.float64], width: int = 25) -> NDArray[np.float64]:
    """The mean over each stretch of `width` steps."""
    width = min(width, len(losses))
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def picture(panels: Sequence[dict[str, NDArray[np.float64]]], width: int = 640, height: int = 360) -> Image.Image:
    """Curves over the step, one panel below the other, each in its own range."""
    colors = ("black", "red", "blue", "green", "orange", "purple")
    sheet = Image.new("RGB", (width, height * len(panels)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, curves in enumerate(panels):
        left, top, right, bottom = 60, number * height + 12, width - 130, (number + 1) * height - 24
        low = min(float(curve.min()) for curve in curves.values())
        high = max(float(curve.max()) for curve in curves.values())
        draw.rectangle((left, top, right, bottom), outline="gray")
        draw.text((4, top), f"{high:.4f}", fill="black")
        draw.text((4, bottom - 10), f"{low:.4f}", fill="black")
        for place, (name, curve) in enumerate(curves.items()):
            across = np.linspace(left, right, len(curve))
            down = bottom - (curve - low) / max(high - low, 1e-12) * (bottom - top)
            color = colors[place % len(colors)]
            draw.line(list(zip(across.tolist(), down.tolist(), strict=True)), fill=color, width=1)
            draw.text((right + 8, top + 14 * place), name, fill=color)
    return sheet


def compare(
    folder: Path, model: Path, steps: int, *, count: int = 256, batch: int = 4,
    exact: Sequence[Curve] = EXACT, rounded: Sequence[Curve] = ROUNDED,
) -> list[str]:  # fmt: skip
    """Train all ways, print a line each, and write curves.png to `folder`. What did not come out as it should comes
    back in words."""
    cache, problems = folder / "cache", list[str]()
    if not cache.is_dir():
        make_cache(folder, model, count)
    trained: dict[str, Trained] = {}
    for curve in exact:
        trained[curve.name] = run(curve, cache, folder / "runs", steps, LEARNING_RATE, batch)
        if curve.beside is not None:
            found = difference(trained[curve.name], trained[curve.beside])
            say(f"curve {curve.name} beside={curve.beside} steps={steps} largest_difference={found:.2e}")
            if not found <= ROUNDING_TOLERANCE:
                problems.append(f"{curve.name} differs from {curve.beside} by {found:.2e}, more than rounding")
    start: dict[str, torch.Tensor] = {}
    for curve in rounded:
        if not start:  # one step of next to nothing
            start = run(Curve("start", curve.changes), cache, folder / "runs", 1, 1e-30, batch).weights
        trained[curve.name] = run(curve, cache, folder / "runs", steps, SMALL_LEARNING_RATE, batch)
        if curve.beside is not None:
            reference = trained[curve.beside]
            share = kept(trained[curve.name], reference, start)
            ours, theirs = smoothed(trained[curve.name].losses)[-1], smoothed(reference.losses)[-1]
            say(
                f"curve {curve.name} beside={curve.beside} steps={steps} kept={share:.3f} last_loss={ours:.5f} "
                f"reference={theirs:.5f}"
            )
            tracks = curve.name != "nearest"
            if (share < NEAR) if tracks else (share > FAR):
                problems.append(f"{curve.name} keeps {share:.1%} of the movement of {curve.beside}")
    panels = [
        {curve.name: smoothed(trained[curve.name].losses) for curve in group} for group in (exact, rounded) if group
    ]
    picture(panels).save(folder / "curves.png")
    say(f"curves in {folder / 'curves.png'}")
    return problems


def main() -> int:
    """Read the options, train, and compare; the exit code is 0 where all is as it should be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.equal_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--model", type=Path, default=Path("examples/tiny-flux"))
    parser.add_argument("--folder", type=Path, help="kept, and gone on with; default: a temporary one")
    options = parser.parse_args()
    quiet_libraries()
    if options.folder is not None:
        problems = compare(options.folder, options.model, options.steps)
    else:
        with tempfile.TemporaryDirectory(prefix="equal-curves-") as folder:
            problems = compare(Path(folder), options.model, options.steps)
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    run_command_line(main)
