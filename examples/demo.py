"""The main job on what ships with the project: `python -m examples.demo`, or `make demo`.

Draws pictures, preprocesses them into a cache, trains a ControlNet from the cache, and measures on drawings that
nothing has seen whether the ControlNet puts the shape where the drawing says. The two stages are run by the very
commands that a user types.
"""

from __future__ import annotations

import base64
import html
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples import adherence
from examples.tiny_world import PREPROCESS_RECIPE, TRAIN_RECIPE, Painter, draw_pictures, stage, text_length_of
from shared import atomic
from shared.config import load
from shared.errors import UserError, run_command_line
from shared.pictures import grid
from shared.report import quiet_libraries, say


@dataclass(frozen=True)
class DemoConfig:
    """From nothing to a ControlNet that follows drawings, on a tiny FLUX, in a few minutes on two CPU cores."""

    folder: str = "demo"
    """Where everything goes. Running again resumes; remove it to start over."""
    model: str = "examples/tiny-flux"
    """The tiny FLUX."""
    count: int = 800
    """Pictures to train on."""
    held_out: int = 24
    """Pictures whose loss and look are followed while training."""
    test: int = 64
    """Drawings that the adherence is measured on; nothing is chosen by them."""
    steps: int | None = None
    """Training steps. Default: the recipe's."""
    embedder: Literal["copy", "zero"] = "copy"
    """How the condition enters the ControlNet; see `python -m train --help`."""
    seed: int = 0
    """Of the training: data order, noise, times."""
    data_seed: int = 777
    """Of the pictures."""
    shuffled: bool = False
    """Control experiment: train with every picture's drawing exchanged for another's. Nothing is there to be followed,
    so adherence must stay near the figure without control."""

    def check(self) -> None:
        """Refuse impossible values."""
        if min(self.count, self.held_out, self.test) < 2:
            raise UserError("count, held_out and test must be 2 or more")


def demo(options: DemoConfig) -> int:
    """Run the demo. Exit code 0; the last line printed gives the adherence."""
    began = time.perf_counter()
    folder = Path(options.folder)
    data, cache = folder / "pictures", folder / "cache"
    draw_pictures(data, options.count, options.held_out, options.data_seed, exchanged=options.shuffled)
    condition = ["--condition", "precomputed"] if options.shuffled else []
    stage("preprocess", PREPROCESS_RECIPE, "--data", data, "--cache", cache, "--model", options.model, *condition)
    steps = [] if options.steps is None else ["--steps", options.steps]
    more = ["--controlnet.embedder", options.embedder, "--seed", options.seed, *steps]
    stage("train", TRAIN_RECIPE, "--cache", cache, "--runs", folder / "runs", *more)
    run = folder / "runs" / "demo"

    say("painting held-out drawings, with and without control")
    quiet_libraries()
    painter = Painter.open(options.model, options.test)
    tests, drawings = painter.tests, painter.drawings
    without, controlled = painter.paint(run / "controlnet", text_length_of(run), 0.0, 1.0)
    pictures = {"without": without, "with": controlled, "ceiling": painter.reconstruct()}
    figures = {name: adherence.measure(images, tests).as_dict() for name, images in pictures.items()}

    rows = [
        [drawings[i], pictures["with"][i], pictures["without"][i], tests[i].image] for i in range(min(8, options.test))
    ]
    sheet = grid(rows, ("drawing", "with control", "without control", "original"))
    with atomic.writing(folder / "grid.png") as file:
        Image.fromarray(sheet).save(file, format="PNG")
    seconds = time.perf_counter() - began
    atomic.write_json(folder / "report.json", {"adherence": figures, "seconds": round(seconds, 1)})
    write_report(folder, figures, sheet, run, seconds, options)
    say_what_next(folder, run, seconds, figures)
    return 0


def write_report(
    folder: Path,
    figures: dict[str, dict[str, float]],
    sheet: NDArray[np.uint8],
    run: Path,
    seconds: float,
    options: DemoConfig,
) -> None:
    """`report.html`: the figures, the held-out curve and the grid, in one file."""
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    looks = [(line["step"], line["held_out"]) for line in lines if "held_out" in line]
    names = {"without": "without control", "with": "with control", "ceiling": "ceiling: the picture through the VAE"}
    measured = "".join(
        f"<tr><th>{names[name]}</th>" + "".join(f"<td>{figures[name][key]:.2f}</td>" for key in _COLUMNS) + "</tr>"
        for name in names
    )
    curve = "".join(
        f"<tr><td>{step}</td><td>{look['loss']:.4f}</td><td>{look['loss_without_control']:.4f}</td>"
        f"<td>{look.get('condition_gap', float('nan')):.4f}</td></tr>"
        for step, look in looks
    )
    heads = "".join(f"<th>{title}</th>" for title in _COLUMNS.values())
    control = " <b>Trained on exchanged drawings.</b>" if options.shuffled else ""
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Underdrawing: the demo</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;margin:1rem 0}}
td,th{{padding:.25rem .75rem;border-bottom:1px solid #ddd;text-align:right}}
th:first-child{{text-align:left}}img{{max-width:100%;image-rendering:pixelated}}code{{background:#f3f3f3}}</style>
<h1>A ControlNet that follows drawings</h1>
<p>{options.count} pictures, {html.escape(str(looks[-1][0] if looks else "?"))} steps, {seconds:.0f} seconds.
Measured on {options.test} drawings that nothing has seen.{control}</p>
<img alt="drawing, with control, without control, original" src="data:image/png;base64,{picture}">
<h2>Adherence</h2><p>Each from 0 to 1. Intersection over union compares the shape painted with the shape drawn.</p>
<table><tr><th></th>{heads}</tr>{measured}</table>
<h2>While training</h2><p>Held-out loss on a fixed grid of (sample, t, noise). The last column is by how much the
sample's own drawing does better than another one's: above 0, the condition is followed.</p>
<table><tr><th>step</th><th>with control</th><th>without</th><th>own drawing beats another's by</th></tr>{curve}</table>
</html>"""
    atomic.write_bytes(folder / "report.html", page.encode())


_COLUMNS = {
    "iou": "intersection over union",
    "edge_f1": "edges (F1, 2 px)",
    "foreground": "colour of the shape",
    "background": "colour of the ground",
    "shape": "kind of shape",
}


def say_what_next(folder: Path, run: Path, seconds: float, figures: dict[str, dict[str, float]]) -> None:
    """Name what to look at and what to run next; the last line is the result."""
    say(f"\ndone in {seconds:.0f} s. Look at")
    for path, what in (
        (folder / "grid.png", "drawing, with control, without control, original"),
        (folder / "report.html", "the same with the figures"),
        (run / "pictures", "held-out pictures while training"),
        (run / "controlnet", "the ControlNet, in diffusers' format"),
    ):
        say(f"  {path!s:28} {what}")
    say(
        "next, the real FLUX (one 40 GB GPU; accept the licence of black-forest-labs/FLUX.1-dev on the hub first):\n"
        "  make preprocess DATA=~/datasets/dogs CACHE=cache/dogs\n"
        "  make train CACHE=cache/dogs DEPTH=2-4 NAME=first"
    )
    print(
        f"adherence without={figures['without']['iou']:.2f} with={figures['with']['iou']:.2f} "
        f"ceiling={figures['ceiling']['iou']:.2f}"
    )


def main() -> int:
    """Read the options, then run the demo."""
    config = load(DemoConfig, command="python -m examples.demo")
    return 0 if config is None else demo(config)


if __name__ == "__main__":
    run_command_line(main)
