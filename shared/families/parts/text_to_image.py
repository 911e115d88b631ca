"""Prompts to pictures: diffusers' own pipeline of a family, which paints what the model knows. Training never loads it.

A picture is a function of the model, of what it is asked for and of its seed: each is painted alone, since kernels
round by the size of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shared.families.base import Family
from shared.families.parts.painter import place
from shared.model_folder import ModelFolder


@dataclass(frozen=True)
class Wish:
    """What a picture shall be."""

    prompt: str
    width: int
    """Pixels."""
    height: int
    num_steps: int
    guidance: float
    text_length: int
    """Text tokens, where the pipeline has a choice."""


PaintText = Callable[[Wish, int], NDArray[np.uint8]]
"""A wish and a seed -> uint8 (H, W, 3)."""


def open_text_to_image(family: Family, model: ModelFolder, device: str, dtype: torch.dtype) -> PaintText:
    """Load the whole pipeline of a family that has one. Dropping what comes back frees it."""
    import diffusers

    facts = family.text_to_image
    assert facts is not None, f"{family.name} has no pipeline that paints from text alone"
    pipeline = getattr(diffusers, facts.pipeline).from_pretrained(model.path, dtype=dtype, **family.pipeline_options)
    pipeline.set_progress_bar_config(disable=True)
    place(pipeline, device)
    length = facts.text_length

    def paint(wish: Wish, seed: int) -> NDArray[np.uint8]:
        pictures = pipeline(
            prompt=wish.prompt,
            width=wish.width,
            height=wish.height,
            num_inference_steps=wish.num_steps,
            guidance_scale=wish.guidance,
            generator=torch.Generator().manual_seed(seed),
            **({} if length is None else {length: wish.text_length}),
        ).images
        return np.asarray(pictures[0].convert("RGB"))

    return paint
