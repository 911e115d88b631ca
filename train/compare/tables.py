"""Tables of the page: every figure of every run, and what differs between their configurations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from html import escape as e
from typing import Any

from train.compare import words
from train.compare.data import MACHINE, Comparison, Figure, RunData
from train.compare.measures import BY_NAME, MEASURES, Measure
from train.compare.ranking import figure_cell, looks, swatch
from train.compare.settings import told
from train.compare.words import NOTHING

_LOOKED = ("adherence/", "held_out/")
_MEMORY = {
    "measured": "the largest step's peak, measured",
    "counted": "the largest step's peak, as counted beforehand",
    "loaded": "what the loaded weights take; steps were not measured",
}
_CLASSES = {"failed": "bad", "unfinished": "odd", "stopped": "odd"}


def runs_table(comparison: Comparison) -> str:
    """Every run with all of its figures, HTML; each column can be sorted by."""
    measures = [
        measure
        for measure in MEASURES
        if measure.name.startswith(_LOOKED) and any(measure.name in run.final for run in comparison.runs)
    ]
    measures.sort(key=lambda measure: measure.name != comparison.ranked_by)
    losses = any("loss" in run.final for run in comparison.runs)
    ranked = BY_NAME[comparison.ranked_by].title if comparison.ranked_by else "held-out figures"
    first, others = measures[:1], measures[1:]
    heads = [
        ("Run", "", ""),
        ("Rank", "the order of settings", "n"),
        *(_head(measure) for measure in first),
        ("Depth", "", "n"),
        ("Parameters", "trained ones", "n"),
        ("Peak memory", "", "n"),
        ("Step time", "the median", "n"),
        ("Data wait", "share of the time that steps waited for data", "n"),
        ("Looks", "share of the time that looking at held-out samples took", "n"),
        ("Best step", f"where {ranked} was best", "n"),
        ("Converged at", "the step of sudden convergence, where there was one", "n"),
        *(_head(measure) for measure in others),
        *((("Training loss", "over the last 5 % of the steps", "n"),) if losses else ()),
        ("Steps", "", "n"),
        ("Samples seen", "", "n"),
        ("Device hours", "processes x time, looks included", "n"),
    ]
    rows = []
    look = looks(comparison.settings)
    for run in comparison.runs:
        machine = run.machine
        cells = [
            (run.name, _run_name(run, look[run.setting])),
            (float(run.setting), str(run.setting + 1)),
            *(_figure(run.final.get(measure.name)) for measure in first),
            (_depth_key(run.depth), e(run.depth or NOTHING)),
            _number(run.num_parameters, words.count),
            _memory(run),
            _number(machine.step_seconds, words.duration),
            _number(machine.data_wait_share, _percent),
            _number(machine.look_share, _percent),
            _best(run),
            _converged(run, comparison.ranked_by),
            *(_figure(run.final.get(measure.name)) for measure in others),
            *((_number(_last_loss(run), lambda value: words.number(value, 3)),) if losses else ()),
            _steps(run),
            _number(run.samples_seen.values[-1] if run.samples_seen.values else None, words.count),
            _number(machine.hours.values[-1] if machine.hours.values else None, words.hours),
        ]
        rows.append(cells)
    return _sortable(heads, rows, "Every run and its figures")


def _head(measure: Measure) -> tuple[str, str, str]:
    return measure.title, f"{measure.about} At the last look; \u00b1 is half of the 95 % interval", "n"


def _run_name(run: RunData, look: tuple[int, int]) -> str:
    badge = ""
    if run.state != "trained":
        kind = _CLASSES.get(run.state, "")
        badge = f' <span class="badge {kind}">{e(run.state.replace("_", " "))}</span>'
    why = f'<span class="under bad">{e(run.why)}</span>' if run.why else ""
    return f'<span class="named">{swatch(look)}<strong>{e(run.name)}</strong></span>{badge}{why}'


def _figure(figure: Figure | None) -> tuple[float | None, str]:
    return (None if figure is None else figure.value), figure_cell(figure)


def _number(value: float | None, shown: Any) -> tuple[float | None, str]:
    return (None, f'<span class="quiet">{NOTHING}</span>') if value is None else (float(value), e(shown(value)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u202f%"


def _best(run: RunData) -> tuple[float | None, str]:
    if run.best_step is None or run.best_value is None:
        return _number(None, str)
    return float(run.best_step), (f'{run.best_step:,}<span class="half">{e(words.number(run.best_value))}</span>')


def _converged(run: RunData, ranked_by: str | None) -> tuple[float | None, str]:
    step = run.convergence.get(ranked_by or "", next(iter(run.convergence.values()), None))
    return _number(step, lambda value: f"{value:,}")


def _depth_key(depth: str | None) -> float | None:
    """Depths by their number of blocks."""
    if depth is None:
        return None
    parts = [int(part) for part in depth.split("-") if part.isdigit()]
    return float(sum(parts)) + 0.001 * (parts[0] if parts else 0)


def _steps(run: RunData) -> tuple[float, str]:
    of = "" if run.steps is None or run.steps == run.step else f'<span class="half">of {run.steps:,}</span>'
    return float(run.step), f"{run.step:,}{of}"


def _memory(run: RunData) -> tuple[float | None, str]:
    gib, kind = run.machine.memory_gib, run.machine.memory_kind
    if gib is None or kind is None:
        return _number(None, str)
    mark = "" if kind == "measured" else f'<span class="half">{kind}</span>'
    text = f"{gib:.1f}\u202fGiB" if gib >= 1 else f"{1024 * gib:.0f}\u202fMiB" if gib >= 0.002 else "< 2\u202fMiB"
    return gib, f'<span title="{e(_MEMORY[kind])}">{text}</span>{mark}'


def _last_loss(run: RunData) -> float | None:
    series = run.series.get("loss")
    if series is None:
        return None
    tail = series.values[-max(1, len(series.values) // 20) :]
    return sum(tail) / len(tail)


def _sortable(
    heads: Sequence[tuple[str, str, str]], rows: Sequence[Sequence[tuple[float | str | None, str]]], caption: str
) -> str:
    columns = "".join(
        f'<th scope="col" class="{kind}"{" aria-sort=ascending" if i == 1 else ""}>'
        f'<button type="button" data-column="{i}" title="{e(about)}">{e(title)}</button></th>'
        for i, (title, about, kind) in enumerate(heads)
    )
    lines = []
    for row in rows:
        cells = []
        for (_, _, kind), (key, html) in zip(heads, row, strict=True):
            tag = "td" if kind else 'th scope="row"'
            sort = "" if key is None else f' data-key="{e(str(key))}"'
            cells.append(f'<{tag} class="{kind}"{sort}>{html}</{tag.split()[0]}>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table class="runs" id="runs-table"><caption>{e(caption)}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


# What differs


def differences_table(comparison: Comparison) -> str:
    """Options, facts and versions that are not the same in all runs; what only a minority has is marked."""
    if not comparison.differences:
        return '<p class="lead">All runs have the same options, on the same machine, of the same revision.</p>'
    look = looks(comparison.settings)
    chosen = {key: values for key, values in comparison.differences.items() if not key.startswith(MACHINE)}
    given = {key: values for key, values in comparison.differences.items() if key.startswith(MACHINE)}
    parts = []
    if chosen:
        parts.append(_differences(comparison, chosen, look, "Options and data"))
    if given:
        named = {key.removeprefix(MACHINE): values for key, values in given.items()}
        parts.append(
            f"<details><summary>{words.plural(len(given), 'version')} that differ</summary>"
            f"{_differences(comparison, named, look, 'Machine and versions')}</details>"
        )
    return "".join(parts)


def _differences(
    comparison: Comparison, differences: dict[str, Sequence[Any]], look: Sequence[tuple[int, int]], caption: str
) -> str:
    heads = "".join(f'<th scope="col"><code>{_breakable(key)}</code></th>' for key in differences)
    usual = {key: _usual(values) for key, values in differences.items()}
    rows = []
    for i, run in enumerate(comparison.runs):
        cells = "".join(
            f'<td class="{"other" if usual[key] not in (None, _plain(values[i])) else ""}">{e(told(values[i]))}</td>'
            for key, values in differences.items()
        )
        name = f'<span class="named">{swatch(look[run.setting])}{e(run.name)}</span>'
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="differences"><caption>{e(caption)}</caption><thead><tr>'
        f'<th scope="col">Run</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _breakable(key: str) -> str:
    return e(key).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _usual(values: Sequence[Any]) -> str | None:
    """What more than half of the runs have."""
    value, count = Counter(map(_plain, values)).most_common(1)[0]
    return value if 2 * count > len(values) else None
