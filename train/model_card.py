"""The card of what was exported, a ControlNet, a LoRA or a base: licence, data, training figures, pictures, the code
to use it.

Markdown below a block of metadata in YAML, as the hub reads a model's README.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

REPO = "YOUR-NAME/YOUR-MODEL"
"""Stands in the card for the repository's name until the upload, which knows it."""

_LINES = {"lineart", "lineart_anime", "softedge", "canny"}
"""Conditions that draw white lines on black."""
_OPTIONS = (
    ("Learning rate", "optimizer.learning_rate"),
    ("Precision", "precision"),
    ("Seed", "seed"),
)
_FIGURES = (
    ("loss", "loss with the sample's own drawing"),
    ("loss_without_control", "loss without control"),
    ("loss_other_drawing", "loss with another sample's drawing"),
    ("condition_gap", "by how much its own drawing beats another's"),
)
_PLAIN_FIGURES = (("loss", "loss"), ("loss_without_control", "loss of the base alone"))


@dataclass(frozen=True)
class Card:
    """What a card says."""

    name: str
    """Of the model, its heading."""
    base: str
    """Hub id of the base, or the name of a local folder."""
    on_hub: bool
    """Whether `base` is a hub id."""
    licence: Mapping[str, str]
    """The metadata's licence fields: "license", and for others "license_name" and "license_link"."""
    pipeline_class: str
    controlnet_class: str
    depth: tuple[int, int]
    """Blocks of the ControlNet: (num_layers, num_single_layers)."""
    num_parameters: int
    dtype: str
    """Of the weights' file: bfloat16."""
    conditions: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    """Trained sizes in pixels, (width, height)."""
    text_length: int | None
    """Text tokens, where their number can be chosen."""
    guidance: float
    """What pictures are painted with; of a distilled base, what was trained with, too."""
    control_mode: int | None
    """Of a union ControlNet, the mode that was trained."""
    step: int
    data: str | None
    """A sentence about the training data."""
    fingerprints: Mapping[str, str]
    """Layers of the cache to their fingerprints."""
    options: Mapping[str, Any]
    """The run's options by full name."""
    held_out: Mapping[str, float]
    """Figures of the last look at the held-out samples, and the "step" it was at; empty where there was none."""
    versions: Mapping[str, str]
    pictures: tuple[str, ...]
    """Paths below the card."""
    single_file: str | None
    """The file for programs that take one file; None where they cannot read this ControlNet."""
    objective: Mapping[str, str] = field(default_factory=dict)
    """What the objective says of itself: titles and values."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the pipeline's scheduler that training has changed."""
    drawing_argument: str = "image"
    """What the pipeline calls the drawing."""
    distilled: bool = False
    """Whether the base is told the guidance, instead of being called twice."""
    adapter: str = "controlnet"
    """What it is."""
    base_class: str = ""
    """diffusers' class of a whole base, and where it is in a pipeline."""
    base_component: str = ""
    averaged: bool = False
    """Whether the weights are their average over training."""
    looked_at_average: bool = False
    """Whether figures and pictures are that average's."""


def model_card(card: Card) -> str:
    """The card as Markdown with its metadata."""
    relation = "finetune" if card.adapter == "full" else "adapter"
    metadata: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **({"base_model": card.base, "base_model_relation": relation} if card.on_hub else {}),
        **card.licence,
        "tags": [*([] if card.adapter == "full" else [card.adapter]), *card.conditions],
    }
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {card.name}",
        f"{_what(card)}: {card.num_parameters:,} parameters in {card.dtype}.",
        *(f"![]({picture})" for picture in card.pictures),
        "## Use",
        f"```python\n{_code(card)}\n```",
        _files(card),
        "## Training",
        _table(card),
        _figures(card),
        "## Data",
        card.data or "The author has not said what it was trained on.",
        _fingerprints(card),
        "## Licence",
        _licence(card),
        "Trained with Underdrawing (" + ", ".join(f"{name} {text}" for name, text in card.versions.items()) + ").",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(card: Card) -> str:
    if card.adapter == "lora":
        text = " and its text encoder" if card.options.get("lora.train_text_encoder") else ""
        return f"A LoRA of rank {card.options.get('lora.rank', '?')} for {_base(card)}{text}"
    if card.adapter == "full":
        return f"{_base(card)}, all of its weights trained further"
    condition = " or ".join(card.conditions)
    kind = " drawings: white lines on black" if {*card.conditions} <= _LINES else " pictures"
    blocks = ""
    if any(card.depth):
        blocks = f". It has {card.depth[0]} double and {card.depth[1]} single blocks"
    return f"A ControlNet for {_base(card)} that follows {condition}{kind}{blocks}"


def _base(card: Card) -> str:
    return f"[{card.base}](https://huggingface.co/{card.base})" if card.on_hub else f"`{card.base}`"


