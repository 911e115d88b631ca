"""How t is drawn: as the share of the way from data, 0, to noise, 1."""

from __future__ import annotations

import math

import torch

from train.objectives.options import Kind, ObjectiveOptions


def draw(
    options: ObjectiveOptions, kind: Kind, B: int, generator: torch.Generator, device: torch.device | str
) -> torch.Tensor:
    """(B,) float32 in [0, 1] from the chosen distribution. `generator` must be on `device`.

    After SD3 (arXiv 2403.03206): logit-normal is eq. 19, mode eq. 20, the shift eq. 23. The shift is applied to
    logit-normal t, as SD3 trained and as sd-scripts does. Then logit(t') = logit(t) + ln(shift): `shifted` equals
    `logit_normal` with its mean raised by ln(shift), and is here because the field speaks of shifts.
    """
    timesteps = options.timesteps_of(kind)
    if timesteps in ("uniform", "mode"):
        u = torch.rand(B, generator=generator, device=device, dtype=torch.float32)
        if timesteps == "uniform":
            return u
        t = 1 - u - options.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return t.clamp(0, 1)  # rounding may step a hair outside
    normal = torch.randn(B, generator=generator, device=device, dtype=torch.float32)
    t = torch.sigmoid(options.logit_mean + options.logit_std * normal)
    if timesteps == "shifted":
        t = options.shift * t / (1 + (options.shift - 1) * t)
    return t
