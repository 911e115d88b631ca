"""Optimizers whose updates arrive: AdamW with 32-bit or 8-bit states, over float32 or bfloat16 weights.

A bfloat16 weight near 0.02 has neighbours 1.2e-4 away, and one AdamW update at a learning rate of 2e-5 is six times
smaller than that: rounded to nearest, it is lost. So a bfloat16 weight is stepped on a temporary float32 copy and
rounded back stochastically, up or down with the probability that makes it right on average (arXiv 1502.02551); or, by
option, on a float32 master copy that stays. How much of the updates arrives is measured now and then.

Where memory is short, states and master copies rest in the host's memory (train/offload.py), or each gradient is
stepped and freed as soon as backward has it. Both give the same weights to the bit.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.optim.adamw import adamw

from shared.errors import UserError, nearest
from shared.report import warn
from train.buckets import BLOCK_NUMEL, CHUNK_NUMEL, Bucket, Piece, is_large, make_buckets
from train.offload import DeviceStates, HostStates, States

Kind = Literal["adamw", "adamw8bit"]
Schedule = Literal["constant", "cosine", "linear"]
Rounding = Literal["stochastic", "nearest"]
Clip = Literal["global", "parameter"]
Place = Literal["device", "cpu"]
OnePass = Literal["auto", "no"]

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
    """Gradients with a larger norm are scaled down to it. 0 turns clipping off."""
    clip: Clip = "global"
    """Whose norm: that of all gradients together, or of each `parameter`'s gradient by itself, as `release` needs it.
    A limit for all together is far too high for each: try 0.1."""
    rounding: Rounding = "stochastic"
    """How a stepped bfloat16 weight is rounded. `nearest` loses most of what is learned at usual learning rates and is
    there for comparison only. float32 weights are never rounded."""
    master: bool = False
    """Keep a float32 copy of bfloat16 weights and step that (4 more bytes per weight); the weights are its nearest
    neighbours. Choose it where stochastic rounding's noise is unwanted, best with `states cpu`."""
    states: Place = "device"
    """Where moments and master copies rest between steps. `cpu`: in page-locked host memory, which frees 2 bytes of
    the GPU per weight with `adamw8bit`, 8 with `adamw`, 4 more with `master`; as many cross the bus each way a step."""
    release: bool = False
    """Step each large weight as soon as backward has its gradient, and free it: gradients (2 bytes per bfloat16 weight)
    then never lie in memory together. Not with a global clip, nor with accumulation, nor with several processes."""
    one_pass: OnePass = "auto"
    """`auto`: on a GPU `adamw8bit` is a kernel that goes over memory once, a sixth of the traffic otherwise; it is held
    against bitsandbytes' at the start. `no`: bitsandbytes' own kernel. They draw other noise."""
    survival_every: int = 100
    """Every how many steps the share of the update that survives rounding is measured. Such a step's optimizer reads
    and writes about twice as much memory. 0 turns it off."""

    def check(self) -> None:
        """Refuse impossible values. Raises `UserError`."""
        for name, choices in (
            ("kind", Kind), ("schedule", Schedule), ("rounding", Rounding), ("clip", Clip), ("states", Place),
            ("one_pass", OnePass),
        ):  # fmt: skip
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
        if self.survival_every < 0:
            raise UserError(f"optimizer.survival_every must be 0 (never) or more, but is {self.survival_every}")
        if self.release and self.clip == "global" and self.clip_norm > 0:
            raise UserError(
                "optimizer.release steps each weight before the other gradients are there, so their global norm cannot "
                "clip them: choose optimizer.clip parameter, or optimizer.clip_norm 0"
            )

    def check_release(self, accumulation: int, num_processes: int) -> None:
        """Refuse `release` where a gradient is not whole when backward has it: with several batches a step, or several
        processes. Raises `UserError`."""
        if self.release and accumulation > 1:
            raise UserError(
                f"optimizer.release cannot add up the gradients of {accumulation} batches: set loader.accumulation 1 "
                "with a larger batch, or leave optimizer.release out"
            )
        if self.release and num_processes > 1:
            raise UserError(
                f"optimizer.release would step before the gradients of the {num_processes} processes are averaged: "
                "train in one process, or choose optimizer.states cpu instead"
            )

    def unused(self) -> list[str]:
        """Options that were changed from their default but have no effect beside the others: warn of them."""
        changed = {
            "final_fraction": self.schedule == "constant" and self.final_fraction != 0,
            "clip": self.clip != "global" and self.clip_norm == 0,
            "rounding": self.rounding != "stochastic" and self.master,
        }
        return [name for name, without_effect in changed.items() if without_effect]

    def measures(self, step: int) -> bool:
        """Whether step number `step` (the first is 1) measures what survives of its update."""
        return self.survival_every > 0 and step % self.survival_every == 0


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