def _code(card: Card) -> str:
    """A program that paints one picture."""
    width, height = min(card.sizes, key=lambda size: (abs(math.log(size[0] / size[1])), -size[0]))  # the squarest
    if card.adapter != "controlnet":
        return _plain_code(card, width, height)
    mode = "" if card.control_mode is None else f"control_mode={card.control_mode}, "
    length = "" if card.text_length is None else f"\n    max_sequence_length={card.text_length},"
    classes = [card.controlnet_class, card.pipeline_class, *(["DDIMScheduler"] if card.scheduler else [])]
    return f"""\
import torch
from diffusers import {", ".join(sorted(classes))}
from diffusers.utils import load_image

controlnet = {card.controlnet_class}.from_pretrained("{REPO}", torch_dtype=torch.bfloat16)
pipeline = {card.pipeline_class}.from_pretrained(
    "{card.base}", controlnet=controlnet, torch_dtype=torch.bfloat16
).to("cuda"){_rescheduled(card)}
picture = pipeline(
    "what to paint",
    {card.drawing_argument}=load_image("drawing.png"),
    width={width},
    height={height},
    {mode}controlnet_conditioning_scale=1.0,
    control_guidance_end=1.0,
    num_inference_steps=28,
    guidance_scale={card.guidance:g},{length}
).images[0]
picture.save("picture.png")"""


def _rescheduled(card: Card) -> str:
    """The line that gives the pipeline the scheduler that it was trained for, where that is not its own."""
    changed = ", ".join(f"{name}={value!r}" for name, value in card.scheduler.items())
    line = f"pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, {changed})"
    return f"\n{line}" if changed else ""


def _plain_code(card: Card, width: int, height: int) -> str:
    """A program that paints from words alone."""
    classes = ["DiffusionPipeline", *(["DDIMScheduler"] if card.scheduler else [])]
    if card.adapter == "lora":
        load = f"""\
pipeline = DiffusionPipeline.from_pretrained("{card.base}", torch_dtype=torch.bfloat16)
pipeline.load_lora_weights("{REPO}")
pipeline.to("cuda")"""
    else:
        classes.append(card.base_class)
        load = f"""\
trained = {card.base_class}.from_pretrained("{REPO}", torch_dtype=torch.bfloat16)
pipeline = DiffusionPipeline.from_pretrained(
    "{card.base}", {card.base_component}=trained, torch_dtype=torch.bfloat16
).to("cuda")"""
    return f"""\
import torch
from diffusers import {", ".join(sorted(classes))}

{load}{_rescheduled(card)}
picture = pipeline("what to paint", width={width}, height={height}, num_inference_steps=28).images[0]
picture.save("picture.png")"""


def _files(card: Card) -> str:
    if card.single_file is None:
        return ""
    if card.adapter == "lora":
        return f"For ComfyUI, put `{card.single_file}` into `models/loras` and load it with *Load LoRA*."
    return (
        f"For ComfyUI, put `{card.single_file}` into `models/controlnet` and load it with *Load ControlNet Model*; "
        "*Apply ControlNet* takes the base's VAE beside it."
    )


def _table(card: Card) -> str:
    sizes = ", ".join(f"{width} x {height}" for width, height in card.sizes)
    rows = [("Steps", f"{card.step:,}"), ("Sizes (width x height, pixels)", sizes)]
    rows += [("Weights", "their average over training (EMA)")] if card.averaged else []
    rows += [] if card.text_length is None else [("Text tokens", str(card.text_length))]
    rows += [("Guidance while training", f"{card.guidance:g}")] if card.distilled else []
    rows += [(title, str(card.options[name])) for title, name in _OPTIONS if name in card.options]
    rows += card.objective.items()
    return "\n".join(["| | |", "|---|---|", *(f"| {title} | {text} |" for title, text in rows)])


def _figures(card: Card) -> str:
    figures = _FIGURES if card.adapter == "controlnet" else _PLAIN_FIGURES
    known = [(text, card.held_out[name]) for name, text in figures if name in card.held_out]
    if not known:
        return "No samples were held out, so there are no figures about pictures that it has not seen."
    whose = ""
    if card.averaged != card.looked_at_average:
        whose = ", of the weights' average over training" if card.looked_at_average else ", of the weights themselves"
        whose += ", which is not what is here" if card.looked_at_average else ", not of their average"
    lines = [f"On samples that were held out, at step {card.held_out['step']:g}{whose}:", ""]
    return "\n".join([*lines, "| | |", "|---|---|", *(f"| {text} | {figure:.4f} |" for text, figure in known)])


def _fingerprints(card: Card) -> str:
    if not card.fingerprints:
        return ""
    named = ", ".join(f"{layer} `{fingerprint[:8]}`" for layer, fingerprint in card.fingerprints.items())
    return f"Fingerprints of the cache it was trained from: {named}."


def _licence(card: Card) -> str:
    name = card.licence.get("license_name", card.licence["license"])
    link = card.licence.get("license_link")
    made = "made from the first blocks of" if card.adapter == "controlnet" else "trained on"
    if name == "unknown":
        it = "this ControlNet" if card.adapter == "controlnet" else "it"
        return f"{made.capitalize()} {_base(card)}, whose licence governs {it}, too."
    return f"{f'[{name}]({link})' if link else name}. It is {made} {_base(card)}, whose licence governs it, too."
