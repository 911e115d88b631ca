"""The questions that an adapter answers: what is trained, how it predicts, how it is kept. Nobody else asks which one
it is.

Letters: B batch, T image tokens, C channels of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch

from shared.errors import UserError
from shared.families.base import Batch, Family, Inputs
from shared.model_folder import ModelFolder
from train.quantize import refuse_trainable

if TYPE_CHECKING:
    from train.config import TrainConfig

Precision = Literal["auto", "bf16", "fp32"]

Attach = Callable[[torch.nn.Module], "Adapter"]
"""The base, on its device -> the adapter with it."""


class AdapterOptions(Protocol):
    """A frozen dataclass; `check` raises `UserError` for values that no single type can rule out."""

    def check(self) -> None: ...


@dataclass(frozen=True)
class Start:
    """What an adapter is made from, before the base is opened."""

    options: TrainConfig
    family: Family
    model: ModelFolder
    device: torch.device
    dtype: torch.dtype
    """Of the computation."""
    weights: torch.dtype
    """Of the trained weights."""
    saved: Path | None
    """The folder of weights of the checkpoint to go on from; `load` brings them in."""


class Adapter(ABC):
    """What is trained, with the base that it is trained on or in."""

    name: ClassVar[str]
    Options: ClassVar[type[AdapterOptions] | None] = None
    """The frozen dataclass of its settings, which stand under its `name` among the training's. None: it has none, or
    `TrainConfig` has a field for them."""
    folder: str
    """Of its weights: in a checkpoint, and the link in a run's folder."""
    weights_file: ClassVar[str]
    """In that folder."""
    config_file: ClassVar[str | None] = "config.json"
    """Beside them, where diffusers needs one."""
    title: ClassVar[str]
    """In a sentence: "ControlNet"."""
    conditioned: ClassVar[bool]
    """Whether it reads the condition: what is cached of it is left alone otherwise."""
    keeps_base: ClassVar[bool] = True
    """Whether the base stays what it was, so that what it does without the adapter can be told at any time; and its
    modulation can be computed ahead, its blocks streamed, its weights quantized."""
    spreads_base: ClassVar[bool] = False
    """Whether the base's blocks may be spread over cards."""
    shares_base: ClassVar[bool] = False
    """Whether several can train side by side on one base."""

    family: Family
    base: torch.nn.Module
    trained: torch.nn.Module
    """The module whose parameters are trained: what is counted and saved."""
    bare: torch.nn.Module
    """What is called to predict."""
    module: torch.nn.Module
    """The same while training: `bare`, or its wrapper for several processes."""
    guidance: float
    """That the base is told."""

    # --- before anything is loaded ----------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def precision(cls, options: TrainConfig, compute: torch.dtype) -> torch.dtype:
        """Of the trained weights, where it is computed in `compute`. Raises `UserError` where that cannot be."""

    @classmethod
    @abstractmethod
    def guidance_of(cls, options: TrainConfig) -> float:
        """`guidance`, before there is an adapter."""

    @classmethod
    @abstractmethod
    def refuse(cls, options: TrainConfig, family: Family, model: ModelFolder | None) -> None:
        """Refuse (`UserError`) what the adapter cannot be trained with. Reads configuration files only. Without a
        `model`: on `default_model`, which then need not be on this machine."""

    @classmethod
    @abstractmethod
    def depth(cls, options: TrainConfig, family: Family, saved: Path | None) -> tuple[int, int]:
        """Blocks of its own: (num_layers, num_single_layers). `saved`: as in `Start`."""

    @classmethod
    @abstractmethod
    def run_name(cls, options: TrainConfig, family: Family | None = None) -> str:
        """What a run is called that is given no name. `family`: once the cache has told it."""

    @classmethod
    def unused(cls, options: TrainConfig) -> list[str]:
        """Options of its own that were changed but have no effect beside the others: warn of them."""
        return []

    @classmethod
    def trains_text(cls, options: Any) -> bool:
        """Whether the family's text encoders are trained along: their tokens are read, not what they said before, and
        nothing that depends on what they say is computed ahead. `options`: `TrainConfig`, `train.counting.Setting`."""
        return False

    # --- made -------------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def begin(cls, start: Start) -> Attach:
        """Load what is the adapter's own, and say how it is put on the base, which is opened afterwards. Raises
        `UserError`."""

    @classmethod
    @abstractmethod
    def empty(cls, family: Family, base: torch.nn.Module, like: Any, weights: torch.dtype) -> Adapter:
        """One without weights on a base on the meta device, for counting. `like`: `train.counting.Setting`."""

    def on_fewer_blocks(self) -> Adapter:
        """The adapter on its base, some blocks of which have been taken out, for counting."""
        return self

    # --- the step ---------------------------------------------------------------------------------------------------

    def inputs(
        self, batch: Batch, condition: torch.Tensor | None, dtype: torch.dtype, *, without: bool = False
    ) -> Inputs:
        """Everything but x_t and t for `predict` on this batch, or for `predict_without`."""
        return self.family.inputs(batch, condition, dtype)

    @abstractmethod
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, scale: float = 1.0) -> torch.Tensor:
        """The prediction, as x_t. `scale`: how strongly it acts."""

    @abstractmethod
    def predict_without(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """That of the base alone; only where the adapter `keeps_base`."""

    @property
    def called(self) -> torch.nn.Module:
        """What is called to predict, now: looking at held-out samples is one process's business, and the wrapper would
        have all of them take part."""
        return self.module if torch.is_grad_enabled() else self.bare

    def autocast(self, x_t: torch.Tensor) -> AbstractContextManager[object]:
        """fp32 weights with bf16 activations: computed in bf16, gradients arrive in fp32."""
        weights = next(self.trained.parameters()).dtype
        if weights == x_t.dtype or x_t.is_meta:  # which has no autocast: where memory is counted, it is imitated
            return nullcontext()
        return torch.autocast(x_t.device.type, dtype=x_t.dtype)

    @property
    def has_idle_parameters(self) -> bool:
        """Whether some parameters never get a gradient."""
        return False

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """Frozen ones that it holds beside the base, on its device."""
        return []

    def rates(self, options: TrainConfig) -> dict[str, float]:
        """What the learning rate is multiplied by for some of the `named_parameters`; 1 for the others."""
        return {}

    @property
    def with_blocks(self) -> torch.nn.Module | None:
        """The trained module where it has transformer blocks of its own, beside the base's."""
        return None

    def act(self, now: bool) -> None:
        """On a base that several share in turns: whether what it has put on the base computes there now."""
        del now  # most put nothing there

    def leave_base(self) -> None:
        """Take off the base what it has put there, for good."""
        self.act(False)

    def refuse_trainable_base(self) -> None:
        """Raise `UserError` where what is to stay as it is of the base has begun to require gradients."""
        refuse_trainable(self.base)

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What the optimizer moves."""
        return [(name, parameter) for name, parameter in self.trained.named_parameters() if parameter.requires_grad]

    # --- kept -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, torch.Tensor]:
        """Write the weights as diffusers reads them. Back comes what was to be written, by name in the file."""
        return self.write(folder, self.trained.state_dict())

    @abstractmethod
    def write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write these in the place of the trained weights, by their names in `trained`; those that are not given as
        they are. Back comes what was to be written, by name in the file."""

    @abstractmethod
    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """What `write` wrote, by name in `trained`, on the CPU."""

    @classmethod
    def for_others(
        cls, tensors: dict[str, torch.Tensor], trained: Mapping[str, Any], precision: str
    ) -> dict[str, torch.Tensor]:
        """The weights of a checkpoint's file as an export has them: what a program must be told beside them is worked
        in. `trained`: the run's options; `precision`: "trained", or "bf16" or "fp32" for all."""
        if precision == "trained":
            return tensors
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Put saved weights back in place. Raises `UserError` where they are another's."""
        saved, ours = self.read(folder), self.trained.state_dict()
        if {name: tensor.shape for name, tensor in saved.items()} != {name: t.shape for name, t in ours.items()}:
            raise UserError(f"{folder} holds a {self.title} of another shape than this run's; choose another NAME")
        for name, tensor in ours.items():
            tensor.copy_(saved[name])


def precision_named(name: Precision, auto: torch.dtype, compute: torch.dtype, option: str) -> torch.dtype:
    """The dtype of trained weights as an option names it. Raises `UserError` for bf16 in a computation in fp32."""
    weights = {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if (compute, weights) == (torch.float32, torch.bfloat16):
        raise UserError(
            f"{option} bf16 are computed in bf16, but the precision is fp32: set precision bf16 too, or leave "
            f"{option} out"
        )
    return weights
