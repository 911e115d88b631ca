"""Random batches as a cache gives them, with the variance that a model's inputs have."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.step.sizes import Size
from shared.families.base import Batch

SHIFT, SCALE = 0.1159, 0.3611
"""Of FLUX.1-dev's VAE."""
RECIPES: dict[str, Any] = {role: {"shift": SHIFT, "scale": SCALE} for role in ("latents", "condition_latents")}


def make_batch(
    size: Size, batch: int, resolution: int, text_length: int, device: torch.device, dtype: torch.dtype,
    position: int, step_samples: int,
) -> Batch:  # fmt: skip
    """Batch number `position`, drawn from it, one of a step of `step_samples` samples."""
    generator = torch.Generator(device).manual_seed(1_000 + position)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator, device=device).to(dtype)

    latents = (16, resolution // 8, resolution // 8)
    tensors = {"t5.prompt_embeds": normal(text_length, size.text_dim)}
    tensors["clip.pooled_prompt_embeds"] = normal(size.pooled_dim)
    for role in ("latents", "condition_latents"):
        tensors[f"{role}.mean"] = normal(*latents) / SCALE + SHIFT
        tensors[f"{role}.std"] = torch.full_like(tensors[f"{role}.mean"], 0.05)
    return Batch(
        keys=[f"{position}-{i}" for i in range(batch)],
        height=resolution,
        width=resolution,
        tensors=tensors,
        step_samples=step_samples,
        position=position,
    )
