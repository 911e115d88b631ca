"""A LoRA: beside some of the frozen base's linears a product of two thin matrices, y += alpha / rank * B (A x).

(arXiv 2106.09685.) The base's own layers stay what they are, in int8 too, under their own names: each of those that
are chosen is watched, and what the pair gives is added to what comes out of it. The pairs lie beside the base, not in
it, so nothing that holds, streams or spreads a frozen base need know of them. Names, initialisation and scale are
peft's: `FluxPipeline.load_lora_weights(folder)` reads what is saved.

Letters: N output and K input features of a linear, r the rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from shared.errors import UserError, nearest
from shared.families.base import Family, Inputs
from shared.model_folder import ModelFolder
from train.adapters.base import Adapter, Attach, Precision, Start, precision_named
from train.frozen_linear import FrozenInt8Linear

if TYPE_CHECKING:
    from train.config import TrainConfig

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""
_METADATA = "lora_adapter_metadata"
"""Under this key of the file's metadata diffusers finds what peft is told of the pairs."""


@dataclass(frozen=True)
class LoraOptions:
    """What a LoRA is, with `adapter lora`."""

    rank: int = 16
    """r, the width of the pairs. 4 to 16 holds a subject or a style; more holds more, and takes more memory on disk:
    16 is 37 MB in bf16 for FLUX.1-dev with the default targets."""
    alpha: float | None = None
    """What the pairs give is multiplied by alpha / rank. Default: the rank, so by 1. Lower it to learn more gently."""
    targets: tuple[str, ...] = ()
    """The linears that get a pair, by the ends of their names, for example attn.to_q. Default: the attention's
    projections and the feed-forward layers that diffusers' own DreamBooth training takes in this family."""
    weights: Precision = "fp32"
    """Precision of the pairs while they are trained. There are few of them, so fp32 costs next to nothing."""
    save_fp32: bool = False
    """Save the pairs in fp32 in exports too. False: exports are in bf16, half the size. Checkpoints are as trained."""
    guidance: float = 1.0
    """Guidance that a distilled base is told during training. 1 is without: what is learned does not then depend on
    what it is told when it paints."""

    def check(self) -> None:
        """Refuse impossible values."""
        if self.rank < 1:
            raise UserError(f"lora.rank must be 1 or more, not {self.rank}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"lora.alpha must be above 0, but is {self.alpha}")
        if self.guidance < 0:
            raise UserError(f"lora.guidance must not be negative, but is {self.guidance}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def chosen(base: torch.nn.Module, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """The linears of a base that the targets name, as peft matches them: name to (N, K), in the model's order. Raises
    `UserError` for a target that names none."""
    linears = {
        name: (int(module.out_features), int(module.in_features))
        for name, module in base.named_modules()
        if isinstance(module, (torch.nn.Linear, FrozenInt8Linear))
    }
    matching = {
        target: [name for name in linears if name == target or name.endswith(f".{target}")] for target in targets
    }
    for target, found in matching.items():
        if not found:
            ends = sorted({".".join(name.split(".")[2:]) or name for name in linears})
            raise UserError(
                f"lora.targets: no linear of the base ends with '{target}': {nearest(target, ends)}. (The modulation "
                "has none where it is computed ahead: --memory.hoist no)"
            )
    taken = {name for found in matching.values() for name in found}
    return {name: shape for name, shape in linears.items() if name in taken}


class Pair(torch.nn.Module):
    """A and B of one linear."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """B is zero, so that nothing changes at first; A is not filled."""
        super().__init__()
        self.lora_A = torch.nn.Linear(in_features, rank, bias=False, dtype=dtype, device="meta")
        self.lora_B = torch.nn.Linear(rank, out_features, bias=False, dtype=dtype, device="meta")
        self.to_empty(device=device)
        torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N) in x's dtype: the weights are rounded to it, their gradients arrive in their own."""
        thin = torch.nn.functional.linear(x, self.lora_A.weight.to(x.dtype))
        return torch.nn.functional.linear(thin, self.lora_B.weight.to(x.dtype))


class Lora(torch.nn.Module):
    """All pairs of a base, and the base that they act on, which is no part of it."""

    def __init__(
        self,
        family: Family,
        base: torch.nn.Module,
        shapes: Mapping[str, tuple[int, int]],
        options: LoraOptions,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int = 0,
    ) -> None:
        """Watches those linears of the base that `shapes` names. A is drawn from the seed as peft draws it."""
        super().__init__()
        self.names = list(shapes)
        self.linears = [base.get_submodule(name) for name in shapes]
        """That are watched. (In a list, so that they do not become a part of this module.)"""
        self.scale, self.guidance = options.scale, options.guidance
        self.on = True
        """Whether the pairs act."""
        self.pairs = torch.nn.ModuleList(
            Pair(K, N, options.rank, dtype=dtype, device=device) for N, K in shapes.values()
        )
        draw = torch.Generator().manual_seed(seed)
        for linear, pair in zip(self.linears, self.pairs, strict=True):
            assert isinstance(pair, Pair)
            weight = pair.lora_A.weight.detach()
            if not weight.is_meta:
                drawn = torch.nn.init.kaiming_uniform_(
                    torch.empty(weight.shape), a=math.sqrt(5), generator=draw
                )  # on the CPU and in fp32: the same on every device
                weight.copy_(drawn)
            linear.register_forward_hook(self._watcher(pair))
        self._predict = lambda x_t, t, inputs: family.predict(base, x_t, t, inputs, self.guidance, None)
        self.train()

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The base's prediction with the pairs: called through here, a wrapper for several processes knows of it."""
        return self._predict(x_t, t, inputs)

    def _watcher(self, pair: Pair) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
        def add(linear: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            if not self.on:
                return output
            given = pair(args[0])
            return output + (given if self.scale == 1.0 else self.scale * given)

        return add


class LoraAdapter(Adapter):
    """The pairs with their frozen base."""

    name: ClassVar[str] = "lora"
    folder: ClassVar[str] = "lora"
    weights_file: ClassVar[str] = WEIGHTS
    config_file: ClassVar[str | None] = None
    title: ClassVar[str] = "LoRA"
    conditioned: ClassVar[bool] = False

    def __init__(
        self,
        family: Family,
        base: torch.nn.Module,
        options: LoraOptions,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int = 0,
    ) -> None:
        """New pairs on the base, which from now on is watched. Raises `UserError` for targets that it has not."""
        self.family, self.base, self.options, self.guidance = family, base, options, options.guidance
        shapes = chosen(base, options.targets or family.lora_targets)
        self.lora = Lora(family, base, shapes, options, dtype=dtype, device=device, seed=seed)
        self.trained = self.bare = self.module = self.lora

    @classmethod
    def precision(cls, options: TrainConfig, compute: torch.dtype) -> torch.dtype:
        return precision_named(options.lora.weights, compute, compute, "lora.weights")

    @classmethod
    def guidance_of(cls, options: TrainConfig) -> float:
        return options.lora.guidance

    @classmethod
    def refuse(cls, options: TrainConfig, family: Family, model: ModelFolder | None) -> None:
        chosen(family.make_base(model), options.lora.targets or family.lora_targets)
        if options.memory.shard == "yes":
            raise UserError(
                "memory.shard yes: a base that is spread over cards brings its blocks together while the LoRA's "
                "gradients are averaged, and the two would wait for each other; leave it out (memory.stream yes keeps "
                "the blocks on the host)"
            )
        if options.base.weights == "quanto":
            raise UserError(
                "adapter lora is trained on the int8 base as it is kept here, or on an unquantized one: set "
                "--base.weights int8 or none"
            )

    @classmethod
    def depth(cls, options: TrainConfig, family: Family, saved: Path | None) -> tuple[int, int]:
        return 0, 0

    @classmethod
    def run_name(cls, options: TrainConfig) -> str:
        return f"lora-{options.lora.rank}"

    @classmethod
    def begin(cls, start: Start) -> Attach:
        def attach(base: torch.nn.Module) -> LoraAdapter:
            return cls(
                start.family, base, start.options.lora, dtype=start.weights, device=start.device,
                seed=start.options.seed,
            )  # fmt: skip

        return attach

    @classmethod
    def empty(cls, family: Family, base: torch.nn.Module, like: Any, weights: torch.dtype) -> LoraAdapter:
        return cls(family, base, like.lora, dtype=weights, device="meta")

    def on_fewer_blocks(self) -> LoraAdapter:
        there = set(self.base.modules())
        kept = [i for i, linear in enumerate(self.lora.linears) if linear in there]
        self.lora.pairs = torch.nn.ModuleList(self.lora.pairs[i] for i in kept)
        return self

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, scale: float = 1.0) -> torch.Tensor:
        # Looking at held-out samples is one process's business: the wrapper would have all of them take part.
        module = self.module if torch.is_grad_enabled() else self.bare
        if scale == 1.0:
            return module(x_t, t, inputs)
        assert not torch.is_grad_enabled(), "what is recomputed in backward would be with another scale"
        kept = self.lora.scale
        self.lora.scale = kept * scale
        try:
            return module(x_t, t, inputs)
        finally:
            self.lora.scale = kept

    def predict_without(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        assert not torch.is_grad_enabled(), "what is recomputed in backward would be with the pairs"
        with self._off():
            return self.lora(x_t, t, inputs)

    @contextmanager
    def _off(self) -> Iterator[None]:
        self.lora.on = False
        try:
            yield
        finally:
            self.lora.on = True

    def write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`FluxPipeline.load_lora_weights(folder)` reads it: peft's names below the base's, and what peft is told."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        state = self.lora.state_dict()
        named = {
            saved: tensors.get(ours, state[ours]).detach().cpu().contiguous() for ours, saved in self._names().items()
        }
        about = {
            "r": self.options.rank,
            "lora_alpha": self.options.scale * self.options.rank,
            "target_modules": self.lora.names,
        }
        told = {f"{self.family.base_component}.{key}": value for key, value in about.items()}
        # One key alone: safetensors writes several in any order, and the same weights are to be the same file.
        save_file(named, folder / WEIGHTS, metadata={_METADATA: json.dumps(told)})
        return named

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        names = {saved: ours for ours, saved in self._names().items()}
        return {names.get(saved, saved): tensor for saved, tensor in load_file(folder / WEIGHTS).items()}

    @classmethod
    def for_others(
        cls, tensors: dict[str, torch.Tensor], trained: Mapping[str, Any], precision: str
    ) -> dict[str, torch.Tensor]:
        """alpha / rank is multiplied into B: programs take alpha from several places, or from none."""
        options = LoraOptions(**{**trained["lora"], "targets": tuple(trained["lora"]["targets"])})
        scaled = {
            name: options.scale * tensor.float() if name.endswith("lora_B.weight") else tensor
            for name, tensor in tensors.items()
        }
        if precision == "trained":
            precision = "fp32" if options.save_fp32 else "bf16"
        return super().for_others(scaled, trained, precision)

    def _names(self) -> dict[str, str]:
        """Of each weight its name in `trained`, and in the file."""
        return {
            f"pairs.{i}.{part}.weight": f"{self.family.base_component}.{name}.{part}.weight"
            for i, name in enumerate(self.lora.names)
            for part in ("lora_A", "lora_B")
        }


ADAPTER = LoraAdapter
