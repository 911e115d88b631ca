"""Runs' folders -> the comparison's data."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared import families
from train import adapters
from train.compare import settings
from train.compare.data import Comparison, Figure, Machine, Picture, RunData, Series, State
from train.compare.measures import BY_NAME, EACH_STEP, MEASURES, RANKED_BY, Measure
from train.compare.read import Folder, find, flatten, read
from train.compare.statistics import t95, thin
from train.convergence import find as find_convergence

_MOST_POINTS = 400
"""Of a curve with a point for each step: more are not seen."""
_MOST_CLOCK = 200
_PICTURES = re.compile(r"step-(\d+)$")
_BY_TIME = re.compile(r"held_out/loss_t([0-9.]+)$")
Figures = Mapping[str, Mapping[int, float]]
"""Name -> step -> value."""
_FACTS = ("family", "model", "condition", "cache", "sizes", "text_length")


def gather(paths: Sequence[Path]) -> Comparison:
    """Read the runs at `paths`, or in the folders there. `UserError` where there is none."""
    folders = {name: read(path) for name, path in named(find(paths)).items()}
    ranked_by = _ranked_by([*folders.values()])
    runs = [_run(folder, name, ranked_by) for name, folder in folders.items()]
    return settings.compare(runs, ranked_by, [note for folder in folders.values() for note in folder.notes])


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """The folders by their names, with as much of what is above them as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return dict(zip(["/".join(part[-depth:]) for part in parts], paths, strict=True))


def _ranked_by(folders: Sequence[Folder]) -> str | None:
    """The figure that the most runs have; of several the one that says the most."""
    counts = {name: sum(name in folder.figures for folder in folders) for name in RANKED_BY}
    best = max(counts, key=lambda name: counts[name])  # the first of equals
    return best if counts[best] else None


def _run(folder: Folder, name: str, ranked_by: str | None) -> RunData:
    options, last = folder.options, folder.last_start
    memory, components = last.get("memory") or {}, last.get("components") or []
    num_processes = int(last.get("num_processes") or 1)
    global_batch = last.get("global_batch")
    if global_batch is None and {"batch_size", "accumulation"} <= memory.keys():
        global_batch = memory["batch_size"] * memory["accumulation"] * num_processes
    series = {measure.name: found for measure in MEASURES if (found := _series(folder.figures, measure)).steps}
    step = max((step for figure in folder.figures.values() for step in (*figure,)[-1:]), default=0)
    best_step, best_value = _best(series, ranked_by)
    trained = [component["num_trainable"] for component in components if component.get("num_trainable")]
    state, why = _state(folder, step)
    return RunData(
        name=name,
        setting=-1,
        state=state,
        why=why,
        step=step,
        steps=options.get("steps"),
        seed=options.get("seed"),
        depth=_depth(folder),
        num_parameters=sum(trained) if trained else None,
        global_batch=global_batch,
        options=options,
        facts=dict(flatten({key: folder.stated[key] for key in _FACTS if key in folder.stated})),
        series=series,
        samples_seen=_samples_seen(folder.figures, global_batch),
        final={name: _final(found, BY_NAME[name], options) for name, found in series.items()},
        best_step=best_step,
        best_value=best_value,
        by_time=_by_time(folder.figures),
        references=_references(folder.figures),
        convergence=_convergence(series),
        captions=_captions(folder.path),
        pictures=_pictures(folder.path),
        machine=_machine(folder, components, memory, num_processes),
    )


def _depth(folder: Folder) -> str | None:
    """None where what was trained has none, whatever the option says."""
    family, adapter = folder.stated.get("family"), folder.options.get("adapter")
    if adapter in adapters.names() and not adapters.get(adapter).conditioned:
        return None
    if family in families.names() and not families.get(family).has_depths:
        return None
    return folder.options.get("depth")


def _state(folder: Folder, step: int) -> tuple[State, str | None]:
    outcome = folder.outcome.get("outcome")
    if outcome == "failed":
        return "failed", str(folder.outcome.get("why") or "")
    ended = (folder.last_start.get("ended") or {}).get("why")
    for state in ("trained", "early_stop", "stopped"):
        if ended == state or (ended is None and outcome == state):
            return state, None
    return ("trained" if step >= folder.options.get("steps", math.inf) else "unfinished"), None


# Curves


def _series(figures: Figures, measure: Measure) -> Series:
    found = figures.get(measure.name, {})
    steps, values = list(found), list(found.values())
    if measure.name in EACH_STEP:
        return Series(*thin(steps, values, _MOST_POINTS))
    errors = figures.get(f"{measure.name}_error")
    return Series(steps, values, None if errors is None else [errors.get(step) for step in steps])


def _samples_seen(figures: Figures, global_batch: int | None) -> Series:
    known = figures.get("samples_seen", {})
    if not known and global_batch is not None:
        known = {step: float(step * global_batch) for step in figures.get("loss", {})}
    return _clock(known)


def _hours(figures: Figures, num_processes: int) -> Series:
    """Device hours at steps; where they were not logged, the steps' own time stands in."""
    if known := figures.get("device_hours", {}):
        return _clock(known)
    waited, hours, passed = figures.get("data_wait_seconds", {}), {}, 0.0
    for step, seconds in figures.get("step_seconds", {}).items():
        passed += (seconds + waited.get(step, 0.0)) * num_processes / 3600
        hours[step] = passed
    return _clock(hours)


