"""A ControlNet: the base's first blocks, trained to turn a condition into residuals for the frozen base."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from shared.errors import UserError
from shared.families.base import Family, Inputs

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class ControlNetOptions:
    """What the ControlNet starts from and how it is held."""

    embedder: Literal["copy", "zero"] = "copy"
    """How the condition enters: through a copy of the base's own input layer, or through zeros as diffusers does it.
    With zeros at both ends no gradient reaches the condition at first. Step 0 is an exact no-op either way."""
    start_from: str | None = None
    """Go on training an existing ControlNet (a folder or a hub id); its depth then decides, not `depth`."""
    control_mode: int | None = None
    """Which mode of a union ControlNet to train; only together with `start_from`."""
    weights: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the trained weights. auto: bf16 with stochastic rounding on a GPU, fp32 on the CPU. fp32 costs
    twice the memory; on a GPU it is then computed in bf16 by autocast."""
    guidance: float = 3.5
    """Guidance that the distilled base is told during training; 3.5 is what it is mostly used with."""

    def check(self) -> None:
        """Refuse impossible values."""
        if self.control_mode is not None and self.start_from is None:
            raise UserError("controlnet.control_mode needs controlnet.start_from: only a union ControlNet has modes")
        if self.guidance < 0:
            raise UserError(f"controlnet.guidance must not be negative, but is {self.guidance}")


def parse_depth(depth: str) -> tuple[int, int]:
    """ "2-4" -> (num_layers, num_single_layers) = (2, 4). Raises `UserError`."""
    match = re.fullmatch(r"([0-9]+)-([0-9]+)", depth)
    if match is None or int(match[1]) + int(match[2]) == 0:
        raise UserError(
            f"DEPTH is num_layers-num_single_layers, for example 2-4 (1.35 B parameters on FLUX.1-dev), not '{depth}'"
        )
    return int(match[1]), int(match[2])


class ControlNetAdapter:
    """The ControlNet with its frozen base: predicts with and without it."""

    def __init__(
        self, family: Family, base: torch.nn.Module, controlnet: torch.nn.Module, options: ControlNetOptions
    ) -> None:
        self.family, self.base, self.options = family, base, options
        self.controlnet = controlnet
        """The bare module: what is saved and counted."""
        self.module = controlnet
        """What is called: the bare module, or its wrapper for several processes."""

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, scale: float = 1.0) -> torch.Tensor:
        """Prediction (B, T, C) under the control of `inputs.condition`."""
        # Looking at held-out samples is one process's business: the wrapper would have all of them take part.
        module = self.module if torch.is_grad_enabled() else self.controlnet
        with self._autocast(x_t):
            residuals = self.family.residuals(
                module, x_t, t, inputs, self.options.guidance, self.options.control_mode, scale
            )
        residuals = tuple(
            None if group is None else [residual.to(x_t.dtype) for residual in group] for group in residuals
        )
        return self.family.predict(self.base, x_t, t, inputs, self.options.guidance, residuals)

    def predict_without(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Prediction (B, T, C) of the base alone."""
        return self.family.predict(self.base, x_t, t, inputs, self.options.guidance, None)

    @property
    def has_idle_parameters(self) -> bool:
        """Whether some parameters never get a gradient."""
        return self.family.has_idle_parameters(self.base, self.controlnet)

    def _autocast(self, x_t: torch.Tensor) -> AbstractContextManager[object]:
        """fp32 weights with bf16 activations: computed in bf16, gradients arrive in fp32."""
        weights = next(self.controlnet.parameters()).dtype
        if weights == x_t.dtype:
            return nullcontext()
        return torch.autocast(x_t.device.type, dtype=x_t.dtype)

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What the optimizer moves."""
        return [(name, parameter) for name, parameter in self.controlnet.named_parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> dict[str, torch.Tensor]:
        """Write the ControlNet as diffusers does: `FluxControlNetModel.from_pretrained(folder)` reads it. Back comes
        what was to be written: the weights by name, on the device."""
        self.controlnet.save_pretrained(folder, max_shard_size="1TB")  # type: ignore[operator]
        return self.controlnet.state_dict()

    def load(self, folder: Path) -> None:
        """Put saved weights back in place. Raises `UserError` where they are another ControlNet's."""
        from safetensors.torch import load_file

        saved = load_file(folder / WEIGHTS)
        ours = self.controlnet.state_dict()
        if {name: tensor.shape for name, tensor in saved.items()} != {name: t.shape for name, t in ours.items()}:
            raise UserError(f"{folder} holds a ControlNet of another shape than this run's; choose another NAME")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(saved[name])
