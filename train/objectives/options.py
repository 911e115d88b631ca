"""The options of objectives: which noise levels are trained, what is predicted there, how much each counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shared.errors import UserError, nearest

Kind = Literal["flow", "ddpm"]
"""The two ways in which bases were trained: rectified flow (FLUX), or a table of noise levels (SD 1.5, SDXL)."""
Timesteps = Literal["auto", "uniform", "logit_normal", "mode", "shifted"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]
Prediction = Literal["auto", "epsilon", "v"]

MODE_SCALE_MIN, MODE_SCALE_MAX = -1.0, 2 / (math.pi - 2)
"""Between these, `mode`'s map from u to t is monotonic (arXiv 2403.03206, eq. 20), so it has a density."""
_AUTO: dict[Kind, Timesteps] = {"flow": "logit_normal", "ddpm": "uniform"}
"""As SD3's paper found best, and as DDPM trained."""

_OF_TIMESTEPS: dict[Timesteps, frozenset[str]] = {
    "uniform": frozenset(),
    "logit_normal": frozenset({"logit_mean", "logit_std"}),
    "mode": frozenset({"mode_scale"}),
    "shifted": frozenset({"logit_mean", "logit_std", "shift"}),
}
_OF_KIND: dict[Kind, frozenset[str]] = {
    "flow": frozenset({"weighting"}),
    "ddpm": frozenset({"prediction", "snr_gamma", "zero_terminal_snr"}),
}


@dataclass(frozen=True)
class ObjectiveOptions:
    """Which noise levels are trained, what is predicted there, and how much each counts."""

    timesteps: Timesteps = "auto"
    """How t is drawn. `logit_normal` prefers the middle (SD3); `uniform` treats all t alike; `mode` prefers the
    middle but leaves the ends more; `shifted` is logit-normal moved to high noise. `auto`: as the base was trained,
    `logit_normal` for FLUX, `uniform` for SD. Layout is decided near t = 1: where the model follows the condition too
    late or not at all, try `shifted`."""
    logit_mean: float = 0.0
    """Mean of logit(t), for `logit_normal` and `shifted`. Above 0 trains high noise more (layout), below 0 detail.
    As in SD3's paper; diffusers' scripts look t up in a descending table, so their mean has the opposite sign."""
    logit_std: float = 1.0
    """Standard deviation of logit(t), for `logit_normal` and `shifted`. Raise it to reach t near 0 and 1 more often."""
    mode_scale: float = 1.29
    """For `mode`: above 0 prefers the middle, below 0 the ends, 0 is uniform; from -1 to 1.75. SD3's best is 1.29."""
    shift: float = 3.0
    """For `shifted`: t' = shift t / (1 + (shift - 1) t). Above 1 moves t towards noise; SD3 used 3 at 1,024 pixels."""
    weighting: Weighting = "none"
    """FLUX: weight of a sample's loss by its t. `none` suits flow matching; `sigma_sqrt` is 1 / t^2 (detail above all),
    `cosmap` is 2 / (pi (1 - 2 t + 2 t^2)) (the middle, twice the ends). For ablations."""
    prediction: Prediction = "auto"
    """SD: what the model predicts, the noise (`epsilon`) or the velocity (`v`). `auto` is what the base's scheduler
    says. Touch it only for a base whose scheduler_config.json is wrong, or to teach a base the other one."""
    snr_gamma: float = 5.0
    """SD: Min-SNR weights (arXiv 2303.09556): steps of little noise, which are many and easy, count less. 5 is the
    paper's; 0 weighs all steps alike, as diffusers' ControlNet script does."""
    zero_terminal_snr: bool = False
    """SD: shift the noise levels so that the last one is pure noise (arXiv 2305.08891), for pictures that may be very
    dark or bright as a whole. Needs `v`, and a base that was trained so or is trained along."""

    def check(self) -> None:
        """Refuse values that no distribution and no weight has. Raises `UserError`."""
        for name, kind in (("timesteps", Timesteps), ("weighting", Weighting), ("prediction", Prediction)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise UserError(f"objective.{name} '{value}' is unknown: {nearest(value, get_args(kind))}")
        if not math.isfinite(self.logit_mean):
            raise UserError(f"objective.logit_mean must be a finite number, but is {self.logit_mean}")
        for name in ("logit_std", "shift"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"objective.{name} must be above 0, but is {value}")
        if not MODE_SCALE_MIN <= self.mode_scale <= MODE_SCALE_MAX:
            raise UserError(
                f"objective.mode_scale must be from {MODE_SCALE_MIN:g} to {MODE_SCALE_MAX:.2f}, "
                f"but is {self.mode_scale}"
            )
        if not (math.isfinite(self.snr_gamma) and self.snr_gamma >= 0):
            raise UserError(f"objective.snr_gamma must be above 0, or 0 for none, but is {self.snr_gamma}")

    @staticmethod
    def left_open(recorded: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
        """Options as a run has recorded them, with `auto` in the place of what it is for an objective of this kind:
        two runs are equal then of which one named what the other left open."""
        open_ = dict(recorded)
        if open_.get("timesteps") == _AUTO[kind]:
            open_["timesteps"] = "auto"
        return open_

    def timesteps_of(self, kind: Kind) -> Timesteps:
        """The distribution of t that an objective of this kind draws from: never `auto`."""
        return _AUTO[kind] if self.timesteps == "auto" else self.timesteps

    def scheduler(self, kind: Kind) -> dict[str, Any]:
        """Settings that diffusers' scheduler needs to paint with what an objective of this kind has trained; none where
        those of the base's own do. The last noise level is visited only with `trailing` (arXiv 2305.08891, 3.3)."""
        changed: dict[str, Any] = {}
        if kind == "ddpm" and self.prediction != "auto":
            changed["prediction_type"] = {"epsilon": "epsilon", "v": "v_prediction"}[self.prediction]
        if kind == "ddpm" and self.zero_terminal_snr:
            changed |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return changed

    def facts(self, kind: Kind) -> dict[str, str]:
        """What a model's card says of an objective of this kind: titles and values."""
        facts: dict[str, str] = {"Timesteps": self.timesteps_of(kind)}
        if kind == "flow":
            return facts | ({} if self.weighting == "none" else {"Loss weights": self.weighting})
        facts |= {} if self.prediction == "auto" else {"Prediction": self.prediction}
        facts |= {"Min-SNR gamma": f"{self.snr_gamma:g}"} if self.snr_gamma else {}
        return facts | ({"Noise levels": "zero terminal SNR"} if self.zero_terminal_snr else {})

    def unused(self, kind: Kind) -> list[str]:
        """Options that differ from their default but have no effect on an objective of this kind under the chosen
        `timesteps`: to be warned of."""
        optional = frozenset.union(*_OF_TIMESTEPS.values(), *_OF_KIND.values())
        effective = _OF_TIMESTEPS[self.timesteps_of(kind)] | _OF_KIND[kind]
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.name in optional - effective and getattr(self, field.name) != field.default
        ]