def _clock(known: Mapping[int, float]) -> Series:
    """Cumulative figures, few enough to draw by: between them they grow evenly."""
    steps = list(known)
    every = math.ceil(len(steps) / _MOST_CLOCK) or 1
    kept = sorted({*steps[::every], *steps[-1:]})
    return Series(kept, [known[step] for step in kept])


def _convergence(series: Mapping[str, Series]) -> dict[str, int]:
    found = {}
    for name, curve in series.items():
        if name.startswith("adherence/") or name == "held_out/condition_gap":
            errors = [math.nan if error is None else error for error in curve.errors or [None] * len(curve.steps)]
            if (sudden := find_convergence(list(curve.steps), list(curve.values), errors)) is not None:
                found[name] = sudden.step
    return found


# Figures


def _final(series: Series, measure: Measure, options: Mapping[str, Any]) -> Figure:
    """The last look's figure; its interval is over the held-out samples."""
    value, error = series.values[-1], (series.errors or [None])[-1]
    count = options.get(measure.samples_option) if measure.samples_option else None
    if error is None:
        return Figure(value, None, None, "samples", count, series.steps[-1])
    half = (t95(count - 1) if isinstance(count, int) and count > 1 else 1.96) * error
    return Figure(value, value - half, value + half, "samples", count, series.steps[-1])


def _best(series: Mapping[str, Series], ranked_by: str | None) -> tuple[int | None, float | None]:
    if ranked_by is None or ranked_by not in series:
        return None, None
    found = series[ranked_by]
    choose = max if BY_NAME[ranked_by].better == "higher" else min
    at = choose(range(len(found.steps)), key=lambda i: found.values[i])
    return found.steps[at], found.values[at]


def _by_time(figures: Figures) -> list[tuple[float, float, float | None]]:
    """Of the last look."""
    names = {float(at[1]): name for name in figures if (at := _BY_TIME.match(name))}
    last = max((step for name in names.values() for step in figures[name]), default=None)
    found = [(t, figures[name].get(last), figures.get(f"{name}_error", {}).get(last))
             for t, name in sorted(names.items()) if last is not None]  # fmt: skip
    return [(t, value, error) for t, value, error in found if value is not None]


def _references(figures: Figures) -> dict[str, float]:
    """The last of each figure that adherence is held against."""
    names = [f"{measure.name}{ending}" for measure in MEASURES for ending, _ in measure.references]
    return {name: _last(figures, name) for name in names if name in figures}


# The machine


def _machine(
    folder: Folder, components: Sequence[Mapping[str, Any]], memory: Mapping[str, Any], num_processes: int
) -> Machine:
    last, figures = folder.last_start, folder.figures
    steps = figures.get("step_seconds", {}).values()
    devices = {device.partition(":")[0] for component in components for device in component["devices"].split("+")}
    loaded = sum(component["num_bytes"] for component in components) / 2**30
    gib, kind = next(
        (
            (float(value), kind)
            for value, kind in (
                (memory.get("allocated_gib"), "measured"), (memory.get("expected_gib"), "counted"),
                (loaded or None, "loaded"),
            )
            if value is not None
        ),
        (None, None),
    )  # fmt: skip
    return Machine(
        device=next((device for device in sorted(devices) if device not in ("cpu", "meta", "")), "cpu"),
        num_processes=num_processes,
        num_starts=len(folder.stated.get("starts") or []),
        memory_gib=gib,
        memory_kind=kind,  # type: ignore[arg-type]
        step_seconds=statistics.median(steps) if steps else None,
        data_wait_share=_last_or_none(figures, "data_wait_share"),
        look_share=_last_or_none(figures, "look_share"),
        hours=_hours(figures, num_processes),
        versions=last.get("versions") or {},
        git_revision=last.get("git_revision"),
    )


def _last(figures: Figures, name: str) -> float:
    return [*figures[name].values()][-1]


def _last_or_none(figures: Figures, name: str) -> float | None:
    return _last(figures, name) if name in figures else None


# Pictures


def _captions(run: Path) -> list[tuple[str, str]]:
    path = run / "pictures" / "held-out.json"
    if not path.is_file():
        return []
    return [(entry["key"], entry["caption"]) for entry in json.loads(path.read_text(encoding="utf-8"))]


def _pictures(run: Path) -> list[Picture]:
    """Single pictures by sample; of steps that have none, the grid."""
    keys = [key for key, _ in _captions(run)]
    found = []
    folder = run / "pictures"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        at = _PICTURES.match(path.stem)
        if at and path.is_dir():
            for i, key in enumerate(keys):
                if (picture := path / f"{i:02d}.png").is_file():
                    found.append(_picture(run, picture, int(at[1]), key))
        elif at and path.suffix == ".png" and not (keys and path.with_suffix("").is_dir()):
            found.append(_picture(run, path, int(at[1]), None))
    return found


def _picture(run: Path, path: Path, step: int, key: str | None) -> Picture:
    return Picture(step, key, str(path.relative_to(run)), hashlib.sha256(path.read_bytes()).hexdigest())
