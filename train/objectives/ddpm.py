"""Diffusion over a table of noise levels (arXiv 2006.11239; SD 1.5, SDXL): t is a whole number, 0 has the least noise.

Letters: N noise levels, mostly 1,000; alpha_bar, as in the paper, is the share of the data in the variance of x_t.
"""

from __future__ import annotations

from typing import Literal, final

import torch

from shared.errors import UserError
from train.objectives.base import Objective
from train.objectives.options import ObjectiveOptions

PredictionType = Literal["epsilon", "v_prediction"]
"""diffusers' words for what a model predicts."""


@final
class DDPM(Objective):
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise; target: the noise, or the velocity
    v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (arXiv 2202.00512, appendix D)."""

    kind = "ddpm"

    def __init__(self, options: ObjectiveOptions, alpha_bars: torch.Tensor, prediction_type: PredictionType) -> None:
        """`alpha_bars` (N,) falls from near 1 to near or at 0; `prediction_type` is what the base predicts.

        Raises `UserError` for epsilon where the last level is pure noise: x_t is the noise there, so that predicting
        it says nothing of x_0.
        """
        super().__init__(options)
        assert alpha_bars.ndim == 1, f"noise levels of shape {tuple(alpha_bars.shape)}"
        assert ((alpha_bars >= 0) & (alpha_bars <= 1)).all(), "alpha_bar is a share"
        alpha_bars = alpha_bars.cpu().double()
        shifted = options.zero_terminal_snr and bool(alpha_bars[-1] > 0)
        if shifted:
            alpha_bars = zero_terminal(alpha_bars)
        named: dict[str, PredictionType] = {"epsilon": "epsilon", "v": "v_prediction", "auto": prediction_type}
        self.predicted = named[options.prediction]
        """What is trained, in diffusers' word."""
        if self.predicted == "epsilon" and not alpha_bars[-1] > 0:
            asked = options.prediction == "epsilon"
            who = "objective.prediction is epsilon" if asked else "the base predicts the noise"
            why = "objective.zero_terminal_snr makes" if shifted else "the base's schedule has"
            raise UserError(
                f"{who}, but {why} the last noise level pure noise, where there is nothing to be learned from that: "
                "set objective.prediction v" + (", or leave objective.zero_terminal_snr out" if shifted else "")
            )
        rates = torch.stack([alpha_bars.sqrt(), (1 - alpha_bars).sqrt(), self._weights(alpha_bars)]).float()
        self._tables = {torch.device("cpu"): rates}
        """Device to (3, N) float32: signal, sigma and weight of each level."""

    def time_at(self, shares: torch.Tensor) -> torch.Tensor:
        """The levels of 0 .. N - 1 at these shares, (J,) float32, each as much of the way as any other."""
        N = self._tables[torch.device("cpu")].shape[1]
        return (shares * N).floor().clamp(0, N - 1)

    def rates(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal, sigma, _ = self._at(t)
        return signal, sigma

    def target(self, x_0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return noise if self.predicted == "epsilon" else signal * noise - sigma * x_0

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Min-SNR (arXiv 2303.09556, section 3.4): min(SNR, gamma) as the weight of an error of x_0, divided by what an
        error of what is predicted is in that measure. Under pure noise it is 0 for the velocity, too."""
        return self._at(t)[2]

    def _at(self, t: torch.Tensor) -> torch.Tensor:
        """(3, B): signal, sigma and weight at t (B,)."""
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        return self._tables[t.device][:, t.long()]

    def _weights(self, alpha_bars: torch.Tensor) -> torch.Tensor:
        """(N,) from the noise levels (N,), both float64."""
        if not self.options.snr_gamma:
            return torch.ones_like(alpha_bars)
        snr = alpha_bars / (1 - alpha_bars)
        of_x_0 = snr.clamp(max=self.options.snr_gamma)
        return of_x_0 / (snr if self.predicted == "epsilon" else snr + 1)


def zero_terminal(alpha_bars: torch.Tensor) -> torch.Tensor:
    """Noise levels (N,) float64 whose last is pure noise and whose first is as it was (arXiv 2305.08891, algorithm 1):
    sqrt(alpha_bar) is moved down until it ends at 0, and stretched."""
    signal = alpha_bars.sqrt()
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
