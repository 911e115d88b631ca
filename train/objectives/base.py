"""What the trainer asks of an objective, and what all of them share.

Letters: B samples in the batch, T tokens per sample, C channels per token, J times. Everything works on any (B, ...)
latents; (B, T, C) are FLUX's, SD's are (B, C, h, w).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from shared import drawn
from train.objectives import timesteps
from train.objectives.options import Kind, ObjectiveOptions


@dataclass
class Noised:
    """A batch on its way from data to noise, and what to predict there."""

    x_t: torch.Tensor
    """(B, ...) in x_0's dtype: the model's input."""
    t: torch.Tensor
    """(B,) float32: the model's time."""
    target: torch.Tensor
    """(B, ...) float32: what the model should predict."""
    weight: torch.Tensor
    """(B,) float32: how much each sample's loss counts."""


class Objective(ABC):
    """How data become noise, x_t = signal(t) x_0 + sigma(t) noise, and what is predicted on the way."""

    kind: ClassVar[Kind]

    def __init__(self, options: ObjectiveOptions) -> None:
        self.options = options

    @property
    def scheduler(self) -> dict[str, Any]:
        """See `ObjectiveOptions.scheduler`."""
        return self.options.scheduler(self.kind)

    @abstractmethod
    def time_at(self, shares: torch.Tensor) -> torch.Tensor:
        """The model's times, (J,) float32, at these shares (J,) of the way from data, 0, to noise, 1."""

    @abstractmethod
    def rates(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(signal, sigma) at t (B,), each (B,) float32: how much of the data and of the noise is in x_t."""

    @abstractmethod
    def target(self, x_0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the model should predict, (B, ...), all float32; the rates are shaped to go with x_0."""

    @abstractmethod
    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """The loss weight at t (B,), (B,) float32."""

    @final
    def sample_t(self, B: int, generator: torch.Generator, device: torch.device | str) -> torch.Tensor:
        """Draw t, (B,) float32, from `generator`, which is on `device`: for training. Apart from the noise, so that
        the times of coming batches can be known before the batches are there."""
        return self.time_at(timesteps.draw(self.options, self.kind, B, generator, device))

    @final
    def noise(self, x_0: torch.Tensor, t: torch.Tensor, generator: torch.Generator) -> Noised:
        """Noise x_0 (B, ...) at t (B,) with noise drawn from `generator` (on x_0's device): for training.

        Noise is drawn in float32 and then cast, so that one seed means one noise whatever the dtype of x_0.
        """
        noise = drawn.normal(x_0.shape, generator, x_0.device)
        return self.noise_at(x_0, t, noise.to(x_0.dtype))

    @final
    def noise_at(self, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> Noised:
        """Noise x_0 (B, ...) at given t (B,) with given `noise` (B, ...): nothing is drawn, so that held-out losses
        repeat exactly.

        x_t is formed in float32 and rounded once: in bf16 the rates, both products and the sum would each be rounded,
        and t itself cut to 8 bits would be another noise level than the one the model is told. The target stays
        float32, because the loss is computed there.
        """
        assert t.shape == x_0.shape[:1], f"one t per sample: {tuple(t.shape)} for {tuple(x_0.shape)}"
        assert noise.shape == x_0.shape, f"noise {tuple(noise.shape)} for x_0 {tuple(x_0.shape)}"
        t, data, noise = t.float(), x_0.float(), noise.float()
        signal, sigma = (rate.view(-1, *(1 for _ in x_0.shape[1:])) for rate in self.rates(t))
        x_t = signal * data + sigma * noise
        return Noised(x_t.to(x_0.dtype), t, self.target(data, noise, signal, sigma), self.weight(t))

    def loss(self, prediction: torch.Tensor, noised: Noised) -> torch.Tensor:
        """Mean squared error of `prediction` (B, ...) over all but the samples, in float32, times the weight: (B,).

        Not reduced over the batch, so that losses can be reported per t and per bucket.
        """
        assert prediction.shape == noised.target.shape, f"{tuple(prediction.shape)} for {tuple(noised.target.shape)}"
        return noised.weight * (prediction.float() - noised.target).square().flatten(1).mean(1)
