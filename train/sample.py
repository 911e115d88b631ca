"""Paint with what a run has trained: `python -m train.sample --run runs/first --image drawing.png --prompt "..."`.

One drawing, or many with their prompts; prompts alone for a LoRA or a whole base (train/sample_plain.py). Inference,
not training: this loads the whole pipeline, text encoders too, through diffusers' own classes. Nothing in the training
stage imports it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from shared import atomic
from shared.config import load
from shared.errors import UserError, run_command_line

if TYPE_CHECKING:
    import torch

    from shared.families.base import Family
    from shared.model_folder import ModelFolder
    from train.adapters.base import Adapter

_DISTILLED_GUIDANCE = 3.5
"""As diffusers' pipelines of FLUX tell it."""


@dataclass(frozen=True)
class SampleConfig:
    """Paint with the newest weights of a run: drawings with a ControlNet, words with a LoRA or a base."""

    run: str
    """The run's folder, for example runs/first."""
    image: tuple[str, ...] = ()
    """The drawing, as the ControlNet saw them in training: white lines on black for lineart and canny. Several are
    painted one after the other. None for a LoRA or a base, which paint from words alone."""
    prompt: tuple[str, ...] = ()
    """What to paint: one for each drawing, or one for all of them; several with one drawing paint it several times."""
    pairs: str | None = None
    """A JSONL file instead of image and prompt, one line per picture: {"image": "a.png", "prompt": "a dog"}, with a
    "seed" of its own where it is given. Images are named from the file's folder."""
    out: str | None = None
    """Where the pictures go: OUT.png (of several OUT-1.png, OUT-2.png, ...), and OUT-grid.png beside them. Default:
    RUN/samples/IMAGE-SEED, PAIRS-SEED, or words-SEED."""
    seed: int = 0
    """Of the noise."""
    steps: int = 28
    """Denoising steps."""
    guidance: float | None = None
    """How far pictures are led towards their prompts. Default: 3.5, which a distilled base is told, as FLUX; else the
    family's own, 7.5 with SD 1.5."""
    scale: float = 1.0
    """How strongly the ControlNet or the LoRA acts; 0 is without it."""
    control_start: float = 0.0
    """Share of the denoising, 0 to 1, before which the ControlNet does not act. Raise it to leave the layout free."""
    control_end: float = 1.0
    """Share of the denoising, 0 to 1, after which the ControlNet no longer acts. Lower it to leave details free."""
    without: bool = True
    """Paint each also without what was trained, from the same noise, for the grid (not with a base that was trained:
    what it was is gone). False takes half the time."""
    invert: bool = False
    """Turn drawings of black on white around."""
    weights: Literal["trained", "ema"] = "trained"
    """trained: as the last step left them. ema: their average over training, where the run kept one (ema.profile)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on the CPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""

    def check(self) -> None:
        """Refuse impossible values."""
        if self.steps < 1:
            raise UserError(f"steps must be 1 or more, not {self.steps}")
        if not 0 <= self.control_start < self.control_end <= 1:
            raise UserError(
                "control_start and control_end are shares of the denoising, 0 <= start < end <= 1, not "
                f"{self.control_start:g} and {self.control_end:g}"
            )
        if self.pairs is not None and (self.image or self.prompt):
            raise UserError("give either PAIRS, or IMAGE and PROMPT, not both")
        if self.pairs is None and not self.prompt:
            raise UserError(_NOTHING)
        if self.image and len({len(self.image), len(self.prompt)} - {1}) > 1:
            raise UserError(
                f"{len(self.image)} images and {len(self.prompt)} prompts do not pair up: give one of each, one prompt "
                "for each image, or a single one of either"
            )


_NOTHING = 'give a drawing and what to paint: IMAGE=drawing.png PROMPT="...", or PAIRS=file.jsonl'


@dataclass(frozen=True)
class Pair:
    """One picture to paint."""

    image: Path
    prompt: str
    seed: int


def read_pairs(options: SampleConfig) -> list[Pair]:
    """What to paint, in the order given; at least one. Raises `UserError` naming the line that cannot be read."""
    if options.pairs is None:
        count = max(len(options.image), len(options.prompt))
        images, prompts = (
            words * count if len(words) == 1 else words for words in (options.image, options.prompt)
        )  # fmt: skip
        return [Pair(Path(image), prompt, options.seed) for image, prompt in zip(images, prompts, strict=True)]
    path = Path(options.pairs)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"PAIRS {path} cannot be read: {error}") from error
    pairs = [
        _pair(line, f"{path}, line {i}", path.parent, options.seed) for i, line in enumerate(lines, 1) if line.strip()
    ]
    if not pairs:
        raise UserError(f'PAIRS {path} is empty: it needs lines like {{"image": "a.png", "prompt": "a dog"}}')
    return pairs


def _pair(line: str, where: str, folder: Path, seed: int) -> Pair:
    """One line of a pairs file. Raises `UserError`."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), str) for key in ("image", "prompt")):
        raise UserError(f'{where}: it needs an image and a prompt, like {{"image": "a.png", "prompt": "a dog"}}')
    if unknown := sorted({*content} - {"image", "prompt", "seed"}):
        raise UserError(f"{where}: unknown key '{unknown[0]}'; there is: image, prompt, seed")
    own = content.get("seed", seed)
    if not isinstance(own, int) or isinstance(own, bool):
        raise UserError(f"{where}: seed must be a whole number, not {own!r}")
    return Pair(folder / content["image"], content["prompt"], own)


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
    from train import checkpoints

    config = folder / "config.yaml"
    trained = yaml.safe_load(config.read_text()) if config.is_file() else {}
    if checkpoints.linked(folder) is None:
        raise UserError(f"{folder} has no checkpoint yet: train until the first one (checkpoint.every) is saved")
    return json.loads((folder / "run.json").read_text()), trained


