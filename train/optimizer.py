"""Optimizers whose updates arrive: AdamW with 32-bit or 8-bit states, over float32 or bfloat16 weights.

A bfloat16 weight near 0.02 has neighbours 1.2e-4 away, and one AdamW update at a learning rate of 2e-5 is six times
smaller than that: rounded to nearest, it is lost. So a bfloat16 weight is stepped on a temporary float32 copy and
rounded back stochastically, up or down with the probability that makes it right on average (arXiv 1502.02551). No
float32 copy of the weights is kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from shared.errors import UserError, nearest

Kind = Literal["adamw", "adamw8bit"]
Schedule = Literal["constant", "cosine", "linear"]
Rounding = Literal["stochastic", "nearest"]

MIN_8BIT_NUMEL = 4096
"""Smaller tensors keep 32-bit states, also under `adamw8bit` (bitsandbytes' own limit): they hold next to nothing."""
_HIGH_HALF = 1 if sys.byteorder == "little" else 0
"""Which of a float32's two 16-bit words is its bfloat16 part."""


@dataclass(frozen=True)
class OptimizerOptions:
    """How the weights are stepped."""

    kind: Kind = "adamw8bit"
    """`adamw8bit` keeps Adam's two moments in 8 bits (2 bytes per weight, bitsandbytes); `adamw` in float32 (8 bytes).
    Choose `adamw` where memory allows and an experiment must not depend on quantized moments."""
    learning_rate: float = 2e-5
    """The peak of the schedule. 1e-5 to 5e-5 is usual for a FLUX ControlNet; lower it if the loss jumps."""
    beta1: float = 0.9
    """How slowly the mean of the gradients forgets. Rarely touched."""
    beta2: float = 0.999
    """How slowly the mean of their squares forgets. 0.99 suits runs of under a few thousand steps."""
    epsilon: float = 1e-8
    """Keeps the update finite where gradients are almost zero. Rarely touched."""
    weight_decay: float = 0.01
    """Share of a weight taken off per step, times the learning rate (decoupled, as in AdamW). 0 turns it off."""
    schedule: Schedule = "constant"
    """The learning rate after the warm-up. `constant` lets a run be extended; `cosine` and `linear` fall to
    `final_fraction` and usually end a little better when the number of steps is fixed."""
    warmup_steps: int = 500
    """Steps over which the learning rate rises to its peak. Lower it for short runs: one that ends within its warm-up
    never reaches the peak."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak, for `cosine` and `linear`."""
    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it. 0 turns clipping off."""
    rounding: Rounding = "stochastic"
    """How a stepped bfloat16 weight is rounded. `nearest` loses most of what is learned at usual learning rates and is
    there for comparison only. float32 weights are never rounded."""

    def check(self) -> None:
        """Refuse impossible values. Raises `UserError`."""
        for name, choices in (("kind", Kind), ("schedule", Schedule), ("rounding", Rounding)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise UserError(f"optimizer.{name} '{value}' is unknown: {nearest(value, get_args(choices))}")
        for name in ("learning_rate", "epsilon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"optimizer.{name} must be above 0, but is {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"optimizer.{name} must be at least 0 and below 1, but is {value}")
        for name, off in (("weight_decay", "no decay"), ("warmup_steps", "no warm-up"), ("clip_norm", "no clipping")):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"optimizer.{name} must be 0 ({off}) or more, but is {value}")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"optimizer.final_fraction must be from 0 to 1, but is {self.final_fraction}")

    def unused(self) -> list[str]:
        """Options that were changed from their default but have no effect beside the others: warn of them."""
        return ["final_fraction"] if self.schedule == "constant" and self.final_fraction != 0 else []


def learning_rate(options: OptimizerOptions, step: int, num_steps: int) -> float:
    """The learning rate of step number `step` (the first is 0) in a run of `num_steps`.

    It rises linearly from peak / warmup_steps to the peak, which the last warm-up step has; then it follows the
    schedule, which reaches its end after the last step (`step == num_steps`) and stays there.
    """
    peak, warmup = options.learning_rate, options.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if options.schedule == "cosine" else 1 - progress
    return peak * (options.final_fraction + (1 - options.final_fraction) * falling)


def stochastic_round_(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round float32 `x` to one of its two bfloat16 neighbours so that the mean is `x`. Uses up `x`: the result, of the
    same shape, lies in its memory.

    To the bit: the float32 is read as a 32-bit integer, an integer drawn uniformly from 0 to 65,535 is added, and the
    upper 16 bits are the bfloat16. So the neighbour further from zero is taken with probability lower 16 bits / 65,536,
    and a value that bfloat16 holds exactly never changes. Infinities stay; every NaN becomes the canonical NaN, whose
    lower bits are zero (others could carry over into a number). Beyond the largest bfloat16 the further neighbour is
    infinity, as in rounding to nearest. `x` must be contiguous, `generator` on its device.
    """
    assert x.dtype == torch.float32, x.dtype
    x.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)
    bits = x.view(-1).view(torch.int32)
    bits.add_(torch.randint(0, 1 << 16, bits.shape, generator=generator, device=x.device, dtype=torch.int32))
    return bits.view(torch.int16)[_HIGH_HALF::2].view(torch.bfloat16).view(x.shape)


