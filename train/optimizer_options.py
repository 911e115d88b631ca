"""How the weights are stepped, as the user says it, and the learning rate of each step that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from shared.errors import UserError, nearest

Kind = Literal["adamw", "adamw8bit", "prodigy"]
Schedule = Literal["constant", "cosine", "linear"]
Rounding = Literal["stochastic", "nearest"]
Clip = Literal["global", "parameter"]
Place = Literal["device", "cpu"]
OnePass = Literal["auto", "no"]


@dataclass(frozen=True)
class OptimizerOptions:
    """How the weights are stepped."""

    kind: Kind = "adamw8bit"
    """`adamw8bit` keeps Adam's two moments in 8 bits (2 bytes per weight, bitsandbytes); `adamw` in float32 (8 bytes).
    Choose `adamw` where memory allows and an experiment must not depend on quantized moments. `prodigy` (prodigyopt)
    finds the learning rate by itself and takes 16 bytes per weight, which must be in float32: for a LoRA."""
    learning_rate: float = 2e-5
    """The peak of the schedule. 1e-5 to 5e-5 is usual for a FLUX ControlNet, 1e-4 to 4e-4 for a LoRA, below 1e-5 for a
    whole base; lower it if the loss jumps. With `prodigy` a factor of what that finds: 1."""
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
        if self.kind == "prodigy":
            self._check_prodigy()
        if self.release and self.clip == "global" and self.clip_norm > 0:
            raise UserError(
                "optimizer.release steps each weight before the other gradients are there, so their global norm cannot "
                "clip them: choose optimizer.clip parameter, or optimizer.clip_norm 0"
            )

    def _check_prodigy(self) -> None:
        if self.learning_rate < 0.01:
            raise UserError(
                f"optimizer.learning_rate {self.learning_rate:g} would slow what prodigy finds by as much: with "
                "optimizer.kind prodigy it is a factor, set it to 1"
            )
        for name, value in (("release", self.release), ("master", self.master), ("states", self.states == "cpu")):
            if value:
                raise UserError(
                    f"optimizer.{name} {getattr(self, name)} is not for prodigy, whose few weights are in float32 on "
                    "the device: leave it out, or choose adamw8bit"
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
            "rounding": self.rounding != "stochastic" and (self.master or self.kind == "prodigy"),
            "one_pass": self.one_pass != "auto" and self.kind != "adamw8bit",
            "survival_every": self.survival_every != OptimizerOptions.survival_every and self.kind == "prodigy",
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
