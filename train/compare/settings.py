"""Runs -> settings (equal but for the seed), their means and ranks; what differs, and what forbids comparing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from train.compare.data import MACHINE, Comparison, Figure, Lead, RunData, Setting
from train.compare.measures import BY_NAME
from train.compare.statistics import mean_interval
from train.config import MAY_CHANGE

_NAMES = ("name", "runs")
_OF_LOOKS = (
    "validation.seed",
    "validation.samples",
    "validation.timesteps",
    "validation.adherence_samples",
    "validation.picture_steps",
)


def compare(runs: Sequence[RunData], ranked_by: str | None, notes: Sequence[str]) -> Comparison:
    """The whole comparison of these runs."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_experiment(run), sort_keys=True, default=str), []).append(run)
    members = [sorted(group, key=lambda run: (run.seed or 0, run.name)) for group in groups.values()]
    differing = _differing([_experiment(group[0]) for group in members if group[0].options])
    made = []
    for group in members:
        differs = {key: _experiment(group[0]).get(key) for key in differing}
        made.append((Setting(_label(differs, group), differs, [], _means(group)), group))
    better = BY_NAME[ranked_by].better if ranked_by else "higher"
    made.sort(key=lambda entry: _rank(entry[0].final, ranked_by, better))
    ordered: list[RunData] = []
    settings: list[Setting] = []
    for setting, group in made:
        settings.append(replace(setting, runs=list(range(len(ordered), len(ordered) + len(group)))))
        ordered += [replace(run, setting=len(settings) - 1) for run in group]
    return Comparison(
        ranked_by=ranked_by,
        runs=ordered,
        settings=settings,
        lead=_lead(settings, ordered, ranked_by),
        differences=_differences(ordered),
        caveats=_caveats(ordered),
        notes=[*notes, *_repeated(settings, ordered)],
    )


def _experiment(run: RunData) -> dict[str, Any]:
    """All that makes the experiment, but for the seed. Accumulation is not part of it: the global batch is."""
    kept = {
        key: value
        for key, value in run.options.items()
        if key == "steps" or not (key in ("seed", *_NAMES) or _may_change(key))
    }
    if not run.options:
        return {"name": run.name}  # nothing is known of it: it stands for itself
    return kept | {key: value for key, value in run.facts.items()} | {"global_batch": run.global_batch}


def _may_change(key: str) -> bool:
    return any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in MAY_CHANGE)


