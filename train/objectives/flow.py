"""Rectified flow (arXiv 2209.03003; FLUX, SD3). Time runs as in its papers: t = 0 is the data, t = 1 is pure noise."""

from __future__ import annotations

import math
from typing import final

import torch

from train.objectives.base import Objective

SMALLEST_SIGMA = 1e-3
"""Where `sigma_sqrt` stops growing: the smallest step of the field's schedule of 1,000."""


@final
class FlowMatching(Objective):
    """x_t = (1 - t) x_0 + t noise, target = d x_t / dt = noise - x_0."""

    kind = "flow"

    def time_at(self, shares: torch.Tensor) -> torch.Tensor:
        """t is the share itself."""
        return shares

    def rates(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1 - t, t

    def target(self, x_0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return noise - x_0

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
