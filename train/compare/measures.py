"""Which figures a run has, what they mean, and by which of them runs are ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Measure:
    """A figure of a run over its steps."""

    name: str
    """As metrics.jsonl has it: its part, and the name in it."""
    title: str
    better: Better
    about: str
    """A sentence: what it says."""
    samples_option: str | None = None
    """The option that says over how many held-out samples it is a mean."""
    share: bool = False
    """Whether it lies in [0, 1]."""
    references: tuple[tuple[str, str], ...] = ()
    """(ending, words) of what it is to be held against: the same figure, painted otherwise."""


_PAINTED = (("_without", "without control"), ("_other", "against another's drawing"), ("_ceiling", "the VAE's ceiling"))


def _adherence(name: str, title: str, about: str) -> Measure:
    return Measure(f"adherence/{name}", title, "higher", about, "validation.adherence_samples", True, _PAINTED)


MEASURES = (
    _adherence("region_iou", "Region IoU", "Painted regions over drawn ones: intersection by union."),
    _adherence("edge_f1", "Edge F1", "Edges of what was painted against the drawing, within a few pixels."),
    _adherence("ssim", "SSIM of drawings", "How alike the painted picture's drawing and the given one are."),
    Measure(
        "held_out/condition_gap", "Condition gap", "higher",
        "By how much the loss with a sample's own drawing beats that with another's. Above 0 the drawing is followed.",
        "validation.samples",
    ),
    Measure(
        "held_out/control_gap", "Control gap", "higher",
        "By how much the loss with what is trained beats that of the base alone.", "validation.samples",
    ),
    Measure(
        "held_out/loss", "Held-out loss", "lower", "On a fixed grid of samples, times and noise.", "validation.samples"
    ),
    Measure("loss", "Training loss", "lower", "Of each step's own samples and times: noisy, hence smoothed."),
    Measure("gradient_norm", "Gradient norm", "neither", "Before clipping."),
    Measure("update_norm", "Update norm", "neither", "How far a step moves the weights."),
    Measure("learning_rate", "Learning rate", "neither", "As the schedule gave it."),
    Measure("share_updated", "Share of weights changed", "neither", "Of all weights, those that a step changed.",
            share=True),
    Measure("update_kept", "Update kept", "neither", "How much of an update survives the weights' rounding."),
)  # fmt: skip
BY_NAME = {measure.name: measure for measure in MEASURES}
RANKED_BY = (
    "adherence/region_iou", "adherence/edge_f1", "adherence/ssim", "held_out/condition_gap", "held_out/loss",
)  # fmt: skip
"""The first of these that the most runs have."""
EACH_STEP = ("loss", "gradient_norm", "update_norm", "learning_rate", "share_updated", "update_kept")
"""Figures of every step: their curves are made shorter."""
