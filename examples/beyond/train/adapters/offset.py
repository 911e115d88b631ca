"""One vector for each linear of the frozen base, added to what comes out of it: as BitFit (arXiv 2106.10199) trains
biases alone, beside the base's own, so that they may stay in int8.

N output features of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.families.base import Family, Inputs
from shared.model_folder import ModelFolder
from train.adapters.base import Adapter, Attach, Start
from train.frozen_linear import FrozenInt8Linear

if TYPE_CHECKING:
    from train.config import TrainConfig


@dataclass(frozen=True)
class OffsetOptions:
    """What the vectors are, with `adapter offset`."""

    scale: float = 1.0
    """What the vectors are multiplied with: above 1 they move faster at the same learning rate."""

    def check(self) -> None:
        """Refuse impossible values."""
        if self.scale <= 0:
            raise UserError(f"offset.scale must be above 0, but is {self.scale}")


class Offsets(torch.nn.Module):
    """The vectors of a base, and the base that they act on, which is no part of it."""

    def __init__(self, family: Family, base: torch.nn.Module, weights: torch.dtype, scale: float) -> None:
        """Zero at first. The base's blocks are watched from now on."""
        super().__init__()
        self.family, self.on, self.scale = family, True, scale
        self.__dict__["base"] = base  # seen, not owned: its weights are not trained
        self.names: list[str] = []
        self.vectors = torch.nn.ParameterList()
        blocks = set(family.blocks(base))
        for prefix, block in [(name, module) for name, module in base.named_modules() if module in blocks]:
            for name, linear in block.named_modules(prefix=prefix):
                if isinstance(linear, (torch.nn.Linear, FrozenInt8Linear)):
                    device = next(base.parameters()).device
                    self.names.append(name)
                    self.vectors.append(torch.zeros(linear.out_features, dtype=weights, device=device))
                    linear.register_forward_hook(self._hook(len(self.names) - 1))

    def _hook(self, index: int) -> Any:
        def add(linear: torch.nn.Module, taken: Any, given: torch.Tensor) -> torch.Tensor:
            return given + self.scale * self.vectors[index].to(given.dtype) if self.on else given

        return add

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, guidance: float) -> torch.Tensor:
        """The base's prediction, with the vectors where they are on."""
        return self.family.predict(self.__dict__["base"], x_t, t, inputs, guidance, None)


class OffsetAdapter(Adapter):
    """The vectors, and the frozen base."""

    name = "offset"
    Options = OffsetOptions
    folder = "offset"
    weights_file = "offset.safetensors"
    config_file = None
    title = "offsets"
    conditioned = False

    def __init__(self, family: Family, base: torch.nn.Module, weights: torch.dtype, scale: float) -> None:
        self.family, self.base, self.guidance = family, base, 1.0
        self.offsets = Offsets(family, base, weights, scale)
        self.trained = self.bare = self.module = self.offsets

    @classmethod
    def precision(cls, options: TrainConfig, compute: torch.dtype) -> torch.dtype:
        return torch.float32  # they are few

    @classmethod
    def guidance_of(cls, options: TrainConfig) -> float:
        return 1.0

    @classmethod
    def refuse(cls, options: TrainConfig, family: Family, model: ModelFolder | None) -> None:
        if options.base.weights == "quanto":
            raise UserError("adapter offset knows no layers of quanto's: set --base.weights int8 or none")

    @classmethod
    def depth(cls, options: TrainConfig, family: Family, saved: Path | None) -> tuple[int, int]:
        return 0, 0

    @classmethod
    def run_name(cls, options: TrainConfig, family: Family | None = None) -> str:
        return "offset"

    @classmethod
    def begin(cls, start: Start) -> Attach:
        scale = getattr(start.options, cls.name).scale
        return lambda base: cls(start.family, base, start.weights, scale)

    @classmethod
    def empty(cls, family: Family, base: torch.nn.Module, like: Any, weights: torch.dtype) -> OffsetAdapter:
        return cls(family, base, weights, 1.0)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, scale: float = 1.0) -> torch.Tensor:
        assert scale == 1.0, "it acts as it was trained"
        module = self.module if torch.is_grad_enabled() else self.bare
        return module(x_t, t, inputs, self.guidance)

    def predict_without(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        self.offsets.on = False
        try:
            return self.bare(x_t, t, inputs, self.guidance)
        finally:
            self.offsets.on = True

    def write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A vector for each linear, by the linear's name."""
        folder.mkdir(parents=True, exist_ok=True)
        ours = self.trained.state_dict()
        named = {
            name: tensors.get(f"vectors.{i}", ours[f"vectors.{i}"]).detach().cpu().contiguous()
            for i, name in enumerate(self.offsets.names)
        }
        save_file(named, folder / self.weights_file)
        return named

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        saved = load_file(folder / self.weights_file)
        return {f"vectors.{i}": saved[name] for i, name in enumerate(self.offsets.names)}


ADAPTER = OffsetAdapter
