"""One optimizer step, the method itself: on whatever base and adapter it is given, real, random or fake tensors.

Training, the benchmarks and the plan that counts memory all run this one. A step is a function of (weights, batches,
seed): times, noise and rounding are drawn from the seed and a position.

Letters: B samples in a batch; latents are (B, ...), for FLUX (B, T, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from shared.drawn import generator_for
from shared.errors import UserError
from shared.families.base import Batch, Family
from train.adapters.base import Adapter
from train.compile import eager
from train.modulation import Modulation
from train.objectives import Objective
from train.optimizer import AnyOptimizer
from train.transfer import send
from train.validation import seed_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Backward = Callable[[torch.Tensor, bool], None]
"""Adds the gradients of a loss, 0-dim, to those that are there; told of the last one of a step, it brings in what other
processes have, of which the sum is wanted."""
ROUNDING, NOISE, TIMES = 2, 3, 4
"""Ends of the seeds of what a step draws."""


class Step:
    """What happens between two states of the weights."""

    def __init__(
        self,
        family: Family,
        adapter: Adapter,
        objective: Objective,
        optimizer: AnyOptimizer,
        *,
        recipes: Mapping[str, Any],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        condition_draw: bool = True,
        modulation: Modulation | None = None,
        compiled_for: int | None = None,
        accelerator: Accelerator | None = None,
        backward: Backward | None = None,
    ) -> None:
        """`recipes`: layer to recipe, of the cache. `dtype` is that of the computation. `condition_draw`: draw the
        condition's latents from their posterior. `modulation`: of a base that is hoisted. `compiled_for`: the size of a
        full batch, where blocks are compiled. `accelerator`: only where several processes step together.
        `backward`: how gradients arise, where it is neither alone nor through DDP."""
        self.family, self.adapter, self.objective, self.optimizer = family, adapter, objective, optimizer
        self.recipes, self.seed, self.device, self.dtype = recipes, seed, device, dtype
        self.condition_draw, self.modulation, self.compiled_for = condition_draw, modulation, compiled_for
        self.accelerator = accelerator if accelerator is not None and accelerator.num_processes > 1 else None
        self._own_backward = backward
        self.arrived: dict[str, float] = {}
        """What came of the step before the last one's update: read together with the last one's loss."""
        self._late: dict[str, torch.Tensor] = {}
        """The same of the last step, 0-dim on the device."""

    def times(self, position: int, B: int) -> torch.Tensor:
        """t of batch number `position`, (B,) fp32 on the CPU: known before the batch is there."""
        return self.objective.sample_t(B, self._generator("cpu", position, TIMES), "cpu")

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss of each sample, (B,) fp32: the method itself."""
        family, recipes = self.family, self.recipes
        generator = self._generator(self.device, batch.position, NOISE)
        x_0 = family.model_latents(batch.role("latents"), recipes["latents"], generator, self.dtype)
        condition = None
        if self.adapter.conditioned:
            condition = family.condition(batch, recipes, generator if self.condition_draw else None, self.dtype)
        inputs = self.adapter.inputs(batch, condition, self.dtype)
        t = send(self.times(batch.position, len(batch)), self.device)
        noised = self.objective.noise(x_0, t, generator)  # x_t, t, target, weight
        if self.modulation is not None:
            self.modulation.use(batch.position, len(batch))
        prediction = self.adapter.predict(noised.x_t, noised.t, inputs)  # (B, ...)
        return self.objective.loss(prediction, noised)

    def backward(self, batches: list[Batch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients of the mean loss over all samples of the step, whatever the sizes of its batches, added to those
        that are there; with class images, of that over the pictures plus `prior_weight` times that over as many class
        images (DreamBooth, arXiv 2208.12242, eq. 2). Back come this process's share of that loss, 0-dim, and each
        batch's losses (B,), all fp32 on the device: nothing waits for it here."""
        total = torch.zeros((), device=self.device)
        losses: list[torch.Tensor] = []
        for i, batch in enumerate(batches):
            with self._gradients_stay(i == len(batches) - 1), self._compiled(batch):
                loss = self.loss(batch)  # (B,)
                share = loss.sum() / batch.step_samples
                if batch.prior_weight is not None:
                    share = batch.prior_weight * share
                if self._own_backward is not None:
                    self._own_backward(share, i == len(batches) - 1)
                elif self.accelerator is None:
                    share.backward()
                else:  # DDP averages gradients over processes: the sum is wanted
                    self.accelerator.backward(share * self.accelerator.num_processes)
            losses.append(loss.detach())
            total += share.detach()
        return total, losses

    def __call__(self, batches: list[Batch], step: int, rate: float) -> dict[str, float]:
        """Step number `step` (the first is 1) at this learning rate. Back come loss, norm of the gradient and learning
        rate, and with class images their mean loss alone; what came of the update is known later: see `arrived` and
        `late`. Raises `UserError` naming the samples where the loss or the gradient is not finite, before any weight
        has moved."""
        self.adapter.refuse_trainable_base()
        optimizer = self.optimizer
        measure = optimizer.options.measures(step)
        optimizer.begin(rate, seed_of(self.seed, step, ROUNDING), measure=measure)
        total, losses = self.backward(batches)
        norm = optimizer.norm()
        prior = [
            loss.sum() / batch.step_samples
            for batch, loss in zip(batches, losses, strict=True)
            if batch.prior_weight is not None
        ]
        means = [total, torch.stack(prior).sum()] if prior else [total]
        if self.accelerator is not None:
            means = [self.accelerator.reduce(mean, reduction="sum") for mean in means]
        scalars = [scalar.to(total) for scalar in (means[0], norm, *means[1:], *self._late.values())]
        loss_value, norm_value, *rest = torch.stack(scalars).tolist()  # the step's one wait for the device
        of_prior, before = rest[: len(means) - 1], rest[len(means) - 1 :]
        self.arrived = dict(zip(self._late, before, strict=True))
        self._refuse_non_finite(batches, losses, step, loss_value, norm_value)
        update = optimizer.finish(norm_value)
        self._late = {} if update.norm is None else {"update_norm": update.norm}
        if update.found is not None:
            self._late["found_step_size"] = update.found
        if (survival := update.survival) is not None:
            self._late |= {"update_kept": survival.update_kept, "share_updated": survival.share_updated}
        figures = {"loss": loss_value, "gradient_norm": norm_value, "learning_rate": rate}
        return {**figures, "prior_loss": of_prior[0]} if of_prior else figures

    def late(self) -> dict[str, float]:
        """What came of the last step's update, where it cannot wait for the next step: norm, and what survived of it
        where that was measured. Waits for the device. Empty where it was asked for already."""
        late, self._late = self._late, {}
        return dict(zip(late, torch.stack(list(late.values())).tolist(), strict=True)) if late else {}

    def _generator(self, device: torch.device | str, number: int, what: int) -> torch.Generator:
        return generator_for(device).manual_seed(seed_of(self.seed, number, what))

    def _gradients_stay(self, last: bool) -> AbstractContextManager[object]:
        """Of several batches only the last one's backward brings the processes' gradients together."""
        if last or self.accelerator is None or self._own_backward is not None:
            return nullcontext()
        return self.accelerator.no_sync(self.adapter.module)

    def _compiled(self, batch: Batch) -> AbstractContextManager[object]:
        """Batches of another size than the full one come too seldom to be compiled for."""
        if self.compiled_for is None:
            return nullcontext()
        return eager(unless=len(batch) == self.compiled_for)

    def _refuse_non_finite(
        self, batches: list[Batch], losses: list[torch.Tensor], step: int, loss: float, norm: float
    ) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        pairs = [
            (key, value) for batch, each in zip(batches, losses, strict=True)
            for key, value in zip(batch.keys, each.tolist(), strict=True)
        ]  # fmt: skip
        if self.accelerator is not None:  # all processes come here together: loss and norm are everyone's
            from accelerate.utils import gather_object

            pairs = gather_object(pairs)
        guilty = [key for key, value in pairs if not math.isfinite(value)]
        what = f"loss {loss}" if guilty else f"gradient norm {norm}"
        whose = f"of sample(s) {', '.join(guilty)}" if guilty else f"in a step of {', '.join(key for key, _ in pairs)}"
        stepped = (
            "what was released had been stepped already, so the last checkpoint is what is whole"
            if self.optimizer.options.release
            else "the optimizer did not step"
        )
        raise UserError(
            f"step {step}: the {what} is not finite {whose}; {stepped}. The same command would come here again: look "
            "at these samples, or try a lower optimizer.learning_rate under another NAME"
        )
