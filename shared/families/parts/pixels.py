"""A condition in pixels: its drawings as they are, for ControlNets that take pictures. No encoder has a say in it, so
the preprocessing stage makes this layer itself.

B samples, R drawings of each, C channels: 1 where a condition draws in grey, else 3. H W pixels.
"""

from __future__ import annotations

import torch

from shared.cache.schema import Field
from shared.families.base import LayerKind

FIELD = "pixels"

LAYER = LayerKind(
    "condition_pixels",
    "condition",
    (),
    (Field(FIELD, "uint8", "R C H W", "the R drawings of the sample; C is 1 where the condition is grey, else 3"),),
    shard_rows=256,
)


def picture(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (B, C, H, W) -> (B, 3, H, W) from 0 to 1, as diffusers' pipelines hand a control image to a ControlNet:
    not from -1 on, as the VAE has it. Rounded once."""
    return (pixels.float() / 255.0).to(dtype).expand(-1, 3, -1, -1)
