"""What does it paint? Held-out samples painted from fixed noise, with control and without, and as the VAE gives back
the originals. Pictures to look at and the measure of adherence share them.

Letters: B = samples of one model call; latents are (B, ...), for FLUX (B, T, C).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.families.base import Inputs
from train.adapters.controlnet import ControlNetAdapter
from train.baseline import Baseline
from train.modulation import Rows
from train.validation import Control, Validation, fixed_noise, predict

Picture = NDArray[np.uint8]
"""(H, W, 3)."""
_NOISE = 6
"""End of the seeds of the pictures' noise; the grid of losses and the training steps draw from others."""
HEADINGS = ("drawing", "with control", "without control", "original, by the VAE")


@dataclass(frozen=True)
class References:
    """What paintings are held against: the same at every look."""

    without: list[Picture]
    """Painted without control, from the same noise."""
    originals: list[Picture]
    """Through the VAE."""


class Painter:
    """Paints the first held-out samples."""

    def __init__(self, validation: Validation, baseline: Baseline, count: int) -> None:
        """`count`: the most that will be painted."""
        self.validation, self._baseline = validation, baseline
        self.indices = validation.indices[:count]
        self._references: References | None = None

    @torch.no_grad()
    def paint(self, adapter: ControlNetAdapter, count: int) -> list[Picture]:
        """The first `count` held-out samples, with control."""
        return self._decoded(self._painted(adapter, self.indices[:count], "own"))

    @torch.no_grad()
    def references(self, adapter: ControlNetAdapter) -> References:
        """Of all that will be painted: painted at the first call of a run, then remembered, in its folder too."""
        if self._references is None:
            tensors = self._baseline.find("pictures", self.facts())
            if tensors is None:
                without = self._decoded(self._painted(adapter, self.indices, "none"))
                originals = self._decoded(self._originals())
                tensors = {
                    f"{name}.{i}": torch.from_numpy(picture.copy())
                    for name, pictures in (("without", without), ("original", originals))
                    for i, picture in enumerate(pictures)
                }
                self._baseline.keep("pictures", self.facts(), tensors)
            self._references = References(
                *(
                    [tensors[f"{name}.{i}"].numpy() for i in range(len(self.indices))]
                    for name in ("without", "original")
                )
            )
        return self._references

    def facts(self) -> dict[str, Any]:
        """All that the references depend on and that may change in a run."""
        validation = self.validation
        return {**validation.facts(self.indices), "picture_steps": validation.options.picture_steps}

    def _originals(self) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for part, batch in self.validation.batches(self.indices):
            found |= dict(zip(part, self.validation.latents(batch), strict=True))
        return found

    def _painted(self, adapter: ControlNetAdapter, indices: list[int], control: Control) -> dict[int, torch.Tensor]:
        """Final latents x_0 (T, C) of each."""
        validation = self.validation
        found: dict[int, torch.Tensor] = {}
        for part, batch in validation.batches(indices):
            inputs = validation.family.inputs(batch, validation.condition(batch), validation.dtype)
            x_0 = validation.latents(batch)
            noise = torch.stack([fixed_noise(x_0.shape[1:], validation.seed, index, 0, _NOISE) for index in part])
            noise = noise.to(x_0)
            ahead = None if validation.modulation is None else validation.rows([part], self._times(noise[:1]))
            found |= dict(zip(part, self._sampled(adapter, noise, inputs, control, ahead), strict=True))
        return found

    def _sampled(
        self, adapter: ControlNetAdapter, noise: torch.Tensor, inputs: Inputs, control: Control, rows: Rows | None
    ) -> torch.Tensor:
        """x_0 (B, T, C); of each denoising step the modulation is in a slot of `rows`."""
        steps = itertools.count()

        def step(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            if rows is not None:
                rows.use(next(steps), len(x_t))
            return predict(adapter, x_t, t, inputs, control)

        validation = self.validation
        return validation.family.sample(validation.model, noise, validation.options.picture_steps, step)

    def _times(self, noise: torch.Tensor) -> torch.Tensor:
        """t of each denoising step from noise (1, T, C) on: they do not depend on what is predicted."""
        times: list[torch.Tensor] = []

        def step(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            times.append(t)
            return torch.zeros_like(x_t)

        validation = self.validation
        validation.family.sample(validation.model, noise, validation.options.picture_steps, step)
        return torch.cat(times)

    def _decoded(self, latents: dict[int, torch.Tensor]) -> list[Picture]:
        """Pictures of latents (T, C), in their samples' order. The decoder is in memory here only, when no activations
        are."""
        validation = self.validation
        decode = validation.family.open_decoder(validation.model, str(validation.device), validation.dtype)
        pictures = []
        for index in (index for index in self.indices if index in latents):
            size = validation.samples.size_of(index)
            pictures.append(decode(latents[index][None], size.height, size.width)[0].numpy())
        del decode
        if validation.device.type == "cuda":
            torch.cuda.empty_cache()
        return pictures
