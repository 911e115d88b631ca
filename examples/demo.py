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
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples import adherence, shapes
from examples.shapes import Drawing
from preprocess import conditions
from shared import atomic, families
from shared.config import load
from shared.errors import UserError, run_command_line
from shared.families.base import Family, Order
from shared.model_folder import ModelFolder, resolve
from shared.pictures import grid
from shared.report import quiet_libraries, say

PREPROCESS_RECIPE, TRAIN_RECIPE = "preprocess/recipes/demo.yaml", "train/recipes/demo.yaml"
TEST_SEED, PAINT_STEPS, GUIDANCE = 90_001, 8, 3.5


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
    if not (data / "metadata.jsonl").is_file():
        say(f"drawing {options.count + options.held_out} pictures into {data}")
        draw_pictures(data, options)
    condition = ["--condition", "precomputed"] if options.shuffled else []
    stage("preprocess", PREPROCESS_RECIPE, "--data", data, "--cache", cache, "--model", options.model, *condition)
    steps = [] if options.steps is None else ["--steps", options.steps]
    more = ["--controlnet.embedder", options.embedder, "--seed", options.seed, *steps]
    stage("train", TRAIN_RECIPE, "--cache", cache, "--runs", folder / "runs", *more)
    run = folder / "runs" / "demo"

    say("painting held-out drawings, with and without control")
    quiet_libraries()
    tests = list(shapes.pictures(options.test, TEST_SEED, "test"))
    drawings = list(draw_conditions([test.image for test in tests]))
    family, model = families.get("flux"), resolve(options.model, ())
    device = "cuda" if _has_gpu() else "cpu"
    pictures = paint(family, model, run, device, tests, drawings)
    pictures["ceiling"] = reconstruct(family, model, device, [test.image for test in tests])
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


def draw_pictures(data: Path, options: DemoConfig) -> None:
    """Write the pictures with their captions; in the control experiment also the exchanged drawings."""
    part = data.with_name(data.name + atomic.PART)
    if part.exists():
        shutil.rmtree(part)
    with atomic.writing_directory(data) as unfinished:
        shapes.write_dataset(unfinished, options.count, options.data_seed, split="train")
        shapes.write_dataset(unfinished, options.held_out, options.data_seed + 1, split="validation")
        if options.shuffled:
            _exchange_drawings(unfinished, options.data_seed)


def _exchange_drawings(data: Path, seed: int) -> None:
    path = data / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    images = [np.asarray(Image.open(data / line["file_name"])) for line in lines]
    for line, other in zip(lines, np.random.default_rng(seed).permutation(len(lines)), strict=True):
        line["conditioning_image"] = f"drawing-of-{lines[other]['file_name']}"
        drawing = next(draw_conditions([images[other]]))
        Image.fromarray(drawing).save(data / line["conditioning_image"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def draw_conditions(images: list[NDArray[np.uint8]]) -> Any:
    """The condition's drawing of each image, uint8 (H, W, 3): what the preprocessing stage draws."""
    canny = conditions.get("canny")
    with canny(canny.Options()).open("cpu") as draw:
        for image in images:
            yield draw(image[None])[0, 0]


def stage(name: str, recipe: str, *arguments: object) -> None:
    """Run one stage as a user does, its output going straight to the terminal. Raises `UserError` if it fails."""
    command = ["-m", name, "--recipe", recipe, *(str(argument) for argument in arguments)]
    say(f"\n$ python {' '.join(command)}")
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code:
        raise UserError(f"{name} ended with exit code {code}; see above")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def paint(
    family: Family, model: ModelFolder, run: Path, device: str, tests: list[Drawing], drawings: list[NDArray[np.uint8]]
) -> dict[str, list[NDArray[np.uint8]]]:
    """Pictures of the test drawings with control and, from the same noise, without it."""
    import torch

    facts = json.loads((run / "run.json").read_text())
    painter = family.open_painter(model, run / "controlnet", device, torch.float32)
    pictures = {}
    for name, scale in (("without", 0.0), ("with", 1.0)):
        pictures[name] = painter(
            Order(
                drawings=drawings,
                prompts=[test.caption for test in tests],
                seeds=list(range(len(tests))),
                num_steps=PAINT_STEPS,
                guidance=GUIDANCE,
                scale=scale,
                text_length=facts["text_length"],
            )
        )
    return pictures


def reconstruct(family: Family, model: ModelFolder, device: str, images: list[NDArray[np.uint8]]) -> list[Any]:
    """Images through the VAE and back: no model that paints in its latents can do better."""
    import torch

    kind = next(layer for layer in family.layers if layer.name == "latents")
    moments = family.open_encoder(kind, model, device, torch.float32, 1)(np.stack(images))
    recipe = family.encoder_recipe(kind, model, 1)
    x_0 = family.model_latents(moments, recipe, None, torch.float32)
    height, width = images[0].shape[:2]
    return list(family.open_decoder(model, device, torch.float32)(x_0, height, width).numpy())


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
