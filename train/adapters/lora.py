"""A LoRA: beside some of the frozen base's linears a product of two thin matrices, y += alpha / rank * B (A x).

(arXiv 2106.09685.) The base's own layers stay what they are, in int8 too, under their own names: each of those that
are chosen is watched, and what the pair gives is added to what comes out of it. The pairs lie beside the base, not in
it, so nothing that holds, streams or spreads a frozen base need know of them. Names, initialisation and scale are
peft's: `FluxPipeline.load_lora_weights(folder)` reads what is saved.

With `train_text_encoder` the family's text encoders have pairs, too. They lie frozen beside the base, and what they say
of a caption is computed of its tokens, with gradients, in each step.

Letters: N output and K input features of a linear, r the rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.hooks import RemovableHandle

from shared.errors import UserError, nearest
from shared.families.base import Batch, Family, Inputs, TextEncoder
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
    train_text_encoder: bool = False
    """Train CLIP along: pairs of the same rank on the projections of its attention (of SDXL on both CLIPs'). For words
    that it does not know, as a subject's made-up name. The cache must hold tokens (preprocess --text-tokens True). T5
    is never trained. What CLIP says enters FLUX's modulation, which is then on the device: 6 GiB in bf16, 3 in int8."""
    text_learning_rate: float | None = None
    """Peak learning rate of the text encoder's pairs. Default: optimizer.learning_rate. CLIP forgets fast: a twentieth
    of it is usual (5e-6 beside 1e-4)."""
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
        rate = self.text_learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise UserError(f"lora.text_learning_rate must be above 0, but is {rate}")

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


class Pairs(torch.nn.Module):
    """All pairs of one model, which is no part of it."""

    def __init__(
        self,
        model: torch.nn.Module,
        shapes: Mapping[str, tuple[int, int]],
        options: LoraOptions,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        draw: torch.Generator,
    ) -> None:
        """Watches those linears of the model that `shapes` names. A is drawn as peft draws it."""
        super().__init__()
        self.names = list(shapes)
        self.linears = [model.get_submodule(name) for name in shapes]
        """That are watched. (In a list, so that they do not become a part of this module.)"""
        self.scale = options.scale
        self.on = True
        """Whether the pairs act."""
        self._watching: list[RemovableHandle] = []
        self.pairs = torch.nn.ModuleList(
            Pair(K, N, options.rank, dtype=dtype, device=device) for N, K in shapes.values()
        )
        for linear, pair in zip(self.linears, self.pairs, strict=True):
            assert isinstance(pair, Pair)
            weight = pair.lora_A.weight.detach()
            if not weight.is_meta:
                drawn = torch.nn.init.kaiming_uniform_(
                    torch.empty(weight.shape), a=math.sqrt(5), generator=draw
                )  # on the CPU and in fp32: the same on every device
                weight.copy_(drawn)
            self._watching.append(linear.register_forward_hook(self._watcher(pair)))

    def leave(self) -> None:
        """Watch the model no more: nothing of it holds them then."""
        for handle in self._watching:
            handle.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it is without them."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def _watcher(self, pair: Pair) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
        def add(linear: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            if not self.on:
                return output
            given = pair(args[0])
            return output + (given if self.scale == 1.0 else self.scale * given)

        return add


class Lora(Pairs):
    """Those of a base, and of text encoders."""

    def __init__(
        self,
        family: Family,
        base: torch.nn.Module,
        shapes: Mapping[str, tuple[int, int]],
        options: LoraOptions,
        *,
        texts: Sequence[Text] = (),
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int = 0,
    ) -> None:
        """A is drawn from the seed."""
        draw = torch.Generator().manual_seed(seed)
        super().__init__(base, shapes, options, dtype=dtype, device=device, draw=draw)
        self.texts = torch.nn.ModuleList(
            Pairs(text.encoder, text.shapes(), options, dtype=dtype, device=device, draw=draw) for text in texts
        )
        self._predict = lambda x_t, t, inputs: family.predict(base, x_t, t, inputs, options.guidance, None)
        self.train()

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The base's prediction with the pairs: called through here, a wrapper for several processes knows of it."""
        return self._predict(x_t, t, inputs)


@dataclass(frozen=True)
class Text:
    """A text encoder that is trained along."""

    kind: TextEncoder
    encoder: torch.nn.Module
    """Frozen, on the device."""

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The linears that get a pair: name to (N, K)."""
        found = chosen(self.encoder, self.kind.lora_targets)
        return {name: shape for name, shape in found.items() if self.kind.is_heard(self.encoder, name)}


class LoraAdapter(Adapter):
    """The pairs with their frozen base."""

    name: ClassVar[str] = "lora"
    folder = "lora"
    weights_file: ClassVar[str] = WEIGHTS
    config_file: ClassVar[str | None] = None
    title: ClassVar[str] = "LoRA"
    conditioned: ClassVar[bool] = False
    spreads_base: ClassVar[bool] = True
    shares_base: ClassVar[bool] = True

    def __init__(
        self,
        family: Family,
        base: torch.nn.Module,
        options: LoraOptions,
        *,
        texts: Sequence[Text] = (),
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int = 0,
    ) -> None:
        """New pairs on the base and on `texts`, which from now on are watched. Raises `UserError` for targets that the
        base has not."""
        self.family, self.base, self.options, self.guidance = family, base, options, options.guidance
        shapes = chosen(base, options.targets or family.lora_targets)
        self.lora = Lora(family, base, shapes, options, texts=texts, dtype=dtype, device=device, seed=seed)
        self._texts = list(texts)
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
        if cls.trains_text(options) and not family.text_encoders:
            raise UserError(
                f"lora.train_text_encoder: {family.name} has no text encoder that can be trained; leave it out"
            )
        if cls.trains_text(options) and family.pooled and options.memory.hoist == "yes":
            raise UserError(
                "memory.hoist yes: what the text encoder says enters the modulation, so it cannot be computed ahead "
                "where lora.train_text_encoder changes it; leave one of them out"
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
    def run_name(cls, options: TrainConfig, family: Family | None = None) -> str:
        return f"lora-{options.lora.rank}"

    @classmethod
    def unused(cls, options: TrainConfig) -> list[str]:
        heeded = options.lora.train_text_encoder and options.optimizer.kind != "prodigy"
        return [] if heeded or options.lora.text_learning_rate is None else ["lora.text_learning_rate"]

    @classmethod
    def trains_text(cls, options: Any) -> bool:
        return options.lora.train_text_encoder

    @classmethod
    def begin(cls, start: Start) -> Attach:
        texts = [
            Text(kind, kind.load(start.model, start.dtype).to(start.device))
            for kind in (start.family.text_encoders if cls.trains_text(start.options) else ())
        ]

        def attach(base: torch.nn.Module) -> LoraAdapter:
            return cls(
                start.family, base, start.options.lora, texts=texts, dtype=start.weights, device=start.device,
                seed=start.options.seed,
            )  # fmt: skip

        return attach

    @classmethod
    def empty(cls, family: Family, base: torch.nn.Module, like: Any, weights: torch.dtype) -> LoraAdapter:
        kinds = family.text_encoders if cls.trains_text(like) else ()
        texts = [Text(kind, kind.make(like.model).to(like.dtype)) for kind in kinds]
        return cls(family, base, like.lora, texts=texts, dtype=weights, device="meta")

    def on_fewer_blocks(self) -> LoraAdapter:
        there = set(self.base.modules())
        kept = [i for i, linear in enumerate(self.lora.linears) if linear in there]
        self.lora.pairs = torch.nn.ModuleList(self.lora.pairs[i] for i in kept)
        return self

    def act(self, now: bool) -> None:
        self.lora.on = now

    def leave_base(self) -> None:
        self.lora.leave()

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        return [text.encoder for text in self._texts]

    def rates(self, options: TrainConfig) -> dict[str, float]:
        if options.lora.text_learning_rate is None:
            return {}
        rate = options.lora.text_learning_rate / options.optimizer.learning_rate
        return {name: rate for name, _ in self.named_parameters() if name.startswith("texts.")}

    def inputs(
        self, batch: Batch, condition: torch.Tensor | None, dtype: torch.dtype, *, without: bool = False
    ) -> Inputs:
        said: dict[str, torch.Tensor] = {}
        for text, pairs in zip(self._texts, self.lora.texts, strict=True):
            assert isinstance(pairs, Pairs)
            assert not (without and torch.is_grad_enabled()), "without the pairs there is nothing to train"
            [ids] = batch.role(text.kind.tokens.name).values()
            with pairs.off() if without else nullcontext():
                found = text.kind.encode(text.encoder, ids)
            said |= {f"{text.kind.layer}.{name}": tensor for name, tensor in found.items()}
        heard = replace(batch, tensors={**batch.tensors, **said}) if said else batch
        return super().inputs(heard, condition, dtype)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, scale: float = 1.0) -> torch.Tensor:
        # What text encoders say is in the inputs; `scale` is the base's pairs'.
        if scale == 1.0:
            return self.called(x_t, t, inputs)
        assert not torch.is_grad_enabled(), "what is recomputed in backward would be with another scale"
        kept = self.lora.scale
        self.lora.scale = kept * scale
        try:
            return self.called(x_t, t, inputs)
        finally:
            self.lora.scale = kept

    def predict_without(self, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        assert not torch.is_grad_enabled(), "what is recomputed in backward would be with the pairs"
        with self.lora.off():
            return self.lora(x_t, t, inputs)

    def write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`FluxPipeline.load_lora_weights(folder)` reads it: peft's names below the base's, and what peft is told."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        state = self.lora.state_dict()
        named = {
            saved: tensors.get(ours, state[ours]).detach().cpu().contiguous() for ours, saved in self._names().items()
        }
        matched = {self.family.base_component: self.lora.names}
        for text in self._texts:
            matched[text.kind.component] = [text.kind.name_to_match(name) for name in text.shapes()]
        told: dict[str, Any] = {}
        for component, names in matched.items():
            told[f"{component}.r"] = self.options.rank
            told[f"{component}.lora_alpha"] = self.options.scale * self.options.rank
            told[f"{component}.target_modules"] = names
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
        pairs = {f"pairs.{i}": f"{self.family.base_component}.{name}" for i, name in enumerate(self.lora.names)}
        for j, text in enumerate(self._texts):
            kind, names = text.kind, text.shapes()
            pairs |= {f"texts.{j}.pairs.{i}": f"{kind.component}.{kind.name_in_file(n)}" for i, n in enumerate(names)}
        return {
            f"{ours}.{part}.weight": f"{saved}.{part}.weight"
            for ours, saved in pairs.items()
            for part in ("lora_A", "lora_B")
        }


ADAPTER = LoraAdapter