def _differing(all_options: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not all equal, in the order of the options."""
    keys = list(dict.fromkeys(key for options in all_options for key in options))
    return [key for key in keys if any(options.get(key) != all_options[0].get(key) for options in all_options)]


def _label(differs: Mapping[str, Any], group: Sequence[RunData]) -> str:
    """What tells a setting from the others, in words: "depth 2-4, learning rate 1e-05"."""
    if not differs or not group[0].options:
        if len(group) == 1:
            return group[0].name
        return f"depth {group[0].depth}" if group[0].depth else str(group[0].options.get("adapter"))
    lasts = [key.rpartition(".")[2] for key in differs]
    words = []
    for key, value in differs.items():
        last = key.rpartition(".")[2]
        name = (last if lasts.count(last) == 1 else key).replace("_", " ")
        words.append(f"{name} {told(value)}")
    return ", ".join(words)


def told(value: Any) -> str:
    """An option's value, to be read."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(told, value)) or "none"
    if isinstance(value, str) and len(value) == 64:
        return value[:8]
    return "not set" if value is None else str(value)


def counted(group: Sequence[RunData]) -> list[RunData]:
    """The runs of a setting that its means are over: those that came to their end, where any did; and as runs repeated
    with the same seed say nothing new, the first of each."""
    ended = [run for run in group if run.state in ("trained", "early_stop")]
    return list({run.seed: run for run in reversed(ended or group)}.values())[::-1]


def _means(group: Sequence[RunData]) -> dict[str, Figure]:
    """Each figure's mean over seeds with its interval; of a single seed, its own."""
    group = counted(group)
    names = list(dict.fromkeys(name for run in group for name in run.final))
    means = {}
    for name in names:
        found = [run.final[name] for run in group if name in run.final]
        if len(found) == 1:
            means[name] = found[0]
            continue
        mean, half = mean_interval([figure.value for figure in found])
        assert half is not None
        steps = {figure.step for figure in found}
        means[name] = Figure(
            mean, mean - half, mean + half, "seeds", len(found), steps.pop() if len(steps) == 1 else None
        )
    return means


def _rank(final: Mapping[str, Figure], ranked_by: str | None, better: str) -> float:
    """Small is first; what has no figure comes last."""
    if ranked_by is None or ranked_by not in final:
        return math.inf
    return -final[ranked_by].value if better == "higher" else final[ranked_by].value


def _lead(settings: Sequence[Setting], runs: Sequence[RunData], ranked_by: str | None) -> Lead | None:
    """How far the first is ahead of the second: over common seeds, whose noise and order of data are the same, by
    their differences."""
    if ranked_by is None or len(settings) < 2 or any(ranked_by not in setting.final for setting in settings[:2]):
        return None
    sign = 1.0 if BY_NAME[ranked_by].better == "higher" else -1.0
    values = [
        {run.seed: run.final[ranked_by].value
         for run in counted([runs[i] for i in setting.runs]) if ranked_by in run.final}
        for setting in settings[:2]
    ]  # fmt: skip
    common = [seed for seed in values[0] if seed in values[1]]
    if len(common) > 1:
        difference, half = mean_interval([sign * (values[0][seed] - values[1][seed]) for seed in common])
        return Lead(0, 1, difference, half, paired=True)
    first, second = (setting.final[ranked_by] for setting in settings[:2])
    halves = [None if figure.high is None else figure.high - figure.value for figure in (first, second)]
    known = [half for half in halves if half is not None]
    difference = sign * (first.value - second.value)
    return Lead(0, 1, difference, math.hypot(*known) if len(known) == 2 else None, paired=False)


# What differs


def _differences(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Each option, fact and version that is not the same in all runs."""
    every = [
        {key: value for key, value in run.options.items() if key not in _NAMES}
        | dict(run.facts)
        | {f"{MACHINE}processes": run.machine.num_processes, f"{MACHINE}revision": run.machine.git_revision}
        | {f"{MACHINE}{package}": version for package, version in run.machine.versions.items()}
        for run in runs
        if run.options
    ]
    keys = _differing(every) if every else []
    found: dict[str, list[Any]] = {key: [] for key in keys}
    told_of = iter(every)
    for run in runs:
        options = next(told_of) if run.options else {}
        for key in keys:
            found[key].append(options.get(key))
    return found


def _caveats(runs: Sequence[RunData]) -> list[str]:
    """What stands in the way of comparing."""
    known = [run for run in runs if run.final]
    found = []

    def unlike(of: Callable[[RunData], Any]) -> bool:
        return len({json.dumps(of(run), sort_keys=True, default=str) for run in known}) > 1

    if unlike(lambda run: {key: value for key, value in run.facts.items() if key.startswith("cache.")}):
        found.append("The runs stand on different caches: their held-out samples need not be the same.")
    if unlike(lambda run: run.facts.get("model.name")):
        found.append("The runs stand on different base models.")
    if unlike(lambda run: run.facts.get("condition")):
        found.append("The runs follow different conditions: adherence to one is not adherence to another.")
    if unlike(lambda run: [run.options.get(key) for key in _OF_LOOKS]):
        found.append("The runs look at held-out samples in different ways (validation): their figures hardly compare.")
    unfinished = [run.name for run in known if run.state in ("unfinished", "stopped")]
    if unfinished:
        found.append(f"Not finished, so that figures are those of the last look: {', '.join(unfinished)}.")
    ends = sorted({run.step for run in known if run.state == "trained"})
    if len(ends) > 1:
        found.append(f"The runs end at different steps ({', '.join(f'{step:,}' for step in ends)}).")
    early = [f"{run.name} at {run.step:,}" for run in known if run.state == "early_stop"]
    if early:
        found.append(f"Stopped early by their held-out loss: {', '.join(early)}.")
    return found


def _repeated(settings: Sequence[Setting], runs: Sequence[RunData]) -> list[str]:
    """Runs of one setting and one seed: whether they are identical, as they should be on one machine."""
    found = []
    for setting in settings:
        first: dict[int | None, RunData] = {}
        for i in setting.runs:
            run = runs[i]
            before = first.setdefault(run.seed, run)
            if before is not run:
                same = (before.series, before.by_time, before.references) == (run.series, run.by_time, run.references)
                found.append(
                    f"{before.name} and {run.name} are the same experiment with the same seed; their figures are "
                    f"{'identical' if same else 'not identical'}. Means and intervals count one of them."
                )
    return found
