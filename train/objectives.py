"""What the model learns to predict: how t is drawn, how x_0 is noised, what the target is, how losses are weighed.

Letters: B samples in the batch, T tokens per sample, C channels per token. Everything works on any (B, ...) latents;
(B, T, C) are FLUX's. Time runs as in the rectified-flow papers: t = 0 is the data, t = 1 is pure noise.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch

from shared.errors import UserError, nearest

Timesteps = Literal["uniform", "logit_normal", "mode", "shifted"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]

MODE_SCALE_MIN, MODE_SCALE_MAX = -1.0, 2 / (math.pi - 2)
"""Between these, `mode`'s map from u to t is monotonic (arXiv 2403.03206, eq. 20), so it has a density."""
SMALLEST_SIGMA = 1e-3
"""Where `sigma_sqrt` stops growing: the smallest step of the field's schedule of 1,000."""

_EFFECTIVE: dict[str, frozenset[str]] = {
    "uniform": frozenset(),
    "logit_normal": frozenset({"logit_mean", "logit_std"}),
    "mode": frozenset({"mode_scale"}),
    "shifted": frozenset({"logit_mean", "logit_std", "shift"}),
}


@dataclass(frozen=True)
class ObjectiveOptions:
    """Which noise levels are trained, and how much each counts."""

    timesteps: Timesteps = "logit_normal"
    """How t is drawn. `logit_normal` prefers the middle (SD3); `uniform` treats all t alike; `mode` prefers the
    middle but leaves the ends more; `shifted` is logit-normal moved to high noise. Layout is decided near t = 1: where
    the model follows the condition too late or not at all, try `shifted`."""
    logit_mean: float = 0.0
    """Mean of logit(t), for `logit_normal` and `shifted`. Above 0 trains high noise more (layout), below 0 detail.
    As in SD3's paper; diffusers' scripts look t up in a descending table, so their mean has the opposite sign."""
    logit_std: float = 1.0
    """Standard deviation of logit(t), for `logit_normal` and `shifted`. Raise it to reach t near 0 and 1 more often."""
    mode_scale: float = 1.29
    """For `mode`: above 0 prefers the middle, below 0 the ends, 0 is uniform; from -1 to 1.75. SD3's best is 1.29."""
    shift: float = 3.0
    """For `shifted`: t' = shift t / (1 + (shift - 1) t). Above 1 moves t towards noise; SD3 used 3 at 1,024 pixels."""
    weighting: Weighting = "none"
    """Weight of a sample's loss by its t. `none` suits flow matching; `sigma_sqrt` is 1 / t^2 (detail above all),
    `cosmap` is 2 / (pi (1 - 2 t + 2 t^2)) (the middle, twice the ends). For ablations."""

    def check(self) -> None:
        """Refuse values that no distribution has. Raises `UserError`."""
        if self.timesteps not in get_args(Timesteps):
            raise UserError(
                f"objective.timesteps '{self.timesteps}' is unknown: {nearest(self.timesteps, get_args(Timesteps))}"
            )
        if self.weighting not in get_args(Weighting):
            raise UserError(
                f"objective.weighting '{self.weighting}' is unknown: {nearest(self.weighting, get_args(Weighting))}"
            )
        if not math.isfinite(self.logit_mean):
            raise UserError(f"objective.logit_mean must be a finite number, but is {self.logit_mean}")
        for name in ("logit_std", "shift"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"objective.{name} must be above 0, but is {value}")
        if not MODE_SCALE_MIN <= self.mode_scale <= MODE_SCALE_MAX:
            raise UserError(
                f"objective.mode_scale must be from {MODE_SCALE_MIN:g} to {MODE_SCALE_MAX:.2f}, "
                f"but is {self.mode_scale}"
            )

    def unused(self) -> list[str]:
        """Options that differ from their default but have no effect under the chosen `timesteps`: to be warned of."""
        of_timesteps = frozenset.union(*_EFFECTIVE.values())
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.name in of_timesteps - _EFFECTIVE[self.timesteps] and getattr(self, field.name) != field.default
        ]


@dataclass
class Noised:
    """A batch on its way from data to noise, and what to predict there."""

    x_t: torch.Tensor
    """(B, T, C) in x_0's dtype: the model's input."""
    t: torch.Tensor
    """(B,) float32 in [0, 1]: the model's time; 0 is data, 1 is noise."""
    target: torch.Tensor
    """(B, T, C) float32: what the model should predict."""
    weight: torch.Tensor
    """(B,) float32: how much each sample's loss counts."""


