"""Drawings and prompts to pictures: diffusers' pipeline of a family, with a ControlNet in it.

Which pipeline it is, what it calls the drawing and what it is loaded with, the family says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shared.families.base import Family, Order, Paint
from shared.families.parts.controlnet_folder import controlnet_folder
from shared.model_folder import ModelFolder

_SHARE = 0.8
"""Of a GPU's memory that all of a pipeline's weights may take together: pictures need the rest."""


def open_painter(
    family: Family,
    model: ModelFolder,
    controlnet: Path,
    device: str,
    dtype: torch.dtype,
    told: Callable[[Order], dict[str, Any]] = lambda order: {},
) -> Paint:
    """`Family.open_painter`. `told`: what the family's pipeline is told of an order that others are not."""
    import diffusers

    trained = getattr(diffusers, family.controlnet_class).from_pretrained(
        controlnet_folder(str(controlnet)), dtype=dtype
    )
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
        model.path, controlnet=trained, dtype=dtype, **family.pipeline_options
    )
    pipeline.set_progress_bar_config(disable=None)
    place(pipeline, device)
    own = pipeline.scheduler

    def paint(order: Order) -> list[NDArray[np.uint8]]:
        height, width = order.drawings[0].shape[:2]
        pipeline.scheduler = family.scheduler_for(own, order.scheduler)
        pictures = pipeline(
            prompt=order.prompts,
            height=height,
            width=width,
            num_inference_steps=order.num_steps,
            guidance_scale=order.guidance,
            controlnet_conditioning_scale=order.scale,
            control_guidance_start=order.control_start,
            control_guidance_end=order.control_end,
            generator=[torch.Generator().manual_seed(seed) for seed in order.seeds],
            **{family.drawing_argument: [Image.fromarray(drawing) for drawing in order.drawings]},
            **told(order),
        ).images
        return [np.asarray(picture) for picture in pictures]

    return paint


def place(pipeline: Any, device: str) -> None:
    """Put a pipeline on its device: one component at a time where not all fit, as FLUX.1-dev with T5, 34 GB."""
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    needed = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    of_gpu = torch.device(device).type == "cuda"  # which may have a number
    if of_gpu and needed > _SHARE * torch.cuda.get_device_properties(torch.device(device)).total_memory:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
