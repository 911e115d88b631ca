"""Does it learn, and does it follow the drawing? Held-out losses on a fixed grid.

The grid of (sample, t, noise) is the same at every step and in every run from the same cache, so that losses
compare. Three losses tell apart what one cannot: with the sample's own drawing, with *another* sample's drawing, and
without the ControlNet. A ControlNet that learns without following its condition gains on the base (`control_gap`)
but does as well with another drawing (`condition_gap` stays near 0).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shared.errors import UserError
from shared.families.base import Batch, Family, Inputs
from shared.model_folder import ModelFolder
from train.adapters.base import Adapter
from train.baseline import Baseline
from train.loader import to_device
from train.modulation import Modulation, Rows
from train.objectives import Objective
from train.order import Permutation
from train.rows import Buffers
from train.samples import EMPTY_CAPTION, CachedSamples, Choice, Size

Control = Literal["own", "other", "none"]
_LOSSES = 5
"""End of the seeds of the grid's noise: no training step draws from these."""


@dataclass(frozen=True)
class ValidationOptions:
    """Looking at held-out samples while training."""

    every: int = 250
    """Steps between held-out losses; 0 turns them off. At 16 samples and 4 times one costs about 80 training steps'
    forward passes."""
    samples: int = 16
    """Held-out samples of the grid."""
    timesteps: int = 4
    """Values of t for each, at the middles of equal parts of the way from data to noise."""
    pictures_every: int = 500
    """Steps between pictures; 0 turns them off. The VAE's decoder is loaded for the moment only."""
    pictures: int = 4
    """Held-out samples that are painted, with and without control."""
    picture_steps: int = 20
    """Denoising steps of a picture."""
    adherence_every: int = 500
    """Steps between looks at whether paintings keep to their drawings (adherence): the detector that made the cache's
    drawings draws what was painted. 0 turns them off. At 8 samples and 20 picture steps one costs 160 forward passes
    of one sample, some 70 training steps of one."""
    adherence_samples: int = 8
    """Held-out samples that are painted for it. More make the figures' standard errors smaller."""
    adherence_detector: str | None = None
    """Which condition's detector draws the paintings where the drawings came with the images (`precomputed`): one that
    draws alike, as canny. Of other conditions it is the one that drew them."""
    adherence_device: Literal["cpu", "cuda"] = "cpu"
    """Where the detector runs, in a process of its own. On the CPU it takes nothing of the GPU's memory, but for some
    detectors a second or more for each picture."""
    batch_size: int = 4
    """Samples of one model call. Needs far less memory than a training batch of the same size."""
    seed: int = 0
    """Of which held-out samples are looked at, and of their noise: apart from the training's, so that runs of different
    seeds are looked at alike."""

    def check(self) -> None:
        """Refuse impossible values."""
        for name in ("samples", "timesteps", "pictures", "picture_steps", "adherence_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"validation.{name} must be 1 or more, not {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"validation.seed must be 0 or more, not {self.seed}")
        if min(self.every, self.pictures_every, self.adherence_every) < 0:
            raise UserError(
                "validation.every, validation.pictures_every and validation.adherence_every must be 0 (off) or more"
            )

    @property
    def most_painted(self) -> int:
        """Samples that are painted at most."""
        return max(self.pictures if self.pictures_every else 0, self.adherence_samples if self.adherence_every else 0)


def seed_of(*numbers: int) -> int:
    """A 63-bit seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def fixed_noise(shape: torch.Size, *numbers: int) -> torch.Tensor:
    """Standard normal noise (fp32, CPU) that depends on `numbers` alone: the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(*numbers)))