class Objective(Protocol):
    """What the trainer asks of an objective."""

    def sample_t(self, B: int, generator: torch.Generator, device: torch.device | str) -> torch.Tensor:
        """Draw t, (B,) float32, from `generator`, which is on `device`: for training. Apart from the noise, so that
        the times of coming batches can be known before the batches are there."""
        ...

    def noise(self, x_0: torch.Tensor, t: torch.Tensor, generator: torch.Generator) -> Noised:
        """Noise x_0 (B, T, C) at t (B,) with noise drawn from `generator`: for training."""
        ...

    def noise_at(self, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> Noised:
        """Noise x_0 (B, T, C) at given t (B,) with given `noise` (B, T, C): for held-out losses that repeat exactly."""
        ...

    def loss(self, prediction: torch.Tensor, noised: Noised) -> torch.Tensor:
        """Each sample's weighted loss, (B,) float32."""
        ...


class FlowMatching:
    """Rectified flow: x_t = (1 - t) x_0 + t noise, target = d x_t / dt = noise - x_0 (arXiv 2209.03003; FLUX, SD3)."""

    def __init__(self, options: ObjectiveOptions) -> None:
        self.options = options

    def sample_t(self, B: int, generator: torch.Generator, device: torch.device | str) -> torch.Tensor:
        """Draw t, (B,) float32 in [0, 1], from the chosen distribution. `generator` must be on `device`.

        After SD3 (arXiv 2403.03206): logit-normal is eq. 19, mode eq. 20, the shift eq. 23. The shift is applied to
        logit-normal t, as SD3 trained and as sd-scripts does. Then logit(t') = logit(t) + ln(shift): `shifted` equals
        `logit_normal` with its mean raised by ln(shift), and is here because the field speaks of shifts.
        """
        options = self.options
        if options.timesteps in ("uniform", "mode"):
            u = torch.rand(B, generator=generator, device=device, dtype=torch.float32)
            if options.timesteps == "uniform":
                return u
            t = 1 - u - options.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
            return t.clamp(0, 1)  # rounding may step a hair outside
        normal = torch.randn(B, generator=generator, device=device, dtype=torch.float32)
        t = torch.sigmoid(options.logit_mean + options.logit_std * normal)
        if options.timesteps == "shifted":
            t = options.shift * t / (1 + (options.shift - 1) * t)
        return t

    def noise(self, x_0: torch.Tensor, t: torch.Tensor, generator: torch.Generator) -> Noised:
        """Noise x_0 (B, T, C) at t (B,) with noise drawn from `generator` (on x_0's device).

        Noise is drawn in float32 and then cast, so that one seed means one noise whatever the dtype of x_0.
        """
        noise = torch.randn(x_0.shape, generator=generator, device=x_0.device, dtype=torch.float32)
        return self.noise_at(x_0, t, noise.to(x_0.dtype))

    def noise_at(self, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> Noised:
        """Noise x_0 (B, T, C) at t (B,) with `noise` (B, T, C). Nothing is drawn.

        x_t is formed in float32 and rounded once: in bf16, 1 - t, both products and the sum would each be rounded, and
        t itself cut to 8 bits would be another noise level than the one the model is told. The target stays float32,
        because the loss is computed there.
        """
        assert t.shape == x_0.shape[:1], f"one t per sample: {tuple(t.shape)} for {tuple(x_0.shape)}"
        assert noise.shape == x_0.shape, f"noise {tuple(noise.shape)} for x_0 {tuple(x_0.shape)}"
        t = t.float()
        data, noise = x_0.float(), noise.float()
        t_ = t.view(-1, *(1 for _ in x_0.shape[1:]))
        x_t = (1 - t_) * data + t_ * noise
        return Noised(x_t=x_t.to(x_0.dtype), t=t, target=noise - data, weight=self.weight(t))

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """The loss weight at t (B,), (B,) float32 (arXiv 2403.03206, section 3.1; names and formulas of diffusers).

        `sigma_sqrt` is, despite its name, 1 / t^2; below t = 0.001 it stays at its value there instead of running to
        infinity.
        """
        match self.options.weighting:
            case "sigma_sqrt":
                return t.clamp(min=SMALLEST_SIGMA) ** -2
            case "cosmap":
                return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
            case _:
                return torch.ones_like(t)

    def loss(self, prediction: torch.Tensor, noised: Noised) -> torch.Tensor:
        """Mean squared error of `prediction` (B, T, C) over tokens and channels, in float32, times the weight: (B,).

        Not reduced over the batch, so that losses can be reported per t and per bucket.
        """
        assert prediction.shape == noised.target.shape, f"{tuple(prediction.shape)} for {tuple(noised.target.shape)}"
        return noised.weight * (prediction.float() - noised.target).square().flatten(1).mean(1)
