"""What the page's script draws from: curves, clocks, pictures, in as few digits as can be seen."""

from __future__ import annotations

from typing import Any

from train.compare.data import Comparison, Series
from train.compare.measures import BY_NAME, EACH_STEP, MEASURES, Measure
from train.compare.pictures import STILL, Album
from train.compare.ranking import looks
from train.compare.settings import counted
from train.compare.statistics import t95

FIRST = ("held_out/condition_gap", "held_out/control_gap", "held_out/loss", "loss")
"""Curves that are always shown at once."""


def panels(comparison: Comparison) -> tuple[list[Measure], list[Measure]]:
    """The curves that are shown at once, and those behind "more": what some run has."""
    there = [measure for measure in MEASURES if any(measure.name in run.series for run in comparison.runs)]
    ranked = comparison.ranked_by if (comparison.ranked_by or "").startswith("adherence/") else None
    first = [BY_NAME[name] for name in (ranked, *FIRST) if name is not None and BY_NAME[name] in there]
    return first, [measure for measure in there if measure not in first]


def payload(comparison: Comparison, album: Album) -> dict[str, Any]:
    """JSON values for the script."""
    look = looks(comparison.settings)
    of_means = {
        run.name for setting in comparison.settings for run in counted([comparison.runs[i] for i in setting.runs])
    }
    first, more = panels(comparison)
    devices = {run.machine.device for run in comparison.runs if run.machine.hours.steps}
    return {
        "runs": [
            {
                "name": run.name,
                "seed": run.seed,
                "setting": run.setting,
                "series": {name: _series(series) for name, series in run.series.items()},
                "samples": _series(run.samples_seen)[:2],
                "hours": _series(run.machine.hours)[:2],
                "convergence": dict(run.convergence),
                "by_time": [[t, _short(loss), _short(error)] for t, loss, error in run.by_time],
                "references": {name: _short(value) for name, value in run.references.items()},
                "painted": album.painted.get(run.name, {}),
                "counted": run.name in of_means,
            }
            for run in comparison.runs
        ],
        "settings": [
            {"label": setting.label, "runs": list(setting.runs), "color": color, "dash": dash}
            for setting, (color, dash) in zip(comparison.settings, look, strict=True)
        ],
        "panels": [_panel(measure, False) for measure in first] + [_panel(measure, True) for measure in more],
        "samples": [
            {"key": key, "caption": album.captions[key], **{what: still.get(what) for what in STILL}}
            for key, still in album.stills.items()
        ]
        + (
            [{"key": "", "caption": "", **dict.fromkeys(STILL)}] if any("" in p for p in album.painted.values()) else []
        ),
        "images": [[image.src, image.width, image.height] for image in album.images],
        "t95": [round(t95(degrees), 4) for degrees in range(1, 31)],
        "clock": "GPU hours" if devices == {"cuda"} else "CPU hours" if devices == {"cpu"} else "Device hours",
    }


def _panel(measure: Measure, more: bool) -> dict[str, Any]:
    return {
        "name": measure.name, "title": measure.title, "about": measure.about, "better": measure.better,
        "share": measure.share, "noisy": measure.name in EACH_STEP and measure.name != "learning_rate",
        "references": [[f"{measure.name}{ending}", text] for ending, text in measure.references], "more": more,
    }  # fmt: skip


def _series(series: Series) -> list[Any]:
    errors = None if series.errors is None else [_short(error) for error in series.errors]
    return [list(series.steps), [_short(value) for value in series.values], errors]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
