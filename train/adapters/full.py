"""The base itself, all of its weights: the most that can be learned from a cache, and the most memory.

The base is in bf16 and is stepped there with stochastic rounding, or on a float32 master copy (`optimizer.master`).
For FLUX.1-dev that is 24 GB of weights, as much again of gradients unless they are released (`optimizer.release`), and
24 GB of moments in 8 bits, which may rest on the host (`optimizer.states cpu`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from shared.errors import UserError
from shared.families.base import Family, Inputs
from shared.model_folder import ModelFolder
from train.adapters.base import Adapter, Attach, Precision, Start, precision_named
from train.adapters.controlnet import WEIGHTS, read_model, write_model

if TYPE_CHECKING:
    from train.config import TrainConfig


@dataclass(frozen=True)
class FullOptions:
    """How the whole base is trained, with `adapter full`."""

    weights: Precision = "auto"
    """Precision of the base, which is trained. auto: bf16 with stochastic rounding on a GPU, fp32 on the CPU. fp32
    costs twice the memory; on a GPU it is then computed in bf16 by autocast."""
    guidance: float = 1.0
    """Guidance that a distilled base is told during training. 1 is without: what is learned does not then depend on
    what it is told when it paints."""

    def check(self) -> None:
        """Refuse impossible values."""
        if self.guidance < 0:
            raise UserError(f"full.guidance must not be negative, but is {self.guidance}")


class FullAdapter(Adapter):
    """The base, trained."""

    name: ClassVar[str] = "full"
    weights_file: ClassVar[str] = WEIGHTS
    title: ClassVar[str] = "base"
    conditioned: ClassVar[bool] = False
    keeps_base: ClassVar[bool] = False
    spreads_base: ClassVar[bool] = True

    def __init__(self, family: Family, base: torch.nn.Module, options: FullOptions) -> None:
        """The base, unquantized, begins to be trained."""
        self.family, self.base, self.options, self.guidance = family, base, options, options.guidance
        self.folder = family.base_component
        self.trained = base.requires_grad_(True).train()
        self.bare = self.module = _Predicting(family, base, options.guidance)

    @classmethod
    def precision(cls, options: TrainConfig, compute: torch.dtype) -> torch.dtype:
        return precision_named(options.full.weights, compute, compute, "full.weights")

    @classmethod
    def guidance_of(cls, options: TrainConfig) -> float:
        return options.full.guidance

    @classmethod
    def refuse(cls, options: TrainConfig, family: Family, model: ModelFolder | None) -> None:
        if options.base.weights != "none":
            raise UserError(
                f"adapter full trains the base's own weights, and base.weights {options.base.weights} holds them in "
                "256 levels for each channel: one level is a hundred and more times what a step at usual learning "
                "rates changes, so nothing would be learned. Set --base.weights none, or train a LoRA on the int8 base "
                "(--adapter lora)"
            )
        for option in ("hoist", "stream"):
            if getattr(options.memory, option) == "yes":
                raise UserError(
                    f"memory.{option} yes is for a base that is frozen, and adapter full trains it: leave it out. "
                    "Memory is saved by --optimizer.release True, --optimizer.states cpu, --memory.recompute all, and "
                    "over several cards --memory.shard yes"
                )
        if options.memory.shard == "yes" and options.optimizer.kind == "prodigy":
            raise UserError(
                "memory.shard yes: prodigy finds one step size from all weights, and a base that is trained is spread "
                "with its optimizer: set optimizer.kind adamw8bit"
            )
        if options.speed.arithmetic != "exact":
            raise UserError(
                f"speed.arithmetic {options.speed.arithmetic} is for an int8 base, and adapter full has none: leave it "
                "out"
            )

    @classmethod
    def depth(cls, options: TrainConfig, family: Family, saved: Path | None) -> tuple[int, int]:
        return 0, 0

    @classmethod
    def run_name(cls, options: TrainConfig, family: Family | None = None) -> str:
        return "full"

    @classmethod
    def begin(cls, start: Start) -> Attach:
        return lambda base: cls(start.family, base, start.options.full)

    @classmethod
    def empty(cls, family: Family, base: torch.nn.Module, like: Any, weights: torch.dtype) -> FullAdapter:
        return cls(family, base.to(weights), FullOptions())

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, scale: float = 1.0) -> torch.Tensor:
        assert scale == 1.0, "there is no base to mix it with"
        with self.autocast(x_t):
            return self.called(x_t, t, inputs).to(x_t.dtype)

    def predict_without(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        raise AssertionError("the base is not what it was")

    def refuse_trainable_base(self) -> None:
        """It is to be trainable."""

    def write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`FluxTransformer2DModel.from_pretrained(folder)` reads it, and so does a pipeline in whose folder it is put
        in the place of its own."""
        return write_model(self.base, folder, tensors)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        return read_model(folder)


class _Predicting(torch.nn.Module):
    """The base as it is called: a wrapper for several processes goes around this."""

    def __init__(self, family: Family, base: torch.nn.Module, guidance: float) -> None:
        super().__init__()
        self.family, self.base, self.guidance = family, base, guidance

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """As `Adapter.predict`."""
        return self.family.predict(self.base, x_t, t, inputs, self.guidance, None)


ADAPTER = FullAdapter
