"""A base and a ControlNet of FLUX's real classes, small, made in memory, with data of their shapes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel

from shared.families.base import Batch
from tests.train.conftest import flux
from train.adapters.controlnet import ControlNetAdapter, ControlNetOptions
from train.frozen_linear import FrozenInt8Linear

SIZES: dict[str, Any] = {
    "in_channels": 64, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
    "pooled_projection_dim": 24, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
NUM_BLOCKS, NUM_CONTROLNET_BLOCKS = 6, 4


def adapter_of(*, int8: bool = True) -> ControlNetAdapter:
    """A base of 2 double and 4 single blocks, frozen, and a ControlNet 2-2 whose outputs are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        base = FluxTransformer2DModel(num_layers=2, num_single_layers=4, **SIZES).eval().requires_grad_(False)
        controlnet = FluxControlNetModel(num_layers=2, num_single_layers=2, **SIZES)
        with torch.no_grad():
            for parameter in controlnet.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    if int8:
        for block in flux().blocks(base):
            for name, layer in list(block.named_modules()):
                if isinstance(layer, torch.nn.Linear):
                    parent, _, child = name.rpartition(".")
                    setattr(block.get_submodule(parent), child, FrozenInt8Linear.from_float(layer))
    return ControlNetAdapter(flux(), base, controlnet, ControlNetOptions())


def batch_of(B: int = 2, size: int = 64, seed: int = 0) -> Batch:
    """Random latents and embeddings of B samples, `size` pixels high and wide."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "latents.mean": (B, 16, size // 8, size // 8), "condition_latents.mean": (B, 16, size // 8, size // 8),
        "t5.prompt_embeds": (B, 5, 32), "clip.pooled_prompt_embeds": (B, 24),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return Batch([str(i) for i in range(B)], size, size, tensors, step_samples=B)


def times_of(batch: Batch) -> torch.Tensor:
    """t (B,), from 0.2 to 0.8."""
    return torch.linspace(0.2, 0.8, len(batch))


def predicted(adapter: ControlNetAdapter, batch: Batch) -> torch.Tensor:
    """The prediction (B, T, C) for the batch's latents, under control."""
    recipe = {"shift": 0.1, "scale": 0.4}
    x_t, condition = (
        flux().model_latents(batch.role(role), recipe, None, torch.float32) for role in ("latents", "condition_latents")
    )
    return adapter.predict(x_t, times_of(batch), flux().inputs(batch, condition, torch.float32))


def gradients(adapter: ControlNetAdapter, *batches: Batch) -> dict[str, torch.Tensor]:
    """Of the mean square of the predictions for all batches, by parameter; and the prediction for the last one."""
    adapter.controlnet.zero_grad()
    for batch in batches or (batch_of(),):
        prediction = predicted(adapter, batch)
        prediction.square().mean().backward()
    found = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    return {**found, "prediction": prediction.detach()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal to the bit, and not nothing."""
    assert one.keys() == other.keys()
    assert len(one) > 50
    assert all(tensor.abs().sum() > 0 for tensor in one.values())
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
