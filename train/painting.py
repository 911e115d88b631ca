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
from train.adapters.base import Adapter
from train.baseline import Baseline
from train.modulation import Rows
from train.validation import Control, Validation, fixed_noise, predict

Picture = NDArray[np.uint8]
"""(H, W, 3)."""
_NOISE = 6
"""End of the seeds of the pictures' noise; the grid of losses and the training steps draw from others."""
HEADINGS = {
    "drawing": "drawing", "painted": "with {}", "without": "without {}", "original": "original, by the VAE"
}  # fmt: skip
"""Of the columns of a sheet of pictures, in their order; with or without what, is the adapter's."""


@dataclass(frozen=True)
class References:
    """What paintings are held against: the same at every look."""

    without: list[Picture]
    """Painted without control, from the same noise. Empty where the base itself is trained."""
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
    def paint(self, adapter: Adapter, count: int) -> list[Picture]:
        """The first `count` held-out samples, with control."""
        return self._decoded(self._painted(adapter, self.indices[:count], "own"))

    @torch.no_grad()
    def references(self, adapter: Adapter) -> References:
        """Of all that will be painted: painted at the first call of a run, then remembered, in its folder too."""
        if self._references is None:
            tensors = self._baseline.find("pictures", self.facts())
            if tensors is None:
                # A base that is trained itself is not what it was, and painting without it is no more.
                without = self._decoded(self._painted(adapter, self.indices, "none")) if adapter.keeps_base else []
                originals = self._decoded(self._originals())
                tensors = {
                    f"{name}.{i}": torch.from_numpy(picture.copy())
                    for name, pictures in (("without", without), ("original", originals))
                    for i, picture in enumerate(pictures)
                }
                self._baseline.keep("pictures", self.facts(), tensors)
            self._references = References(
                *(
                    [tensors[f"{name}.{i}"].numpy() for i in range(len(self.indices)) if f"{name}.{i}" in tensors]
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

    def _painted(self, adapter: Adapter, indices: list[int], control: Control) -> dict[int, torch.Tensor]:
        """Final latents x_0 of each."""
        validation = self.validation
        found: dict[int, torch.Tensor] = {}
        for part, batch in validation.batches(indices):
            without = control == "none"
            inputs = adapter.inputs(batch, validation.condition(batch), validation.dtype, without=without)
            x_0 = validation.latents(batch)
            noise = torch.stack([fixed_noise(x_0.shape[1:], validation.seed, index, 0, _NOISE) for index in part])
            noise = noise.to(x_0)
            ahead = None if validation.modulation is None else validation.rows([part], self._times(noise[:1]))
            empty = None  # what guidance leads away from
            if validation.family.guidance_scale is not None:
                uncaptioned = validation.uncaptioned(part, batch)
                empty = adapter.inputs(uncaptioned, inputs.condition, validation.dtype, without=without)
                empty = validation.family.guided_from(validation.model, empty)
            x_0 = self._sampled(adapter, noise, inputs, empty, control, ahead)
            found |= dict(zip(part, x_0, strict=True))
        return found

    def _sampled(
        self, adapter: Adapter, noise: torch.Tensor, inputs: Inputs, empty: Inputs | None, control: Control,
        rows: Rows | None,
    ) -> torch.Tensor:  # fmt: skip
        """x_0 (B, ...); of each denoising step the modulation is in a slot of `rows`. `empty`: the same with the empty
        caption, where pictures are guided (arXiv 2207.12598)."""
        steps = itertools.count()

        def step(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            if rows is not None:
                rows.use(next(steps), len(x_t))
            captioned = predict(adapter, x_t, t, inputs, control)
            if empty is None:
                return captioned
            uncaptioned = predict(adapter, x_t, t, empty, control)
            assert family.guidance_scale is not None
            return uncaptioned + family.guidance_scale * (captioned - uncaptioned)

        validation, family = self.validation, self.validation.family
        # The base alone paints as it always has, whatever else is being trained.
        scheduler = None if control == "none" else validation.objective.scheduler
        return family.sample(validation.model, noise, validation.options.picture_steps, step, scheduler)

    def _times(self, noise: torch.Tensor) -> torch.Tensor:
        """t of each denoising step from noise (1, ...) on: they do not depend on what is predicted."""
        times: list[torch.Tensor] = []

        def step(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            times.append(t)
            return torch.zeros_like(x_t)

        validation = self.validation
        validation.family.sample(validation.model, noise, validation.options.picture_steps, step)
        return torch.cat(times)

    def _decoded(self, latents: dict[int, torch.Tensor]) -> list[Picture]:
        """Pictures of latents x_0, in their samples' order. The decoder is in memory here only, when no activations
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
