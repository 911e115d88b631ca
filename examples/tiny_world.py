"""What is done in the tiny world: draw its pictures, run the two stages on them, paint drawings that nothing has seen.

The demo and the control experiment (`check_adherence.py`) are both made of these pieces.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from examples import shapes
from examples.shapes import Drawing
from preprocess import conditions
from shared import atomic, families
from shared.errors import UserError
from shared.families.base import Family, Order
from shared.model_folder import ModelFolder, resolve
from shared.report import say

PREPROCESS_RECIPE, TRAIN_RECIPE = "preprocess/recipes/demo.yaml", "train/recipes/demo.yaml"
TEST_SEED, PAINT_STEPS, GUIDANCE = 90_001, 8, 3.5
Pictures = list[NDArray[np.uint8]]
"""uint8 (H, W, 3) each."""


def draw_pictures(data: Path, count: int, held_out: int, seed: int, *, exchanged: bool) -> None:
    """Write pictures with their captions into the folder `data`, whole or not at all; where it is there, nothing.

    With `exchanged` every picture also gets a drawing of its own (`conditioning_image`), which is another picture's.
    """
    if (data / "metadata.jsonl").is_file():
        return
    say(f"drawing {count + held_out} pictures into {data}")
    with atomic.writing_directory(data) as unfinished:
        shapes.write_dataset(unfinished, count, seed, split="train")
        shapes.write_dataset(unfinished, held_out, seed + 1, split="validation")
        if exchanged:
            _exchange_drawings(unfinished, seed)


def _exchange_drawings(data: Path, seed: int) -> None:
    path = data / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    images = [np.asarray(Image.open(data / line["file_name"])) for line in lines]
    for line, other in zip(lines, np.random.default_rng(seed).permutation(len(lines)), strict=True):
        line["conditioning_image"] = f"drawing-of-{lines[other]['file_name']}"
        drawing = next(draw_conditions([images[other]]))
        Image.fromarray(drawing).save(data / line["conditioning_image"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def draw_conditions(images: Sequence[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
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


@dataclass(frozen=True)
class Painter:
    """Paints the same test drawings, each from its own noise, with whatever ControlNet it is given."""

    family: Family
    model: ModelFolder
    device: str
    tests: list[Drawing]
    drawings: Pictures
    """Of each test picture what the condition draws."""

    @classmethod
    def open(cls, model: str, count: int) -> Painter:
        """`count` test drawings, for the tiny FLUX in the folder `model`; on a GPU where there is one."""
        tests = list(shapes.pictures(count, TEST_SEED, "test"))
        return cls(
            families.get("flux"),
            resolve(model, ()),
            "cuda" if torch.cuda.is_available() else "cpu",
            tests,
            list(draw_conditions([test.image for test in tests])),
        )

    def paint(self, controlnet: Path, text_length: int, *scales: float) -> list[Pictures]:
        """The test drawings painted with the ControlNet of a folder, once at each scale (0 is without it)."""
        painter = self.family.open_painter(self.model, controlnet, self.device, torch.float32)
        return [
            painter(
                Order(
                    drawings=self.drawings,
                    prompts=[test.caption for test in self.tests],
                    seeds=list(range(len(self.tests))),
                    num_steps=PAINT_STEPS,
                    guidance=GUIDANCE,
                    scale=scale,
                    text_length=text_length,
                )
            )
            for scale in scales
        ]

    def reconstruct(self) -> Pictures:
        """The test pictures through the VAE and back: no model that paints in its latents can do better."""
        images = np.stack([test.image for test in self.tests])
        kind = next(layer for layer in self.family.layers if layer.name == "latents")
        moments = self.family.open_encoder(kind, self.model, self.device, torch.float32, 1)(images)
        recipe = self.family.encoder_recipe(kind, self.model, 1)
        x_0 = self.family.model_latents(moments, recipe, None, torch.float32)
        height, width = images.shape[1:3]
        return list(self.family.open_decoder(self.model, self.device, torch.float32)(x_0, height, width).numpy())


def text_length_of(run: Path) -> int:
    """T5 tokens that a run was trained with."""
    return int(json.loads((run / "run.json").read_text())["text_length"])
