"""A ControlNet: the base's first blocks, trained to turn a condition into residuals for the frozen base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from shared.errors import UserError
from shared.families.base import Family, Inputs
from shared.model_folder import ModelFolder
from train.adapters.base import Adapter, Attach, Precision, Start, precision_named

if TYPE_CHECKING:
    from train.config import TrainConfig

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
    weights: Precision = "auto"
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


class ControlNetAdapter(Adapter):
    """The ControlNet with its frozen base: predicts with and without it."""

    name: ClassVar[str] = "controlnet"
    folder = "controlnet"
    weights_file: ClassVar[str] = WEIGHTS
    title: ClassVar[str] = "ControlNet"
    conditioned: ClassVar[bool] = True
    spreads_base: ClassVar[bool] = True
    shares_base: ClassVar[bool] = True

    def __init__(
        self, family: Family, base: torch.nn.Module, controlnet: torch.nn.Module, options: ControlNetOptions
    ) -> None:
        self.family, self.base, self.options = family, base, options
        self.controlnet = self.trained = self.bare = self.module = controlnet
        self.guidance = options.guidance

    @classmethod
    def precision(cls, options: TrainConfig, compute: torch.dtype) -> torch.dtype:
        return precision_named(options.controlnet.weights, compute, compute, "controlnet.weights")

    @classmethod
    def guidance_of(cls, options: TrainConfig) -> float:
        return options.controlnet.guidance

    @classmethod
    def refuse(cls, options: TrainConfig, family: Family, model: ModelFolder | None) -> None:
        from train.config import TrainConfig  # which is made of this file's options

        if not family.has_depths and options.depth != TrainConfig.depth:
            raise UserError(
                f"DEPTH {options.depth}: a ControlNet of {family.name} is the first half of its base, at no other "
                "depth; leave DEPTH out"
            )
        depth, deepest = parse_depth(options.depth), family.max_depth(model)
        if (
            family.has_depths
            and options.controlnet.start_from is None
            and (depth[0] > deepest[0] or depth[1] > deepest[1])
        ):
            name = family.default_model if model is None else model.name
            raise UserError(
                f"DEPTH {options.depth} is deeper than the base: {name} has {deepest[0]}-{deepest[1]} blocks to start "
                "from"
            )

    @classmethod
    def depth(cls, options: TrainConfig, family: Family, saved: Path | None) -> tuple[int, int]:
        """As asked for, or as the one has it that is gone on with."""
        if not family.has_depths:
            return 0, 0
        if (start := options.controlnet.start_from) is None:
            return parse_depth(options.depth)
        return family.controlnet_depth(start if saved is None else str(saved))

    @classmethod
    def run_name(cls, options: TrainConfig, family: Family | None = None) -> str:
        if (start := options.controlnet.start_from) is not None:
            return f"from-{Path(start).name}"
        return f"depth-{options.depth}" if family is None or family.has_depths else cls.name

    @classmethod
    def unused(cls, options: TrainConfig) -> list[str]:
        ours = options.controlnet
        without_effect = ours.start_from is not None and ours.embedder != ControlNetOptions.embedder
        return ["controlnet.embedder"] if without_effect else []

    @classmethod
    def begin(cls, start: Start) -> Attach:
        """The ControlNet is there before the base is: an int8 base has no weights to copy."""
        options, family = start.options.controlnet, start.family
        if options.start_from is None:
            depth = cls.depth(start.options, family, None)
            controlnet = family.make_controlnet(start.model, *depth, options.embedder, start.weights)
        else:  # it may since have been moved: a run that goes on has its own copy
            controlnet = family.load_controlnet(
                options.start_from if start.saved is None else str(start.saved), start.weights
            )
            family.check_controlnet(controlnet, family.make_base(start.model), options.control_mode)
        controlnet.to(device=start.device, dtype=start.weights).train()
        return lambda base: cls(family, base, controlnet, options)

    @classmethod
    def empty(cls, family: Family, base: torch.nn.Module, like: Any, weights: torch.dtype) -> ControlNetAdapter:
        num_layers, num_single_layers = like.depth
        controlnet = family.make_empty_controlnet(num_layers, num_single_layers, like.model).to(weights)
        return cls(family, base, controlnet.requires_grad_(True).train(), ControlNetOptions())

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, scale: float = 1.0) -> torch.Tensor:
        """Under the control of `inputs.condition`."""
        with self.autocast(x_t):
            residuals = self.family.residuals(
                self.called, x_t, t, inputs, self.options.guidance, self.options.control_mode, scale
            )
        residuals = tuple(
            None if group is None else [residual.to(x_t.dtype) for residual in group] for group in residuals
        )
        return self.family.predict(self.base, x_t, t, inputs, self.options.guidance, residuals)

    def predict_without(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.family.predict(self.base, x_t, t, inputs, self.options.guidance, None)

    @property
    def has_idle_parameters(self) -> bool:
        return self.family.has_idle_parameters(self.base, self.controlnet)

    @property
    def with_blocks(self) -> torch.nn.Module:
        return self.controlnet

    def save(self, folder: Path) -> dict[str, torch.Tensor]:
        """`FluxControlNetModel.from_pretrained(folder)` reads it. What comes back is on the device."""
        self.controlnet.save_pretrained(folder, max_shard_size="1TB")  # type: ignore[operator]
        return self.controlnet.state_dict()

    def write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return write_model(self.controlnet, folder, tensors)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        return read_model(folder)


def write_model(module: torch.nn.Module, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write `tensors` as diffusers writes `module`, what of it is not among them as it is. Back comes what was to be
    written."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    module.save_config(folder)  # type: ignore[operator]
    whole = {
        name: tensors.get(name, tensor).detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    return whole


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    """What diffusers, or `write_model`, has written into a folder."""
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


ADAPTER = ControlNetAdapter
