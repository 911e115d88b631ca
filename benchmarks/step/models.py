"""Models of the real classes and the full size with random weights, made on the device: nothing is downloaded, and the
host never holds one.

Weights have the variance that keeps activations at one, gates are open and no output is zero: arithmetic on zeros is
faster than any training will be (the same product of 8192 x 8192 matrices by 13 % on an H200). Each tensor is drawn
from its own name, so that every way of holding the base holds the same base.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.step.sizes import Size
from shared import families
from shared.model_folder import ModelFolder
from train import modulation
from train.quantize import Weights, frozen, quantize_block

_OUTPUTS = ("controlnet_blocks.", "controlnet_single_blocks.")
_MODULATIONS = ("norm.linear.", "norm1.linear.", "norm1_context.linear.")


@dataclass
class Base:
    """The frozen base, and its modulation's linears on the host where they were taken out of it."""

    module: torch.nn.Module
    taken: dict[str, torch.nn.Linear]


def make_base(
    size: Size, device: torch.device, dtype: torch.dtype, weights: Weights = "none", *, hoist: bool = False,
    plain: bool = False,
) -> Base:  # fmt: skip
    """The base on the device, held as `weights` says (train/quantize.py), one block after the other: the device never
    has the whole of it unquantized. `plain`: the library's own model, without what this project's families change."""
    base = empty_base(size, dtype, plain=plain)
    taken = modulation.hoist(families.get("flux"), base) if hoist else {}
    for name, part in _parts(base):
        _materialise(part, name, device)
        if weights != "none" and "blocks." in name:
            quantize_block(part, weights)
    for name, linear in taken.items():
        _materialise(linear, name, device)
        linear.cpu()
    return Base(frozen(base), taken)


def make_controlnet(
    size: Size, depth: tuple[int, int], device: torch.device, dtype: torch.dtype, *, plain: bool = False
) -> torch.nn.Module:
    """A ControlNet whose outputs are not zero, as after some training."""
    from diffusers import FluxControlNetModel

    if plain:
        config = {**size.config(), "num_layers": depth[0], "num_single_layers": depth[1]}
        controlnet = _on_meta(lambda: FluxControlNetModel(**config), dtype)
    else:
        with _configured(size) as model:
            controlnet = families.get("flux").make_empty_controlnet(*depth, model).to(dtype)
    for name, part in _parts(controlnet):
        _materialise(part, f"controlnet.{name}", device)
    return controlnet.requires_grad_(True).train()


def empty_base(size: Size, dtype: torch.dtype, *, plain: bool = False) -> torch.nn.Module:
    """The base without memory."""
    from diffusers import FluxTransformer2DModel

    if plain:
        return _on_meta(lambda: FluxTransformer2DModel(**size.config()), dtype)
    with _configured(size) as model:
        return families.get("flux").make_base(model).to(dtype)


@contextmanager
def _configured(size: Size) -> Iterator[ModelFolder]:
    """A model of which there is the configuration alone."""
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        component = Path(folder, "transformer")
        component.mkdir()
        (component / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **size.config()}))
        yield ModelFolder(size.name, None, Path(folder))


def _parts(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The model's children under their names, lists of blocks block by block."""
    for name, child in model.named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield from ((f"{name}.{i}", block) for i, block in enumerate(child))
        else:
            yield name, child


def _on_meta(make: Callable[[], Any], dtype: torch.dtype) -> torch.nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model: torch.nn.Module = make()
    finally:
        torch.set_default_dtype(before)
    assert not list(model.buffers()), "buffers have values that their weights' names do not say"
    assert not list(model.parameters(recurse=False)), "a parameter outside all children would be left without memory"
    return model


@torch.no_grad()
def _materialise(part: torch.nn.Module, name: str, device: torch.device) -> None:
    part.to_empty(device=device)
    for inner, parameter in part.named_parameters():
        _draw(f"{name}.{inner}", parameter)


def _draw(name: str, parameter: torch.nn.Parameter) -> None:
    generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
    modulation = any(name.endswith((f"{m}weight", f"{m}bias")) for m in _MODULATIONS)
    if parameter.ndim == 1:
        if name.endswith("bias"):
            parameter.normal_(0, 0.4 if modulation else 0.02, generator=generator)
        else:
            parameter.normal_(1, 0.02, generator=generator)  # of a norm
        return
    deviation = parameter[0].numel() ** -0.5
    if modulation or any(output in name for output in _OUTPUTS):
        deviation *= 0.1
    parameter.normal_(0, deviation, generator=generator)
