"""What is looked at while training, and when: held-out losses and pictures, into the run's folder and the trackers."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from accelerate import Accelerator

from shared.report import say
from train import fit
from train.adapters.controlnet import ControlNetAdapter
from train.compile import eager
from train.run import Run
from train.validation import Validation, ValidationOptions, flatten


class Looks:
    """The looks of one run. The main process looks, the others wait for it."""

    def __init__(
        self,
        options: ValidationOptions,
        accelerator: Accelerator,
        run: Run,
        adapter: ControlNetAdapter,
        validation: Validation | None,
        *,
        last_step: int,
        paints: bool,
        compiled: bool,
    ) -> None:
        """`validation`: of the main process, where there are held-out samples. `paints`: whether there is a VAE.
        `compiled`: nothing is compiled for looks, they come too seldom."""
        self.options, self.accelerator, self.run, self.adapter = options, accelerator, run, adapter
        self.validation, self.last_step, self.paints, self.compiled = validation, last_step, paints, compiled
        self.seconds = 0.0
        """That all looks of the run took."""

    def due(self, step: int) -> tuple[bool, bool]:
        """Whether after this step held-out losses, and pictures, are to be looked at."""
        options, last = self.options, step >= self.last_step
        losses = bool(options.every) and (step % options.every == 0 or last)
        pictures = (
            self.paints and bool(options.pictures_every and step) and (step % options.pictures_every == 0 or last)
        )
        return losses, pictures

    def __call__(self, step: int) -> None:
        """Look, where it is due after this step."""
        losses, pictures = self.due(step)
        if not losses and not pictures:
            return
        began = time.perf_counter()
        if self.validation is not None:
            if losses:
                self._losses(self.validation, step)
            if pictures:
                self._pictures(self.validation, step)
        self.accelerator.wait_for_everyone()
        self.seconds += time.perf_counter() - began

    def _losses(self, validation: Validation, step: int) -> None:
        with self._eager():
            figures = fit.look(validation, partial(validation.held_out, self.adapter))
        self.run.log(step, {"held_out": figures})
        self._track(flatten(figures, "held_out"), step)
        gap = f", own drawing beats another's by {figures['condition_gap']:.4f}" if "condition_gap" in figures else ""
        say(
            f"step {step}: held-out loss {figures['loss']:.4f}, without control "
            f"{figures['loss_without_control']:.4f}{gap}"
        )

    def _pictures(self, validation: Validation, step: int) -> None:
        with self._eager():
            picture = fit.look(validation, partial(validation.pictures, self.adapter))
        path = self.run.save_picture(step, picture)
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"held_out": picture[None]}, step=step, **layout)
        say(f"step {step}: pictures in {path}")

    def _eager(self) -> AbstractContextManager[object]:
        return eager() if self.compiled else nullcontext()

    def _track(self, figures: dict[str, Any], step: int) -> None:
        if self.accelerator.trackers:
            self.accelerator.log(figures, step=step)