def stochastic_round_(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Round float32 `x` to one of its two bfloat16 neighbours so that the mean is `x`. Uses up `x`: the result, of the
    same shape, lies in its memory.

    To the bit: the float32 is read as a 32-bit integer, an integer drawn uniformly from 0 to 65,535 is added, and the
    upper 16 bits are the bfloat16. So the neighbour further from zero is taken with probability lower 16 bits / 65,536,
    and a value that bfloat16 holds exactly never changes. Infinities stay; every NaN becomes the canonical NaN, whose
    lower bits are zero (others could carry over into a number). Beyond the largest bfloat16 the further neighbour is
    infinity, as in rounding to nearest. `x` must be contiguous, `generator` on its device (None: torch's own).
    """
    assert x.dtype == torch.float32, x.dtype
    x.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)
    bits = x.view(-1).view(torch.int32)
    bits.add_(torch.randint(0, 1 << 16, bits.shape, generator=generator, device=x.device, dtype=torch.int32))
    return bits.view(torch.int16)[_HIGH_HALF::2].view(torch.bfloat16).view(x.shape)


@dataclass(frozen=True)
class Survival:
    """What rounding left of one step's update. 0-dim float32 tensors on the device."""

    update_kept: torch.Tensor
    """The projection of the change that was made on the change that was meant, as a share of it: 1 where nothing is
    lost on average, 0 where no weight moved."""
    share_updated: torch.Tensor
    """The share of all weights whose value changed."""


@dataclass
class _Measured:
    """Sums over what was stepped so far, 0-dim on the device."""

    projected: list[torch.Tensor] = field(default_factory=list)
    meant: list[torch.Tensor] = field(default_factory=list)
    changed: list[torch.Tensor] = field(default_factory=list)


@dataclass
class _Pass:
    """One step, while it is made."""

    learning_rate: float
    rounding: torch.Generator | int | None
    measured: _Measured | None
    clip_each: bool = False
    scale: float = 1.0
    """What gradients are multiplied by."""
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    """Buckets, as they were stepped."""


class Optimizer:
    """AdamW over named parameters: float32 ones in place, bfloat16 ones through a float32 copy.

    Parameters are stepped in buckets, so beside the states a step needs float32 copies of one bucket's weights and
    gradients, never of all. Parameters without a gradient are left alone, as by torch.

    A training step is `begin`, backward, `norm`, `finish`. (`zero_grad`, `clip` and `step` are the same by hand; they
    never release.)
    """

    def __init__(
        self,
        options: OptimizerOptions,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        chunk_numel: int = CHUNK_NUMEL,
    ) -> None:
        """Take the trainable `parameters` by name, all on one device. Raises `UserError` for weights neither float32
        nor bfloat16, and where host memory does not suffice for states."""
        assert parameters, "nothing to train"
        assert len({id(p) for p in parameters.values()}) == len(parameters), "a parameter appears under two names"
        for name, parameter in parameters.items():
            assert parameter.requires_grad, f"{name} is frozen"
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise UserError(
                    f"'{name}' is {parameter.dtype}, but only float32 and bfloat16 weights can be trained: choose one"
                )
        devices = {parameter.device for parameter in parameters.values()}
        assert len(devices) == 1, f"parameters lie on several devices: {devices}"
        self.options = options
        self.parameters = dict(parameters)
        self._device = devices.pop()
        eight_bit = options.kind == "adamw8bit"
        self._buckets = make_buckets(parameters, eight_bit=eight_bit, master=options.master, chunk_numel=chunk_numel)
        self._eight_bit = _EightBit(self._device) if any(bucket.eight_bit for bucket in self._buckets) else None
        if self._eight_bit is not None and self._device.type == "cuda" and options.one_pass == "auto":
            self._eight_bit.go_over_memory_once()
        sizes = [bucket.num_bytes for bucket in self._buckets]
        self._states: States = (HostStates if options.states == "cpu" else DeviceStates)(sizes, self._device)
        self._noise: torch.Generator | None = None
        self._begun: _Pass | None = None
        self._following: dict[int, int] = {}
        if options.release:
            for name, parameter in self.parameters.items():
                if is_large(parameter, chunk_numel):
                    buckets = [bucket for bucket in self._buckets if bucket.pieces[0].name == name]
                    parameter.register_post_accumulate_grad_hook(functools.partial(self._release, name, buckets))

    @property
    def state_bytes(self) -> int:
        """Memory that states and master copies take once every weight was stepped, wherever they rest."""
        return sum(bucket.num_bytes for bucket in self._buckets)

    @property
    def num_updates(self) -> int:
        """Updates that weights have had or begun to have, all in all: while it is the same, none has moved."""
        return sum(piece.num_steps for bucket in self._buckets for piece in bucket.pieces)

    def reserve(self) -> None:
        """Take the memory of all states now, so that the first step needs what every step needs."""
        for bucket in self._buckets:
            self._states.at_rest(bucket.index)

    # --- one training step ------------------------------------------------------------------------------------------

    def begin(self, learning_rate: float, rounding: torch.Generator | int | None, *, measure: bool = False) -> None:
        """Forget the gradients; from here on backward may step what is released.

        `rounding` draws the stochastic rounding: a seed, from which each bucket draws by itself, so that the order does
        not matter; or, unless weights are released, a generator on their device. None will do where nothing is rounded
        so. `measure`: find out what survives of the update.
        """
        self.zero_grad()
        clip_each = self.options.clip == "parameter" and self.options.clip_norm > 0
        self._begun = _Pass(learning_rate, rounding, _Measured() if measure else None, clip_each)
        if self.options.release:
            assert not isinstance(rounding, torch.Generator), "released weights come in any order: give a seed"
            self._states.begin()

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """The global norm of the gradients, before any clipping, 0-dim float32 on the device: nothing waits for it
        here. Where it is not finite, it is the caller's to stop before `finish` (released weights are then spoiled
        already, in memory)."""
        now = self._begun
        assert now is not None, "begin first"
        now.norms |= {
            name: _norm(parameter) for name, parameter in self.parameters.items() if parameter.grad is not None
        }
        assert now.norms, "no gradients: call backward first"
        return torch.linalg.vector_norm(torch.stack(list(now.norms.values())))

    @torch.no_grad()
    def finish(self, norm: float) -> Survival | None:
        """Step, clipped, what has a gradient still. `norm` is the value of `norm()`, which the caller has read to see
        whether it is finite: so clipping costs no pass of its own. Gradients may be left scaled."""
        now, options = self._begun, self.options
        assert now is not None, "begin first"
        if options.clip == "global" and options.clip_norm > 0:
            now.scale = min(1.0, options.clip_norm / (norm + 1e-6))
        if not options.release:
            self._states.begin()
        self._step_all(now)
        self._states.end()
        self._begun = None
        return self._survival(now)

    def _release(self, name: str, buckets: list[Bucket], weight: torch.Tensor) -> None:
        """Called by backward when the gradient of a large weight is whole."""
        now = self._begun
        if now is None:  # a backward that is not of a training step
            return
        assert name not in now.norms, f"a second gradient for {name} within a step"
        with torch.no_grad():
            now.norms[name] = _norm(self.parameters[name])
            for bucket in buckets:
                self._step_bucket(bucket, self._following.get(bucket.index), now)
        weight.grad = None

    # --- by hand ----------------------------------------------------------------------------------------------------

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
        total = torch.linalg.vector_norm(torch.stack([_norm(parameter) for parameter in graded]))
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(graded, max_norm, total)
        return total

    @torch.no_grad()
    def step(
        self, learning_rate: float, rounding: torch.Generator | int | None, *, share_updated: bool = False
    ) -> torch.Tensor | None:
        """Step every parameter that has a gradient, and leave the gradients as they are. `rounding` as in `begin`.

        With `share_updated`, returns the share of all weights whose value changed, 0-dim float32 on the device: near 0
        means that updates are rounded away.
        """
        now = _Pass(learning_rate, rounding, _Measured() if share_updated else None)
        self._states.begin()
        self._step_all(now)
        self._states.end()
        survival = self._survival(now)
        return None if survival is None else survival.share_updated

    # --- buckets ----------------------------------------------------------------------------------------------------

    def _step_all(self, now: _Pass) -> None:
        """Step the buckets in which something has a gradient."""
        graded = [bucket for bucket in self._buckets if any(piece.weight.grad is not None for piece in bucket.pieces)]
        for i, bucket in enumerate(graded):
            self._step_bucket(bucket, graded[i + 1].index if i + 1 < len(graded) else None, now)
        self._following = dict(zip(now.order, now.order[1:], strict=False))  # backward's order is the next step's too

    def _step_bucket(self, bucket: Bucket, following: int | None, now: _Pass) -> None:
        if bucket.eight_bit and self._device.type == "cuda":
            # bitsandbytes launches this kernel on the default stream, whichever is current.
            assert torch.cuda.current_stream(self._device) == torch.cuda.default_stream(self._device)
        now.order.append(bucket.index)
        buffer = self._states.take(bucket.index, following)
        pieces = [piece for piece in bucket.pieces if piece.weight.grad is not None]
        states = [{name: of.of(buffer) for name, of in piece.fields.items()} for piece in pieces]
        for piece, state in zip(pieces, states, strict=True):
            if piece.num_steps == 0 and "master" in state:
                state["master"].copy_(piece.cut(piece.weight.detach()))
            piece.num_steps += 1
        before = [piece.cut(piece.weight.detach()).clone() for piece in pieces] if now.measured else []
        meant = (self._at_once if self._goes_over_memory_once(bucket, now) else self._in_passes)(
            bucket, pieces, states, now
        )
        if now.measured is not None:
            for piece, old, intended in zip(pieces, before, meant, strict=True):
                made = piece.cut(piece.weight.detach()).to(torch.float32, copy=True).sub_(old)
                now.measured.projected.append(made.dot(intended))
                now.measured.meant.append(intended.dot(intended))
                now.measured.changed.append(made.count_nonzero())
        self._states.put(bucket.index)

    def _in_passes(
        self, bucket: Bucket, pieces: list[Piece], states: list[dict[str, torch.Tensor]], now: _Pass
    ) -> list[torch.Tensor]:
        """Step a float32 copy of the pieces and round it into the weights. What is measured: the change that was meant
        by each, flat float32."""
        values = [
            state["master"] if "master" in state else _float32(piece, piece.weight.detach())
            for piece, state in zip(pieces, states, strict=True)
        ]
        gradients = [_float32(piece, _gradient(piece.weight)) for piece in pieces]
        stood = [value.clone() for value in values] if now.measured else []
        if now.clip_each:
            for piece, gradient in zip(pieces, gradients, strict=True):
                gradient.mul_(self._own_scale(piece, now))
        if bucket.eight_bit:
            assert self._eight_bit is not None
            self._eight_bit.update(self.options, pieces, values, gradients, states, now.learning_rate, now.scale)
        else:
            _update(self.options, pieces, values, gradients, states, now.learning_rate, now.scale)
        del gradients
        meant = [value - old for value, old in zip(values, stood, strict=False)]
        del stood
        generator = self._generator(now.rounding, bucket)
        for piece, value in zip(pieces, values, strict=True):
            self._bring_back(piece, value, generator)
        return meant

    def _at_once(
        self, bucket: Bucket, pieces: list[Piece], states: list[dict[str, torch.Tensor]], now: _Pass
    ) -> list[torch.Tensor]:
        """The same by one kernel for each piece."""
        assert self._eight_bit is not None
        rounding = now.rounding if isinstance(now.rounding, int) else 0  # None: nothing is drawn
        seeds = np.random.SeedSequence((rounding, bucket.index)).generate_state(len(pieces), np.uint64)
        together = torch.full((), now.scale, device=self._device)
        meant: list[torch.Tensor] = []
        for piece, state, seed in zip(pieces, states, seeds, strict=True):
            weight = piece.cut(piece.weight.detach())
            stepped = state.get("master", weight)
            stood = stepped.to(torch.float32, copy=True) if now.measured else None
            after = torch.empty_like(stood) if stood is not None else None
            scale = self._own_scale(piece, now) if now.clip_each else together
            gradient = piece.cut(_gradient(piece.weight))
            self._eight_bit.update_at_once(
                self.options, piece, stepped, weight, gradient, after, state, now.learning_rate, scale, int(seed)
            )
            if after is not None and stood is not None:
                meant.append(after.sub_(stood))
        return meant

    def _goes_over_memory_once(self, bucket: Bucket, now: _Pass) -> bool:
        """A weight that is not contiguous has no flat view, and a generator cannot be read without waiting."""
        return (
            bucket.eight_bit
            and self._eight_bit is not None
            and self._eight_bit.one_pass is not None
            and not isinstance(now.rounding, torch.Generator)
            and all(piece.weight.is_contiguous() for piece in bucket.pieces)
        )

    def _own_scale(self, piece: Piece, now: _Pass) -> torch.Tensor:
        """What clips a weight's gradient by itself, 0-dim."""
        return (self.options.clip_norm / (now.norms[piece.name] + 1e-6)).clamp(max=1.0)

    def _bring_back(self, piece: Piece, value: torch.Tensor, generator: torch.Generator | None) -> None:
        """Round what was stepped into the weight. Uses up `value`, unless it is a master copy."""
        weight = piece.weight.detach()
        if weight.dtype == torch.float32 and weight.is_contiguous():
            return  # stepped in place
        if weight.dtype == torch.bfloat16 and "master" not in piece.fields and self.options.rounding == "stochastic":
            assert generator is not None or weight.is_meta, "stochastic rounding draws from a generator"
            value = stochastic_round_(value, generator)
        to = piece.cut(weight) if weight.is_contiguous() else weight
        to.copy_(value.view(to.shape))

    def _generator(self, rounding: torch.Generator | int | None, bucket: Bucket) -> torch.Generator | None:
        """What draws the rounding of a bucket."""
        if not isinstance(rounding, int):
            return rounding
        if self._device.type == "meta":  # where memory is only counted nothing is drawn
            return None
        if self._noise is None:
            self._noise = torch.Generator(self._device)
        mixed = np.random.SeedSequence((rounding, bucket.index)).generate_state(1, np.uint64)[0]
        return self._noise.manual_seed(int(mixed >> np.uint64(1)))

    def _survival(self, now: _Pass) -> Survival | None:
        if now.measured is None:
            return None
        num_weights = sum(parameter.numel() for parameter in self.parameters.values())
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        projected, meant, changed = (
            torch.stack([zero, *(one.to(zero.dtype) for one in sums)]).sum()
            for sums in (now.measured.projected, now.measured.meant, now.measured.changed)
        )
        kept = torch.where(meant > 0, projected / meant, 1.0)  # of nothing, nothing is lost
        return Survival(kept.float(), (changed / num_weights).float())

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a later run needs to step on exactly as this one would have: tensors, and the rest as plain JSON values.

        Tensors are copies on the CPU, keyed "<parameter>.<state>"; their dtypes are the states' own (float32, uint8).
        The rest is `{"kind": ..., "master": ..., "parameters": {name: {"shape", "tensors", "numbers"}}}`. Settings are
        not part of it: they come from the options of the run that goes on, which may keep its states elsewhere. The
        generator's state is its owner's to keep.
        """
        parts: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in self.parameters}
        described: dict[str, Any] = {
            name: {"shape": list(parameter.shape), "tensors": [], "numbers": {}}
            for name, parameter in self.parameters.items()
        }
        for bucket in self._buckets:
            if not any(piece.num_steps for piece in bucket.pieces):
                continue
            buffer = self._states.at_rest(bucket.index).to("cpu")
            for piece in bucket.pieces:
                if not piece.num_steps:  # none yet: the parameter had no gradient so far
                    continue
                for key, of in piece.fields.items():
                    parts[piece.name].setdefault(key, []).append(of.of(buffer))
                if bucket.eight_bit:
                    assert self._eight_bit is not None
                    parts[piece.name] |= {key: [code.cpu()] for key, code in self._eight_bit.codes.items()}
                    described[piece.name]["numbers"] = {"step": piece.num_steps}
                else:
                    parts[piece.name]["step"] = [torch.tensor([float(piece.num_steps)])]
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            described[name]["tensors"] = list(parts[name])
            for key in list(parts[name]):
                whole = torch.cat(parts[name].pop(key))  # copies, also where there is one piece
                tensors[f"{name}.{key}"] = whole.view(_shape(key, parameter, whole.numel()))
        return tensors, {"kind": self.options.kind, "master": self.options.master, "parameters": described}

    def load_state(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `state` returned, in this process or another; the given tensors are copied.

        Raises `UserError`, before anything is changed, where it is of another kind, other parameters, or incomplete.
        """
        self._refuse_other_state(tensors, meta)
        described = meta["parameters"]
        for bucket in self._buckets:
            had_steps = any(piece.num_steps for piece in bucket.pieces)
            if not had_steps and not any(described[piece.name]["tensors"] for piece in bucket.pieces):
                continue
            buffer = self._states.at_rest(bucket.index).zero_()
            for piece in bucket.pieces:
                piece.num_steps = 0
                if not described[piece.name]["tensors"]:  # none yet: the parameter had no gradient so far
                    continue
                for key, of in piece.fields.items():
                    saved = tensors[f"{piece.name}.{key}"].reshape(-1)
                    start = piece.start // BLOCK_NUMEL if key.startswith("absmax") else piece.start
                    of.of(buffer).copy_(saved[start : start + of.shape[0]])
                numbers = described[piece.name]["numbers"]
                piece.num_steps = int(numbers["step"] if numbers else tensors[f"{piece.name}.step"].item())

    def _refuse_other_state(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        mend = "resume with the options of the saved run, or start without its optimizer state"
        if meta["kind"] != self.options.kind:
            raise UserError(
                f"the saved optimizer state is of kind '{meta['kind']}', "
                f"but optimizer.kind is '{self.options.kind}': {mend}"
            )
        if meta.get("master", False) != self.options.master:
            raise UserError(
                f"the saved optimizer state is {'with' if meta.get('master', False) else 'without'} float32 master "
                f"weights, but optimizer.master is {str(self.options.master).lower()}: {mend}"
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
        misshapen = [key for key, tensor in tensors.items() if not self._fits(key, tensor)]
        if misshapen:
            raise UserError(
                f"the saved optimizer state is not as torch or bitsandbytes keep it here: {_some(sorted(misshapen))}: "
                "resume with the version that the run was saved with, or start without its optimizer state"
            )

    def _fits(self, key: str, tensor: torch.Tensor) -> bool:
        """Whether a saved tensor is of the dtype and size that it has here; codes of 8-bit numbers, of the values."""
        name, _, state = key.rpartition(".")
        if state == "step":
            return tensor.numel() == 1
        if self._eight_bit is not None and state in self._eight_bit.codes:
            return torch.equal(self._eight_bit.codes[state].cpu(), tensor.cpu())
        fields = [piece.fields.get(state) for bucket in self._buckets for piece in bucket.pieces if piece.name == name]
        return tensor.numel() == sum(of.shape[0] for of in fields if of is not None) and all(
            of is not None and of.dtype == tensor.dtype for of in fields
        )


class _EightBit:
    """AdamW on 8-bit moments: bitsandbytes' kernel, which reads and writes them in place.

    The kernel itself, not its optimizer class, which waits for the device after each weight.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            # Here, because importing it takes seconds.
            from bitsandbytes.functional import create_dynamic_map, optimizer_update_8bit_blockwise
        except ImportError as error:
            raise UserError(
                f"optimizer.kind 'adamw8bit' needs bitsandbytes ({error}): pip install bitsandbytes, or choose 'adamw'"
            ) from error
        self._kernel = optimizer_update_8bit_blockwise
        self.codes = {
            "qmap1": create_dynamic_map(signed=True).to(device),
            "qmap2": create_dynamic_map(signed=False).to(device),
        }
        """What the 256 values of a byte stand for, (256,) float32: of the mean, and of the mean of squares."""
        self._middles: tuple[torch.Tensor, torch.Tensor] | None = None
        self.one_pass: ModuleType | None = None
        """train/one_pass.py, once it is chosen."""

    def go_over_memory_once(self) -> None:
        """Use the one kernel from here on, if it is what bitsandbytes' kernel is on this device."""
        try:
            from train import one_pass
        except ImportError as error:
            warn(
                f"optimizer.one_pass: there is no Triton ({error}), so stepping takes six times as much memory traffic"
            )
            return
        codes = self.codes["qmap1"], self.codes["qmap2"]
        if not one_pass.agrees(self._kernel, codes):
            warn("optimizer.one_pass: its kernel is not what bitsandbytes' is on this device, so that one is used")
            return
        self.one_pass, self._middles = one_pass, (one_pass.middles_of(codes[0]), one_pass.middles_of(codes[1]))

    def update_at_once(
        self,
        options: OptimizerOptions,
        piece: Piece,
        stepped: torch.Tensor,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        after: torch.Tensor | None,
        state: dict[str, torch.Tensor],
        learning_rate: float,
        scale: torch.Tensor,
        seed: int,
    ) -> None:
        """Step and round a piece: `stepped` is its master copy, or the weight."""
        one_pass = self.one_pass
        assert one_pass is not None
        if weight.dtype == torch.float32:
            mode = one_pass.FLOAT32
        elif stepped is not weight:
            mode = one_pass.MASTER
        else:
            mode = one_pass.STOCHASTIC if options.rounding == "stochastic" else one_pass.NEAREST
        one_pass.adamw(
            stepped=stepped, weight=weight, gradient=gradient, after=after, state=state,
            codes=(self.codes["qmap1"], self.codes["qmap2"]), middles=self._middles, scale=scale, mode=mode, seed=seed,
            num_steps=piece.num_steps, learning_rate=learning_rate, beta1=options.beta1, beta2=options.beta2,
            epsilon=options.epsilon, weight_decay=options.weight_decay,
        )  # fmt: skip

    def update(
        self,
        options: OptimizerOptions,
        pieces: list[Piece],
        values: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
        learning_rate: float,
        scale: float,
    ) -> None:
        """Step float32 `values` by `scale` times their `gradients`; `num_steps` of the pieces count this step."""
        for piece, value, gradient, state in zip(pieces, values, gradients, states, strict=True):
            self._kernel(
                "adam", gradient, value, state["state1"], state["state2"],
                options.beta1, options.beta2, 0.0, 0.0, options.epsilon, piece.num_steps, learning_rate,
                self.codes["qmap1"], self.codes["qmap2"], state["absmax1"], state["absmax2"],
                options.weight_decay, gnorm_scale=scale,
            )  # fmt: skip


def _update(
    options: OptimizerOptions,
    pieces: list[Piece],
    values: list[torch.Tensor],
    gradients: list[torch.Tensor],
    states: list[dict[str, torch.Tensor]],
    learning_rate: float,
    scale: float,
) -> None:
    """AdamW on 32-bit moments, torch's, in one fused call: step float32 `values` by `scale` times their `gradients`."""
    if scale != 1.0:
        for gradient in gradients:
            gradient.mul_(scale)
    # The fused kernel counts on the device, one up.
    steps = [torch.full((), float(piece.num_steps - 1), device=values[0].device) for piece in pieces]
    adamw(
        values, gradients, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
        steps, fused=True, amsgrad=False, maximize=False,
        beta1=options.beta1, beta2=options.beta2, lr=learning_rate,
        weight_decay=options.weight_decay, eps=options.epsilon,
    )  # fmt: skip


def _float32(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
    """The piece's part of a weight or gradient in float32, flat: a view where that is possible."""
    return piece.cut(tensor).to(torch.float32).contiguous()


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _norm(parameter: torch.nn.Parameter) -> torch.Tensor:
    """In float32 also for bfloat16 gradients: torch's own total norm would be rounded to bfloat16, to 0.4 %."""
    return torch.linalg.vector_norm(_gradient(parameter), dtype=torch.float32)


def _shape(key: str, parameter: torch.Tensor, numel: int) -> tuple[int, ...]:
    """The shape of a state in a checkpoint: one value for each weight, or for each block, or one number."""
    if key == "step":
        return ()
    per_weight = not key.startswith(("absmax", "qmap"))
    return tuple(parameter.shape) if per_weight else (numel,)


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