class Validation:
    """Held-out samples of a cache, made ready once."""

    def __init__(
        self,
        samples: CachedSamples,
        family: Family,
        model: ModelFolder,
        objective: Objective,
        options: ValidationOptions,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        baseline: Baseline,
        modulation: Modulation | None = None,
    ) -> None:
        """`baseline`: where what the base does alone is kept. `modulation`: of a base that is hoisted."""
        self.samples, self.family, self.model, self.objective = samples, family, model, objective
        self.options, self.seed, self.device, self.dtype = options, seed, device, dtype
        self.batch_size = options.batch_size
        """Samples of one model call, which may be fewer than was asked for: see `take_fewer`."""
        count = min(len(samples), max(options.samples, options.most_painted))
        self.indices: list[int] = Permutation(len(samples), seed, "held out").of(np.arange(count)).tolist()
        self._without: torch.Tensor | None = None  # the base is frozen: computed once
        self._baseline = baseline
        self.modulation = modulation
        self.last_losses: list[float] = []
        """Of each held-out sample of the grid, at the last look."""
        self._grid_rows: Rows | None = None  # the same at every step: computed once, on the host

    def batches(self, indices: list[int]) -> Iterator[tuple[list[int], Batch]]:
        """(indices, batch) of at most `batch_size` samples of one shape, first captions, last (finest) drawings; of
        several conditions each sample has one."""
        for part in self._parts(indices):
            yield part, to_device(self.samples.batch(part), self.device)

    def uncaptioned(self, indices: list[int], batch: Batch) -> Batch:
        """The batch of these samples with the empty caption in the place of theirs."""
        count = len(indices)
        choice = Choice(indices, [EMPTY_CAPTION] * count, [0] * count, [0.0] * count)
        layers = [name for name, (kind, _) in self.samples.layers.items() if kind.rows == "captions"]
        empty, stacking = self.samples.begin_batch(choice, Buffers(pinned=False), layers)
        empty.tensors = stacking.finish()
        return replace(batch, tensors={**batch.tensors, **to_device(empty, self.device).tensors})

    def _parts(self, indices: list[int]) -> list[list[int]]:
        """The indices of each batch."""
        by_size: dict[Size, list[int]] = {}
        for index in indices:
            by_size.setdefault(self.samples.size_of(index), []).append(index)
        most = self.batch_size
        return [group[i : i + most] for group in by_size.values() for i in range(0, len(group), most)]

    def take_fewer(self) -> bool:
        """From now on half as many samples in a model call; False where it is one already. What is found stays the same
        to rounding."""
        if self.batch_size == 1:
            return False
        self.batch_size //= 2
        self._grid_rows = None
        return True

    def rows(self, parts: list[list[int]], t: torch.Tensor) -> Rows | None:
        """The modulation of these batches, each at every t (J,): of batch k at t[j] in slot k * J + j. None where the
        base has its own."""
        if self.modulation is None:
            return None
        layer, _, _ = self.family.pooled.partition(".")
        R = max(map(len, parts))
        slots = []
        for part in parts:
            embeds = self.samples.batch(part, layers=[layer]).tensors[self.family.pooled].to(self.dtype)
            slots += [torch.nn.functional.pad(embeds, (0, 0, 0, R - len(part)))] * len(t)
        return self.modulation.compute(t.repeat(len(parts))[:, None].expand(-1, R), torch.stack(slots))

    def latents(self, batch: Batch) -> torch.Tensor:
        """Final latents (B, ...), nothing drawn: posterior means, or the draws that are cached in their place."""
        return self.family.model_latents(batch.role("latents"), self.samples.recipes["latents"], None, self.dtype)

    def condition(self, batch: Batch) -> torch.Tensor | None:
        """What the ControlNet is shown, nothing drawn; None where what is trained reads no condition."""
        if not self.samples.conditions:
            return None
        return self.family.condition(batch, self.samples.recipes, None, self.dtype)

    @torch.no_grad()
    def losses(self, adapter: Adapter, control: Control) -> torch.Tensor:
        """(samples, timesteps) fp32: the loss of each cell of the grid. With "other" the condition is the next held-out
        sample's of the same shape; a sample that is the only one of its shape is NaN."""
        indices = self.indices[: self.options.samples]
        J = self.options.timesteps
        times = self.objective.time_at(torch.tensor([(j + 0.5) / J for j in range(J)]))
        if self._grid_rows is None:
            self._grid_rows = self.rows(self._parts(indices), times)
        losses = torch.full((len(indices), J), math.nan)
        neighbours = {index: self.neighbour(index) for index in indices}
        for k, (part, batch) in enumerate(self.batches(indices)):
            x_0 = self.latents(batch)
            condition = self.condition(batch)
            if control == "other":
                others = [neighbours[index] for index in part]
                theirs = self.samples.batch(others, conditions=[self.samples.condition_of(index) for index in part])
                condition = self.condition(to_device(theirs, self.device))
            inputs = adapter.inputs(batch, condition, self.dtype, without=control == "none")
            for j in range(J):
                if self._grid_rows is not None:
                    self._grid_rows.use(k * J + j, len(part))
                t = times[j].expand(len(part)).to(self.device)
                noise = torch.stack([fixed_noise(x_0.shape[1:], self.seed, index, j, _LOSSES) for index in part])
                noised = self.objective.noise_at(x_0, t, noise.to(x_0))
                prediction = predict(adapter, noised.x_t, t, inputs, control)
                loss = self.objective.loss(prediction, noised).cpu()
                for row, index in enumerate(part):
                    if control != "other" or neighbours[index] != index:
                        losses[indices.index(index), j] = loss[row]
        return losses

    def neighbour(self, index: int) -> int:
        """A held-out sample's partner of the same shape: the next one, around."""
        size = self.samples.size_of(index)
        return index + 1 if index + 1 < size.stop else size.start

    def held_out(self, adapter: Adapter) -> dict[str, float]:
        """The figures of one look: losses, gaps with their standard errors, and the loss by t."""
        own = self.losses(adapter, "own")
        self.last_losses = own.mean(dim=1).tolist()
        figures = {"loss": own.mean().item(), "loss_error": standard_error(own)}
        if adapter.keeps_base:
            if self._without is None:
                self._without = self._losses_without(adapter)
            figures |= {
                "loss_without_control": self._without.mean().item(),
                "control_gap": (self._without - own).mean().item(),
                "control_gap_error": standard_error(self._without - own),
            }
        if adapter.conditioned:
            figures |= self._of_other_drawings(adapter, own)
        for j, loss in enumerate(own.mean(dim=0).tolist()):
            name = f"loss_t{(j + 0.5) / self.options.timesteps:.3f}"
            figures |= {name: loss, f"{name}_error": standard_error(own[:, j : j + 1])}
        return figures

    def _of_other_drawings(self, adapter: Adapter, own: torch.Tensor) -> dict[str, float]:
        """What tells whether the drawing is followed; empty where no sample has another one of its shape."""
        other = self.losses(adapter, "other")
        paired = ~other.isnan().any(dim=1)  # rows: samples that have another of their shape
        if not paired.any():
            return {}
        # As `loss` would be with another's drawing, so that the two compare where some samples have no partner.
        return {
            "loss_other_drawing": torch.where(other.isnan(), own, other).mean().item(),
            "condition_gap": (other - own)[paired].mean().item(),
            "condition_gap_error": standard_error((other - own)[paired]),
        }

    def _losses_without(self, adapter: Adapter) -> torch.Tensor:
        """The losses of the base alone: worked out once in a run, however often it is resumed."""
        facts = {
            **self.facts(self.indices[: self.options.samples]),
            "timesteps": self.options.timesteps,
        }
        if (found := self._baseline.find("losses", facts)) is not None:
            return found["without"]
        losses = self.losses(adapter, "none")
        self._baseline.keep("losses", facts, {"without": losses})
        return losses

    def facts(self, indices: list[int]) -> dict[str, Any]:
        """What the base does alone on these samples depends on, of all that may change in a run."""
        keys = [self.samples.key(index) for index in indices]
        return {"keys": keys, "seed": self.seed, "dtype": str(self.dtype), "device": self.device.type}

    def drawing(self, index: int) -> NDArray[np.uint8]:
        """The finest drawing of a sample's condition, as it was encoded."""
        samples = self.samples
        drawings = samples.cache.layer(samples.conditions[samples.condition_of(index)])
        key = samples.key(index)
        last = max(drawings.members(key), key=lambda member: int(member.split(".")[0]))
        return np.asarray(Image.open(io.BytesIO(drawings.read(key, last))).convert("RGB"))


def predict(adapter: Adapter, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, control: Control) -> torch.Tensor:
    """The model's prediction (B, ...), with or without the ControlNet."""
    if control == "none":
        return adapter.predict_without(x_t, t, inputs)
    return adapter.predict(x_t, t, inputs)


def standard_error(differences: torch.Tensor) -> float:
    """Of the mean of (samples, timesteps): over samples, since the cells of one sample are not independent."""
    if len(differences) < 2:
        return math.nan
    return (differences.mean(dim=1).std() / math.sqrt(len(differences))).item()


def flatten(figures: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Figures under a tracker's names: "held_out/loss"."""
    return {f"{prefix}/{name}": value for name, value in figures.items()}
