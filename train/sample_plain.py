"""Paint from words alone, with a LoRA or a base that was trained: what `train.sample` does where there is no drawing.

Through diffusers' own pipeline of the base, whatever its family: a LoRA is loaded into it, a base takes the place of
its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.families.base import Family
from shared.families.parts.painter import place
from shared.model_folder import ModelFolder
from train.adapters.base import Adapter

Picture = NDArray[np.uint8]
"""(H, W, 3)."""

PaintWords = Callable[[str, int, float], Picture]
"""Prompt, seed, and how strongly what was trained acts (of a base only 1) -> a picture."""


def open_words(
    family: Family,
    model: ModelFolder,
    adapter: type[Adapter],
    weights: Path,
    device: str,
    dtype: torch.dtype,
    *,
    size: tuple[int, int],
    num_steps: int,
    guidance: float,
    text_length: int | None,
    scheduler: Mapping[str, Any],
) -> PaintWords:
    """The base's pipeline with what is in the folder `weights`. `size`: (width, height) in pixels. `scheduler`: what
    training has changed of the model's scheduler."""
    import diffusers

    parts: dict[str, Any] = dict(family.pipeline_options)
    if not adapter.keeps_base:
        base_class = getattr(diffusers, family.base_class)
        parts[family.base_component] = base_class.from_pretrained(weights, dtype=dtype)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model.path, dtype=dtype, **parts)
    if adapter.keeps_base:
        pipeline.load_lora_weights(weights, adapter_name="trained")
    pipeline.set_progress_bar_config(disable=None)  # quiet where it is no terminal
    place(pipeline, device)
    own, changed = pipeline.scheduler, family.scheduler_for(pipeline.scheduler, scheduler)
    words: dict[str, Any] = {"width": size[0], "height": size[1], "num_inference_steps": num_steps}
    words["guidance_scale"] = guidance
    if text_length is not None and "max_sequence_length" in inspect.signature(pipeline.__call__).parameters:
        words["max_sequence_length"] = text_length

    def paint(prompt: str, seed: int, scale: float) -> Picture:
        if adapter.keeps_base:
            pipeline.set_adapters(["trained"], [scale])
        else:
            assert scale == 1.0, "there is no base to mix it with"
        pipeline.scheduler = changed if scale else own  # the base alone paints as it always has
        return np.asarray(pipeline(prompt, generator=torch.Generator().manual_seed(seed), **words).images[0])

    return paint