@dataclass
class _Bucket:
    """Parameters that one inner optimizer steps together."""

    names: list[str]
    weights: list[torch.nn.Parameter]
    stepped: list[torch.nn.Parameter]
    """What the inner optimizer holds: the weights themselves (float32), or stand-ins that are filled with float32
    copies during a step and are empty between steps (bfloat16)."""
    inner: torch.optim.Optimizer


class Optimizer:
    """AdamW over named parameters: float32 ones in place, bfloat16 ones through a temporary float32 copy.

    Parameters are stepped in buckets of at most the size of the largest one, so beside the states a step needs float32
    copies of one bucket's weights and gradients, never of all. Parameters without a gradient are left alone, as by
    torch.
    """

    def __init__(self, options: OptimizerOptions, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Take the trainable `parameters` by name. Raises `UserError` for weights neither float32 nor bfloat16."""
        assert parameters, "nothing to train"
        assert len({id(p) for p in parameters.values()}) == len(parameters), "a parameter appears under two names"
        for name, parameter in parameters.items():
            assert parameter.requires_grad, f"{name} is frozen"
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise UserError(
                    f"'{name}' is {parameter.dtype}, but only float32 and bfloat16 weights can be trained: choose one"
                )
        self.options = options
        self.parameters = dict(parameters)
        self._buckets = [self._bucket(names) for names in _bucket_names(options.kind, parameters)]

    def zero_grad(self) -> None:
        """Forget all gradients and free their memory."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients, in place, to a global norm of at most `max_norm` (0: leave them).

        Returns the norm before scaling, a 0-dim float32 tensor on the gradients' device: nothing waits for the device
        here. Where it is not finite the gradients are spoiled, and it is the caller's to stop before `step`.
        """
        graded = [parameter for parameter in self.parameters.values() if parameter.grad is not None]
        assert graded, "no gradients: call backward first"
        device = graded[0].device
        # In float32 also for bfloat16 gradients: torch's own total norm would be rounded to bfloat16, to 0.4 %.
        norms = [torch.linalg.vector_norm(_gradient(p), dtype=torch.float32).to(device) for p in graded]
        total = torch.linalg.vector_norm(torch.stack(norms))
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(graded, max_norm, total)
        return total

    @torch.no_grad()
    def step(
        self, learning_rate: float, generator: torch.Generator | None, *, share_updated: bool = False
    ) -> torch.Tensor | None:
        """Step every parameter that has a gradient, and leave the gradients as they are.

        `generator`, on the weights' device, draws the stochastic rounding; None will do where nothing is rounded so.
        With `share_updated`, returns the share of all weights whose value changed, 0-dim float32 on the device: near 0
        means that updates are rounded away. It costs one more pass over the weights.
        """
        num_changed: list[torch.Tensor] = []
        for bucket in self._buckets:
            for group in bucket.inner.param_groups:
                group["lr"] = learning_rate
            graded = [
                (weight, stepped)
                for weight, stepped in zip(bucket.weights, bucket.stepped, strict=True)
                if weight.grad is not None
            ]
            if not graded:
                continue
            before = [weight.clone() for weight, _ in graded] if share_updated else []
            _fill(graded)
            bucket.inner.step()
            self._bring_back(graded, generator)
            num_changed += [(old != weight).sum() for old, (weight, _) in zip(before, graded, strict=False)]
        if not share_updated:
            return None
        device = next(iter(self.parameters.values())).device
        num_weights = sum(parameter.numel() for parameter in self.parameters.values())
        changed = sum((count.to(device) for count in num_changed), torch.zeros((), dtype=torch.int64, device=device))
        return (changed.double() / num_weights).float()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a later run needs to step on exactly as this one would have: tensors, and the rest as plain JSON values.

        Tensors are copies on the CPU, keyed "<parameter>.<state>"; their dtypes are the states' own (float32, uint8).
        The rest is `{"kind": ..., "parameters": {name: {"shape", "tensors", "numbers"}}}`. Settings are not part of it:
        they come from the options of the run that goes on. The generator's state is its owner's to keep.
        """
        tensors: dict[str, torch.Tensor] = {}
        described: dict[str, Any] = {}
        for bucket in self._buckets:
            for name, weight, stepped in zip(bucket.names, bucket.weights, bucket.stepped, strict=True):
                state = bucket.inner.state.get(stepped, {})
                held = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
                tensors |= {f"{name}.{key}": value.detach().to("cpu", copy=True) for key, value in held.items()}
                described[name] = {
                    "shape": list(weight.shape),
                    "tensors": list(held),
                    "numbers": {key: value for key, value in state.items() if key not in held},
                }
        return tensors, {"kind": self.options.kind, "parameters": {name: described[name] for name in self.parameters}}

    def load_state(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `state` returned, in this process or another; the given tensors are copied.

        Raises `UserError`, before anything is changed, where it is of another kind, other parameters, or incomplete.
        """
        self._refuse_other_state(tensors, meta)
        described = meta["parameters"]
        for bucket in self._buckets:
            states: dict[int, dict[str, Any]] = {}
            for index, name in enumerate(bucket.names):
                of = described[name]
                state = {key: tensors[f"{name}.{key}"].clone() for key in of["tensors"]} | of["numbers"]
                if state:  # none yet: the parameter had no gradient so far
                    states[index] = state
            groups = bucket.inner.state_dict()["param_groups"]  # the settings of this run, not of the saved one
            bucket.inner.load_state_dict({"state": states, "param_groups": groups})

    def _refuse_other_state(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        mend = "resume with the options of the saved run, or start without its optimizer state"
        if meta["kind"] != self.options.kind:
            raise UserError(
                f"the saved optimizer state is of kind '{meta['kind']}', "
                f"but optimizer.kind is '{self.options.kind}': {mend}"
            )
        described = meta["parameters"]
        wrong = [
            ("of parameters that are not trained here", [name for name in described if name not in self.parameters]),
            ("missing for parameters", [name for name in self.parameters if name not in described]),
            (
                "of another shape for",
                [
                    f"{name} {tuple(described[name]['shape'])}, here {tuple(parameter.shape)}"
                    for name, parameter in self.parameters.items()
                    if name in described and tuple(described[name]["shape"]) != tuple(parameter.shape)
                ],
            ),
        ]
        for what, names in wrong:
            if names:
                raise UserError(f"the saved optimizer state is {what}: {_some(names)}: {mend}")
        expected = {f"{name}.{key}" for name, of in described.items() for key in of["tensors"]}
        if expected != set(tensors):
            raise UserError(
                f"the saved optimizer state is damaged, these tensors are missing or unexpected: "
                f"{_some(sorted(expected ^ set(tensors)))}: resume from another checkpoint, or start without it"
            )

    def _bucket(self, names: list[str]) -> _Bucket:
        weights = [self.parameters[name] for name in names]
        rounded = weights[0].dtype == torch.bfloat16
        stepped = [torch.nn.Parameter(_nothing_like(weight)) for weight in weights] if rounded else weights
        eight_bit = _in_8_bits(self.options.kind, weights[0])
        return _Bucket(names, weights, stepped, _inner_optimizer(self.options, stepped, eight_bit))

    def _bring_back(
        self, graded: list[tuple[torch.nn.Parameter, torch.nn.Parameter]], generator: torch.Generator | None
    ) -> None:
        """Round what was stepped into the bfloat16 weights and empty the stand-ins."""
        for weight, stepped in graded:
            if stepped is weight:
                continue
            if self.options.rounding == "stochastic":
                assert generator is not None, "stochastic rounding draws from a generator"
                weight.copy_(stochastic_round_(stepped.data, generator))
            else:
                weight.copy_(stepped.data)
            stepped.grad = None
            stepped.data = _nothing_like(weight)


def _fill(graded: list[tuple[torch.nn.Parameter, torch.nn.Parameter]]) -> None:
    """Fill the stand-ins with float32 copies of their weights and gradients."""
    for weight, stepped in graded:
        if stepped is not weight:
            stepped.data = weight.detach().to(torch.float32, memory_format=torch.contiguous_format)
            stepped.grad = _gradient(weight).to(torch.float32, memory_format=torch.contiguous_format)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _nothing_like(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=weight.device)


def _in_8_bits(kind: Kind, parameter: torch.Tensor) -> bool:
    return kind == "adamw8bit" and parameter.numel() >= MIN_8BIT_NUMEL


def _bucket_names(kind: Kind, parameters: Mapping[str, torch.nn.Parameter]) -> list[list[str]]:
    """Names of parameters that can be stepped together (one device, dtype and state), in their order, in buckets no
    larger than the largest parameter."""
    limit = max(parameter.numel() for parameter in parameters.values())
    alike: dict[tuple[torch.device, torch.dtype, bool], list[list[str]]] = {}
    filled: dict[tuple[torch.device, torch.dtype, bool], int] = {}
    for name, parameter in parameters.items():
        key = (parameter.device, parameter.dtype, _in_8_bits(kind, parameter))
        if key not in alike or filled[key] + parameter.numel() > limit:
            alike.setdefault(key, []).append([])
            filled[key] = 0
        alike[key][-1].append(name)
        filled[key] += parameter.numel()
    return [names for buckets in alike.values() for names in buckets]


def _inner_optimizer(
    options: OptimizerOptions, parameters: Iterable[torch.nn.Parameter], eight_bit: bool
) -> torch.optim.Optimizer:
    """The optimizer that does the arithmetic, on float32 parameters.

    Small tensors of `adamw8bit` go to torch: the same float32 AdamW as in bitsandbytes, but one fused call for all of
    them, where bitsandbytes launches and waits once for each.
    """
    settings: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.beta1, options.beta2),
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
    }
    if not eight_bit:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit  # here, because importing it takes seconds
    except ImportError as error:
        raise UserError(
            f"optimizer.kind 'adamw8bit' needs bitsandbytes ({error}): pip install bitsandbytes, or choose 'adamw'"
        ) from error
    return AdamW8bit(parameters, min_8bit_size=MIN_8BIT_NUMEL, **settings)


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
