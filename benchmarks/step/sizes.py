"""What is measured on: FLUX.1-dev's architecture, or one of a few thousand parameters, and what a step on it costs.

Operations are those of the matrix products and the attention, two for a multiplication with its addition; attention's
backward counts 2.5 forwards, as its kernels compute scores again. What is recomputed is work of the machine, not of
the model, and is counted apart.

Letters: D width of the model, T image tokens, L text tokens, S = T + L.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Size:
    """An architecture, with the encoders before it."""

    name: str
    num_layers: int
    """Double blocks."""
    num_single_layers: int
    num_heads: int
    head_dim: int
    text_dim: int
    """Of T5's embeddings."""
    pooled_dim: int
    rope: tuple[int, int, int]
    t5_layers: int
    clip_layers: int
    vae_channels: tuple[int, int, int, int]

    @property
    def width(self) -> int:
        """D."""
        return self.num_heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """Of the transformer, as diffusers takes it; a ControlNet takes it too."""
        return {
            "in_channels": 64,
            "num_layers": self.num_layers,
            "num_single_layers": self.num_single_layers,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.num_heads,
            "joint_attention_dim": self.text_dim,
            "pooled_projection_dim": self.pooled_dim,
            "guidance_embeds": True,
            "axes_dims_rope": list(self.rope),
        }


FULL = Size("FLUX.1-dev", 19, 38, 24, 128, 4096, 768, (16, 56, 56), 24, 12, (128, 256, 512, 512))
TINY = Size("tiny", 2, 3, 2, 16, 32, 24, (4, 6, 6), 1, 1, (8, 8, 8, 8))
SIZES = {size.name: size for size in (FULL, TINY)}


@dataclass(frozen=True)
class Flops:
    """Operations of one step, by part."""

    controlnet_forward: float
    base_forward: float
    base_backward: float
    """Gradients of activations alone; the first block needs none."""
    controlnet_backward: float
    recomputed: float = 0.0

    @property
    def model(self) -> float:
        """What the method asks for."""
        return self.controlnet_forward + self.base_forward + self.base_backward + self.controlnet_backward

    @property
    def machine(self) -> float:
        """What is carried out."""
        return self.model + self.recomputed

    @property
    def base_forwards(self) -> float:
        """The step in forwards of the base: the floor of its time."""
        return self.model / self.base_forward


def flops(
    size: Size,
    depth: tuple[int, int],
    resolution: int,
    text_length: int,
    batch: int = 1,
    recomputed: tuple[int, int] = (0, 0),
) -> Flops:
    """Operations of one step on `batch` square pictures. `recomputed`: blocks of the base and of the ControlNet whose
    forward is done twice. Within 1 % of what PyTorch's counter finds on the real model."""
    D, T, L = size.width, (resolution // 16) ** 2, text_length
    S = T + L

    def linear(num_blocks: int) -> float:
        return 2.0 * 12 * D * D * S * num_blocks

    def attention(num_blocks: int) -> float:
        return 4.0 * S * S * D * num_blocks

    num_base, num_controlnet = size.num_layers + size.num_single_layers, sum(depth)
    modulation = 2.0 * D * D * (12 * size.num_layers + 3 * size.num_single_layers + 2)
    text, image = 2.0 * size.text_dim * D * L, 2.0 * 64 * D * T
    outputs = 2.0 * D * D * T * num_controlnet
    # Without single blocks the last double block's text half feeds nothing behind its attention.
    idle = 0.0 if depth[1] else 2 * 2.0 * 9 * D * D * L
    return Flops(
        controlnet_forward=batch * (linear(num_controlnet) + attention(num_controlnet) + outputs + text + 2 * image),
        base_forward=batch * (linear(num_base) + attention(num_base) + modulation + text + 2 * image),
        base_backward=batch * (linear(num_base - 1) + 2.5 * attention(num_base - 1)),
        controlnet_backward=batch
        * (2 * linear(num_controlnet) + 2.5 * attention(num_controlnet) + 2 * outputs + text + 2 * image - idle),
        recomputed=batch * (linear(sum(recomputed)) + attention(sum(recomputed))),
    )