def adapter_of(trained: dict[str, Any]) -> type[Adapter]:
    """What a run with these options has trained."""
    from train import adapters

    return adapters.get(trained.get("adapter", "controlnet"))  # a run from before there were others


def destinations(options: SampleConfig, pairs: list[Pair]) -> tuple[list[Path], Path]:
    """Where each pair's picture goes, and where the grid does."""
    stem = Path(options.pairs).stem if options.pairs is not None else pairs[0].image.stem
    out = Path(options.out or Path(options.run) / "samples" / f"{stem}-{options.seed}")
    name = out.name.removesuffix(".png")
    names = [name] if len(pairs) == 1 else [f"{name}-{i}" for i in range(1, len(pairs) + 1)]
    return [out.with_name(f"{picture}.png") for picture in names], out.with_name(f"{name}-grid.png")


def sample(options: SampleConfig) -> int:
    """Paint, with and without control, and write the pictures and a grid of a row for each. Exit code 0."""
    folder = Path(options.run)
    facts, trained = read_run(folder)
    adapter = adapter_of(trained)
    if not adapter.conditioned:
        return _sample_words(options, folder, facts, trained, adapter)
    if options.pairs is None and not options.image:
        raise UserError(_NOTHING)
    pairs = read_pairs(options)
    drawings = [read_drawing(pair.image, options.invert) for pair in pairs]  # all, before anything is loaded

    from shared.families.base import Order
    from shared.pictures import grid
    from shared.report import say, warn

    sizes = [(width, height) for width, height in facts["sizes"]]
    placed = [np.asarray(fit(drawing, sizes)) for drawing in drawings]
    for pair, drawing in zip(pairs, placed, strict=True):
        if {"lineart", "canny"} & {*facts["condition"]} and drawing.mean() > 127:
            warn(f"{pair.image} is mostly white; the ControlNet was trained on white lines on black: try --invert True")
    found = _found(options, folder, facts, trained)
    paint = found.family.open_painter(found.model, found.weights, found.device, found.dtype)

    def painted(pair: Pair, drawing: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
        return paint(
            Order(
                drawings=[drawing],
                prompts=[pair.prompt],
                seeds=[pair.seed],
                num_steps=options.steps,
                guidance=found.guidance,
                scale=scale,
                text_length=facts["text_length"],
                control_mode=trained["controlnet"]["control_mode"],
                control_start=options.control_start,
                control_end=options.control_end,
                scheduler=found.scheduler if scale else {},  # the base alone paints as it always has
            )
        )[0]

    paths, sheet_path = destinations(options, pairs)
    sheet_path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for pair, drawing, path in zip(pairs, placed, paths, strict=True):
        controlled = painted(pair, drawing, options.scale)
        _write(path, controlled)
        say(str(path))
        rows.append([drawing, controlled, *([painted(pair, drawing, 0.0)] if options.without else [])])
    control = f"with control, scale {options.scale:g}"
    if (options.control_start, options.control_end) != (0.0, 1.0):
        control += f", {options.control_start:g} to {options.control_end:g}"
    _write(sheet_path, grid(rows, ["drawing", control, "without"][: len(rows[0])]))
    say(str(sheet_path))
    return 0


def _sample_words(
    options: SampleConfig, folder: Path, facts: dict[str, Any], trained: dict[str, Any], adapter: type[Adapter]
) -> int:
    """The same from words alone. Raises `UserError` where there are drawings, or a base is to be painted without."""
    if options.image or options.pairs is not None:
        raise UserError(f"{folder} is a run of adapter {adapter.name}, which sees no drawing: give PROMPT alone")
    for name in ("control_start", "control_end", "invert"):
        if getattr(options, name) != getattr(SampleConfig, name):
            raise UserError(f"{name} is for drawings, and {folder} is a run of adapter {adapter.name}: leave it out")
    if adapter.name not in ("lora", "full"):
        raise UserError(f"{folder} is a run of adapter {adapter.name}, which diffusers' pipelines do not read")
    if options.scale != 1.0 and not adapter.keeps_base:
        raise UserError(f"{folder} has trained the base itself, which acts by 1: leave scale out")

    from shared.pictures import grid
    from shared.report import say
    from train.sample_plain import open_words

    found = _found(options, folder, facts, trained)
    paint = open_words(
        found.family, found.model, adapter, found.weights, found.device, found.dtype,
        size=min(((w, h) for w, h in facts["sizes"]), key=lambda size: (abs(np.log(size[0] / size[1])), -size[0])),
        num_steps=options.steps,
        guidance=found.guidance,
        text_length=facts["text_length"],
        scheduler=found.scheduler,
    )  # fmt: skip
    out = Path(options.out or folder / "samples" / f"words-{options.seed}")
    name, several = out.name.removesuffix(".png"), len(options.prompt) > 1
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, prompt in enumerate(options.prompt, 1):
        picture = paint(prompt, options.seed, options.scale)
        path = out.with_name(f"{name}-{i}.png" if several else f"{name}.png")
        _write(path, picture)
        say(str(path))
        without = options.without and adapter.keeps_base
        rows.append([picture, *([paint(prompt, options.seed, 0.0)] if without else [])])
    headings = [f"{adapter.title}, scale {options.scale:g}", "without"][: len(rows[0])]
    sheet = out.with_name(f"{name}-grid.png")
    _write(sheet, grid(rows, headings))
    say(str(sheet))
    return 0


@dataclass(frozen=True)
class _Found:
    """What a run has trained, and what it paints with."""

    family: Family
    model: ModelFolder
    weights: Path
    scheduler: dict[str, Any]
    """Settings of the model's scheduler that training has changed."""
    guidance: float
    device: str
    dtype: torch.dtype


def _found(options: SampleConfig, folder: Path, facts: dict[str, Any], trained: dict[str, Any]) -> _Found:
    """The model is fetched where it is not on this machine. Raises `UserError`."""
    import torch

    from shared import families
    from shared.model_folder import resolve
    from shared.report import quiet_libraries
    from train import checkpoints
    from train.objectives import ObjectiveOptions

    quiet_libraries()
    checkpoint = checkpoints.linked(folder)
    assert checkpoint is not None, "`read_run` has seen one"
    family = families.get(facts["family"])
    components = {family.base_component, "scheduler", *(part for kind in family.layers for part in kind.components)}
    guidance = _DISTILLED_GUIDANCE if family.guidance_scale is None else family.guidance_scale
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
    precise = options.precision == "fp32" or (options.precision == "auto" and device == "cpu")
    return _Found(
        family=family,
        model=resolve(facts["model"]["name"], sorted(components), facts["model"]["revision"]),
        weights=checkpoints.weights_of(checkpoint, options.weights),
        scheduler=ObjectiveOptions(**trained["objective"]).scheduler(family.objective),
        guidance=guidance if options.guidance is None else options.guidance,
        device=device,
        dtype=torch.float32 if precise else torch.bfloat16,
    )


def _write(path: Path, picture: NDArray[np.uint8]) -> None:
    with atomic.writing(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def main() -> int:
    """Read the options, then paint."""
    config = load(SampleConfig, command="python -m train.sample")
    return 0 if config is None else sample(config)


if __name__ == "__main__":
    run_command_line(main)
