"""The ways of taking a training step that are compared: what each holds in memory, and how it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from train.quantize import Weights


@dataclass(frozen=True)
class Way:
    """One way. All take the same step (train/step.py) on the same data; what differs is named here."""

    about: str
    """What it stands for, in a few words."""
    base: Weights
    """How the frozen base is held: as it is, by optimum-quanto's own modules, or in this project's int8 linear."""
    compiled: bool = False
    recompute: Literal["none", "all", "fit"] = "none"
    """Which blocks are computed again in backward. `fit`: none where that fits below the cap, else as few as the
    plan says (train/memory_plan.py)."""
    controlnet: Literal["bf16", "fp32"] = "bf16"
    """fp32 is computed in bf16 by autocast."""
    optimizer: Literal["adamw", "adamw8bit", "ours"] = "adamw8bit"
    """`adamw` of torch, `adamw8bit` of bitsandbytes on the weights themselves, or train/optimizer.py."""
    encoders: bool = False
    """Whether T5-XXL, CLIP and the VAE stay on the device (int8) and encode each batch anew."""
    accumulation: int = 1
    hoist: bool = False
    """Whether the base's modulation is computed for many steps at once, and its weights stay off the device."""
    arithmetic: Literal["exact", "int8_backward", "int8"] = "exact"
    states: Literal["device", "cpu"] = "device"
    """Where the optimizer's moments lie."""
    stream: bool = False
    """Whether the base lies in the host's memory and comes block by block."""


OURS = Way("this project", "int8", compiled=True, recompute="fit", optimizer="ours", hoist=True)

WAYS: dict[str, Way] = {
    "ours": OURS,
    "ours-lean": Way("this project's int8 linear alone", "int8", optimizer="ours"),
    "ours-eager": replace(OURS, about="this project, not compiled", compiled=False),
    "ours-bf16": replace(OURS, about="this project, base unquantized", base="none"),
    "ours-int8-backward": replace(OURS, about="this project, gradients in 8 bits", arithmetic="int8_backward"),
    "ours-int8": replace(OURS, about="this project, all in 8 bits", arithmetic="int8"),
    "ours-cpu-states": replace(OURS, about="this project, optimizer states on the host", states="cpu"),
    "ours-streamed": replace(OURS, about="this project, base streamed from the host", stream=True),
    "diffusers": Way("diffusers' example", "none", controlnet="fp32", optimizer="adamw"),
    "diffusers-recomputed": Way(
        "diffusers' example, --gradient_checkpointing", "none", recompute="all", controlnet="fp32", optimizer="adamw"
    ),
    "seed": Way("quanto, encoders online, 2 batches to a step", "quanto", encoders=True, accumulation=2),
    "quanto-online": Way("quanto, encoders online", "quanto", encoders=True),
    "quanto": Way("quanto, cached inputs", "quanto"),
    "quanto-compiled": Way("quanto, cached inputs, compiled", "quanto", compiled=True),
    "bf16": Way("bf16 base", "none"),
    "bf16-compiled": Way("bf16 base, compiled", "none", compiled=True),
}
"""By name."""
