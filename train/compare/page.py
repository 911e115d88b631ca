"""A comparison -> one HTML page that needs nothing but itself. Everything that comes from runs is hostile: see
`shared.page`."""

from __future__ import annotations

from datetime import datetime
from html import escape as e
from importlib import resources

from shared.page import assemble, base_style, script_json
from train.compare import words
from train.compare.data import Comparison, Figure
from train.compare.measures import BY_NAME, Measure
from train.compare.payload import payload
from train.compare.pictures import Album
from train.compare.ranking import ranking
from train.compare.tables import differences_table, runs_table
from train.compare.words import plural

_SCRIPTS = ("charts.js", "curves.js", "pictures.js", "tables.js")


def page(comparison: Comparison, album: Album, name: str, made_at: datetime) -> str:
    """The page. `name` is that of the folder that the runs are in, empty where it is not one; `made_at` the time that
    the page states."""
    title = name or plural(len(comparison.runs), "run")
    parts = {
        "title": e(title),
        "header": _header(comparison, album, title, made_at),
        "ranking": ranking(comparison),
        "curves_lead": _curves_lead(comparison),
        "pictures_lead": _pictures_lead(album),
        "has_pictures": "" if album.painted else "hidden",
        "runs": runs_table(comparison),
        "by_time_hidden": "" if any(run.by_time for run in comparison.runs) else "hidden",
        "differences": differences_table(comparison),
        "data": script_json(payload(comparison, album)),
    }
    script = "\n".join(['"use strict";', "(() => {", *map(_file, _SCRIPTS), "})();"])
    return assemble(_file("template.html"), parts, style=base_style() + _file("style.css"), script=script)


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _header(comparison: Comparison, album: Album, title: str, made_at: datetime) -> str:
    runs, settings = comparison.runs, comparison.settings
    seeds = {run.seed for run in runs if run.seed is not None}
    failed = sum(run.state == "failed" for run in runs)
    hours = [run.machine.hours.values[-1] for run in runs if run.machine.hours.values]
    seen = [run.samples_seen.values[-1] for run in runs if run.samples_seen.values]
    device = {"cuda": "GPU", "cpu": "CPU"}.get(runs[0].machine.device, "device")
    figures = [
        (f"{len(runs):,}", "run" if len(runs) == 1 else "runs", ""),
        (f"{len(settings):,}", "setting" if len(settings) == 1 else "settings", ""),
        (f"{len(seeds):,}", "seed" if len(seeds) == 1 else "seeds", ""),
        *([(words.count(sum(seen)), "samples seen", "")] if seen else []),
        *([(words.hours(sum(hours)), f"of {device} time", "")] if hours else []),
        *([(f"{failed:,}", "failed", "bad")] if failed else []),
    ]
    boxes = []
    if comparison.caveats:
        boxes.append(_box("Before you compare", comparison.caveats))
    if notes := [*comparison.notes, *album.notes]:
        boxes.append(_box("Noted", notes))
    items = "".join(
        f'<li class="{kind}"><strong>{e(value)}</strong> <span>{e(label)}</span></li>' for value, label, kind in figures
    )
    return (
        f'<p class="eyebrow">Underdrawing comparison \u00b7 {made_at:%Y-%m-%d %H:%M}</p><h1>{e(title)}</h1>'
        f'<p class="sentence">{_answer(comparison)}</p><ul class="figures">{items}</ul>{"".join(boxes)}'
    )


def _box(title: str, sentences: list[str] | tuple[str, ...] | object) -> str:
    assert isinstance(sentences, list | tuple)
    items = "".join(f"<li>{e(sentence)}</li>" for sentence in sentences)
    return f'<aside class="box"><h2>{title}</h2><ul>{items}</ul></aside>'


def _answer(comparison: Comparison) -> str:
    """Which setting is best, by how much, and whether that is more than chance."""
    if comparison.ranked_by is None or comparison.ranked_by not in comparison.settings[0].final:
        return "No run has looked at held-out samples yet."
    measure = BY_NAME[comparison.ranked_by]
    best = comparison.settings[0]
    figure = best.final[measure.name]
    value, half = words.with_half(figure.value, words.half_of(figure))
    verb = "follows the drawings best" if measure.name != "held_out/loss" else "has the lowest held-out loss"
    over = f" over {figure.count} seeds" if figure.over == "seeds" else ""
    said = f"{e(measure.title)} {value}{f' {half}' if half else ''}{over}"
    if beaten := _not_followed(comparison, measure, figure):
        return f"No setting follows its drawing yet. The best, <b>{e(best.label)}</b>, has {said}: {beaten}."
    if len(comparison.settings) == 1:
        return f"<b>{e(best.label)}</b> has {said}."
    text = f"<b>{e(best.label)}</b> {verb}: {said}."
    lead = comparison.lead
    if lead is None:
        return text
    second = comparison.settings[lead.second].label
    ahead, within = words.with_half(lead.difference, lead.half)
    before = f"ahead of <b>{e(second)}</b>"
    if lead.half is None:
        return f"{text} It is {ahead} {before}; nothing says whether by chance."
    chance = abs(lead.difference) <= lead.half
    if lead.paired:
        judged = "which may be chance: more seeds would tell" if chance else "which chance hardly explains"
        return f"{text} Over the seeds that both have it is {ahead} {within} {before}, {judged}."
    judged = "the choice of held-out samples explains that, too" if chance else "more than other samples would change"
    return f"{text} It is {ahead} {within} {before}, {judged}; what another seed would change is not known."


def _not_followed(comparison: Comparison, measure: Measure, figure: Figure) -> str | None:
    """Why the best figure does not say that the drawing is followed; None where it does, or does not speak of it."""
    low = figure.value if figure.low is None else figure.low
    if measure.name == "held_out/condition_gap" and low <= 0:
        return "another\u2019s drawing would do as well"
    for ending, text in measure.references:
        found = [
            run.references[name] for run in comparison.runs if (name := f"{measure.name}{ending}") in run.references
        ]
        if ending != "_ceiling" and found and low <= (chance := sum(found) / len(found)):
            return f"{text} it is {words.number(chance)}, no less than chance allows"
    return None


def _curves_lead(comparison: Comparison) -> str:
    if not any(run.series for run in comparison.runs):
        return "No run has logged a step yet."
    converged = any(run.convergence for run in comparison.runs)
    ring = " A ring marks the step of sudden convergence." if converged else ""
    return f"Point at a curve to read all of them at once.{ring}"


def _pictures_lead(album: Album) -> str:
    if not album.painted:
        return "No run has painted held-out samples yet."
    less = f" {album.num_left_out:,} pictures of steps between are left out." if album.num_left_out else ""
    return f"Held-out drawings, painted by each run from the same noise. Click to enlarge.{less}"
