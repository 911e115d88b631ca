"""Paint with a trained ControlNet: `python -m train.sample --run runs/first --image drawing.png --prompt "..."`.

Inference, not training: this loads the whole pipeline, text encoders too, through diffusers' own classes. Nothing in
the training stage imports it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from shared import atomic
from shared.config import load
from shared.errors import UserError, run_command_line


@dataclass(frozen=True)
class SampleConfig:
    """Paint a drawing with a run's newest ControlNet."""

    run: str
    """The run's folder, for example runs/first."""
    image: str
    """The drawing, as the ControlNet saw them in training: white lines on black for lineart and canny."""
    prompt: str
    """What to paint."""
    out: str | None = None
    """Where the pictures go: OUT.png, and OUT-grid.png beside it. Default: RUN/samples/IMAGE-SEED."""
    seed: int = 0
    """Of the noise."""
    steps: int = 28
    """Denoising steps."""
    guidance: float = 3.5
    """Guidance that the distilled base is told."""
    scale: float = 1.0
    """How strongly the ControlNet acts; 0 is without it."""
    invert: bool = False
    """Turn a drawing of black on white around."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on the CPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""

    def check(self) -> None:
        """Refuse impossible values."""
        if self.steps < 1:
            raise UserError(f"steps must be 1 or more, not {self.steps}")


def fit(drawing: Image.Image, sizes: list[tuple[int, int]]) -> Image.Image:
    """The drawing cut to the training size (width, height) that loses least of it."""
    width, height = drawing.size
    best = min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - np.log(width / height)))
    return ImageOps.fit(drawing, best, Image.Resampling.LANCZOS)


def read_drawing(path: Path, invert: bool) -> Image.Image:
    """The drawing as RGB, upright, on white where it is transparent. Raises `UserError`."""
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGBA")
    except FileNotFoundError as error:
        raise UserError(f"no such IMAGE: {path}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"IMAGE {path} cannot be read as a picture: {error}") from error
    drawing = Image.new("RGBA", upright.size, "white")
    drawing.alpha_composite(upright)
    return ImageOps.invert(drawing.convert("RGB")) if invert else drawing.convert("RGB")


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(run.json, config.yaml) of a run that has a checkpoint. Raises `UserError`."""
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is no run: give the folder that `make train` named, for example runs/depth-2-4")
    if not (folder / "controlnet" / "config.json").is_file():
        raise UserError(f"{folder} has no checkpoint yet: train until the first one (checkpoint.every) is saved")
    return json.loads((folder / "run.json").read_text()), yaml.safe_load((folder / "config.yaml").read_text())


def sample(options: SampleConfig) -> int:
    """Paint, with and without control, and write the picture and a grid. Exit code 0."""
    folder = Path(options.run)
    facts, trained = read_run(folder)
    drawing = read_drawing(Path(options.image), options.invert)

    import torch

    from shared import families
    from shared.families.base import Order
    from shared.model_folder import resolve
    from shared.pictures import grid
    from shared.report import quiet_libraries, say, warn

    quiet_libraries()
    placed = np.asarray(fit(drawing, [(width, height) for width, height in facts["sizes"]]))
    if {"lineart", "canny"} & {*facts["condition"]} and placed.mean() > 127:
        warn("this drawing is mostly white; the ControlNet was trained on white lines on black: try --invert True")
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
    precise = options.precision == "fp32" or (options.precision == "auto" and device == "cpu")
    family = families.get(facts["family"])
    components = {family.base_component, "scheduler", *(part for kind in family.layers for part in kind.components)}
    model = resolve(facts["model"]["name"], sorted(components), facts["model"]["revision"])
    paint = family.open_painter(model, folder / "controlnet", device, torch.float32 if precise else torch.bfloat16)

    def painted(scale: float) -> NDArray[np.uint8]:
        return paint(
            Order(
                drawings=[placed],
                prompts=[options.prompt],
                seeds=[options.seed],
                num_steps=options.steps,
                guidance=options.guidance,
                scale=scale,
                text_length=facts["text_length"],
                control_mode=trained["controlnet"]["control_mode"],
            )
        )[0]

    default = folder / "samples" / f"{Path(options.image).stem}-{options.seed}"
    out = Path(options.out or default).with_suffix("")
    out.parent.mkdir(parents=True, exist_ok=True)
    controlled = painted(options.scale)
    sheet = grid([[placed, controlled, painted(0.0)]], ("drawing", f"with control, scale {options.scale:g}", "without"))
    for path, picture in ((out.with_suffix(".png"), controlled), (out.with_name(f"{out.name}-grid.png"), sheet)):
        with atomic.writing(path) as file:
            Image.fromarray(picture).save(file, format="PNG")
        say(str(path))
    return 0


def main() -> int:
    """Read the options, then paint."""
    config = load(SampleConfig, command="python -m train.sample")
    return 0 if config is None else sample(config)


if __name__ == "__main__":
    run_command_line(main)
