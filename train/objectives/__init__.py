"""What the model learns to predict: how t is drawn, how x_0 is noised, what the target is, how losses are weighed."""

from __future__ import annotations

from typing import Protocol

import torch

from shared.model_folder import ModelFolder
from train.objectives.base import Noised, Objective
from train.objectives.ddpm import DDPM, PredictionType
from train.objectives.flow import FlowMatching
from train.objectives.options import Kind, ObjectiveOptions

__all__ = ["DDPM", "FlowMatching", "Kind", "Noised", "Objective", "ObjectiveOptions", "make"]


class Scheduled(Protocol):
    """What an objective asks of a family."""

    @property
    def objective(self) -> Kind:
        """How its bases were trained."""
        ...

    def noise_schedule(self, model: ModelFolder | None = None) -> torch.Tensor:
        """Of `ddpm`: alpha_bar of each noise level, (N,) float32, the least noise first, as the model's scheduler has
        them."""
        ...

    def prediction_type(self, model: ModelFolder | None = None) -> PredictionType:
        """Of `ddpm`: what the model's scheduler says that it predicts."""
        ...


def make(options: ObjectiveOptions, family: Scheduled, model: ModelFolder | None = None) -> Objective:
    """The objective of a family's base. Without a `model`: of the family's default one, which then need not be on this
    machine. Raises `UserError` where the options and the base's noise levels do not go together."""
    match family.objective:
        case "flow":
            return FlowMatching(options)
        case "ddpm":
            return DDPM(options, family.noise_schedule(model), family.prediction_type(model))
