"""The ranks of the settings: a table whose middle column is a chart of every run, mean and interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape as e

from train.compare import words
from train.compare.data import Comparison, Figure, RunData, Setting
from train.compare.measures import BY_NAME, Measure
from train.compare.settings import counted
from train.compare.words import NOTHING

COLORS, DASHES = 10, 4
_BESIDE = ("held_out/condition_gap", "held_out/loss")


def looks(settings: Sequence[Setting]) -> list[tuple[int, int]]:
    """(colour, dash) of each setting: where two options make the settings, the one is colour and the other is dash."""
    if not settings:
        return []
    keys = [key for key in settings[0].differs if key != "global_batch"]
    values = [
        sorted({words_of(setting.differs[key]) for setting in settings}, key=lambda text: (len(text), text))
        for key in keys
    ]
    if len(keys) == 2:
        first, second = sorted((0, 1), key=lambda k: -len(values[k]))
        if len(values[first]) <= COLORS and len(values[second]) <= DASHES and len(values[second]) < len(settings):
            return [
                (
                    values[first].index(words_of(setting.differs[keys[first]])),
                    values[second].index(words_of(setting.differs[keys[second]])),
                )
                for setting in settings
            ]
    return [(i % COLORS, i // COLORS % DASHES) for i in range(len(settings))]


def words_of(value: object) -> str:
    """A value by which settings are told apart."""
    return repr(value)


def swatch(look: tuple[int, int]) -> str:
    """A short piece of a setting's line."""
    return (
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">'
        f'<line class="c{look[0]} d{look[1]}" x1="1" x2="25" y1="5" y2="5"/></svg>'
    )


def ranking(comparison: Comparison) -> str:
    """The table, HTML; a sentence where nothing ranks."""
    if comparison.ranked_by is None:
        return '<p class="lead">No run has looked at held-out samples yet, so nothing ranks them.</p>'
    measure = BY_NAME[comparison.ranked_by]
    axis = _Axis.of(comparison, measure)
    beside = [
        BY_NAME[name]
        for name in _BESIDE
        if name != measure.name and any(name in setting.final for setting in comparison.settings)
    ]
    rows = []
    for rank, (setting, look) in enumerate(zip(comparison.settings, looks(comparison.settings), strict=True), 1):
        figure = setting.final.get(measure.name)
        cells = "".join(f'<td class="n">{figure_cell(setting.final.get(other.name))}</td>' for other in beside)
        runs = [comparison.runs[i] for i in setting.runs]
        rows.append(
            f'<tr><td class="rank">{rank if figure else NOTHING}</td>'
            f'<th scope="row"><span class="named">{swatch(look)}<strong>{e(setting.label)}</strong></span>'
            f'<span class="under">{_seeds(runs)}{_states(comparison, setting)}</span></th>'
            f'<td class="forest">{axis.row(comparison, setting, measure, look)}</td>'
            f'<td class="n">{figure_cell(figure, strong=rank == 1)}</td>{cells}</tr>'
        )
    dense = " dense" if len(rows) > 12 else ""
    heads = "".join(f'<th scope="col" class="n">{e(other.title)}</th>' for other in beside)
    arrow = "higher is better" if measure.better == "higher" else "lower is better"
    return (
        f'<div class="scroll" tabindex="0"><table class="ranking{dense}"><caption>Settings by rank</caption><thead><tr>'
        '<th scope="col" class="rank">Rank</th><th scope="col">Setting</th>'
        f'<th scope="col" class="forest">{e(measure.title)} <small>{arrow}</small></th>'
        f'<th scope="col" class="n">{e(measure.title)}</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot><tr><td></td><td></td><td class="forest">{axis.ticks()}</td>'
        f"<td></td>{'<td></td>' * len(beside)}</tr></tfoot></table></div>"
        f'<p class="legend">{axis.legend()}<span class="what">{_what_intervals(comparison, measure)}</span></p>'
    )


def figure_cell(figure: Figure | None, strong: bool = False) -> str:
    """A figure with half of its interval, HTML."""
    if figure is None:
        return f'<span class="quiet">{NOTHING}</span>'
    value, half = words.with_half(figure.value, words.half_of(figure))
    value = f"<strong>{value}</strong>" if strong else value
    return f'{value}<span class="half">{half}</span>' if half else value


def _seeds(runs: Sequence[RunData]) -> str:
    """Which seeds the means are over."""
    known = sorted({run.seed for run in counted(runs) if run.seed is not None})
    of = f" of {len(runs)}" if len(known) < len(runs) else ""
    return (
        f"seed {known[0]}{of and f'; 1{of} runs'}"
        if len(known) == 1
        else (f"{len(known)} seeds: {', '.join(map(str, known))}{of and f'; {len(known)}{of} runs'}" if known else "")
    )


def _states(comparison: Comparison, setting: Setting) -> str:
    states = [comparison.runs[i].state for i in setting.runs]
    said = [f"{states.count(state)} {state}" if len(states) > 1 else state
            for state in dict.fromkeys(states) if state in ("failed", "unfinished", "stopped")]  # fmt: skip
    return f' <span class="badge bad">{e(", ".join(said))}</span>' if said else ""


def _what_intervals(comparison: Comparison, measure: Measure) -> str:
    kinds = {setting.final[measure.name].over for setting in comparison.settings if measure.name in setting.final
             and setting.final[measure.name].high is not None}  # fmt: skip
    said = []
    if "seeds" in kinds:
        said.append("Bars: 95 % interval of the mean over seeds (Student\u2019s t); each small dot is a run.")
    if "samples" in kinds:
        said.append(
            "Thin bars: one seed only; the interval is over its held-out samples, and says nothing about another seed."
        )
    return " ".join(said)


class _Axis:
    """The scale that all rows share."""

    def __init__(self, low: float, high: float, step: float, references: Sequence[tuple[str, str, float]]) -> None:
        self.low, self.high, self.step, self.references = low, high, step, references

    @classmethod
    def of(cls, comparison: Comparison, measure: Measure) -> _Axis:
        references = []
        for ending, text in measure.references:
            found = [run.references[f"{measure.name}{ending}"] for run in comparison.runs
                     if f"{measure.name}{ending}" in run.references]  # fmt: skip
            if found:
                references.append((ending.strip("_"), text, math.fsum(found) / len(found)))
        values = [value for _, _, value in references]
        for setting in comparison.settings:
            for figure in [setting.final.get(measure.name), *(comparison.runs[i].final.get(measure.name)
                                                              for i in setting.runs)]:  # fmt: skip
                if figure is not None:
                    values.append(figure.value)
        spread = max(values) - min(values)
        if spread <= 1e-9 * abs(max(values)):
            spread = abs(max(values)) or 1.0
            values += [min(values) - spread / 2, max(values) + spread / 2]
        for setting in comparison.settings:
            if (figure := setting.final.get(measure.name)) is not None and figure.low is not None:
                # Of two seeds the interval can be many times as wide as all else: it is then cut at the edge.
                values += [max(figure.low, min(values) - spread), min(figure.high or 0.0, max(values) + spread)]
        low, high = min(values), max(values)
        if measure.share:
            low, high = max(0.0, low), min(1.0, high)
        pad = 0.04 * (high - low or 1.0)
        low, high = low - pad, high + pad
        step = next(f * p for p in [10.0 ** math.floor(math.log10((high - low) / 5))]
                    for f in (1, 2, 5, 10) if f * p >= (high - low) / 6)  # fmt: skip
        return cls(low, high, step, references)

    def x(self, value: float) -> str:
        """In percent of the width."""
        return f"{100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))):.2f}%"

    def _grid(self) -> str:
        lines = "".join(f'<line class="grid" x1="{self.x(tick)}" x2="{self.x(tick)}" y1="0" y2="100%"/>'
                        for tick in self._values())  # fmt: skip
        return lines + "".join(
            f'<line class="reference {name}" x1="{self.x(value)}" x2="{self.x(value)}" y1="0" y2="100%"/>'
            for name, _, value in self.references
        )

    def _values(self) -> list[float]:
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [i * self.step for i in range(first, last + 1)]

    def row(self, comparison: Comparison, setting: Setting, measure: Measure, look: tuple[int, int]) -> str:
        """A setting's runs, mean and interval."""
        figure = setting.final.get(measure.name)
        told, marks = setting.label, ""
        runs = [
            found
            for run in counted([comparison.runs[i] for i in setting.runs])
            if (found := run.final.get(measure.name)) is not None
        ]
        if figure is not None:
            value, half = words.with_half(figure.value, words.half_of(figure))
            told = f"{setting.label}: {measure.title} {value} {half}".strip()
            if figure.low is not None and figure.high is not None:
                kind = "interval" if figure.over == "seeds" else "interval thin"
                marks += (
                    f'<line class="{kind}" x1="{self.x(figure.low)}" x2="{self.x(figure.high)}" y1="50%" y2="50%"/>'
                )
            if len(runs) > 1:
                marks += "".join(f'<circle class="run" cx="{self.x(run.value)}" cy="50%" r="3"/>' for run in runs)
                marks += (
                    f'<line class="mean" x1="{self.x(figure.value)}" x2="{self.x(figure.value)}" y1="18%" y2="82%"/>'
                )
            else:
                marks += f'<circle class="point" cx="{self.x(figure.value)}" cy="50%" r="5"/>'
        return (
            f'<svg class="row c{look[0]}" role="img" aria-label="{e(told)}"><title>{e(told)}</title>'
            f"{self._grid()}{marks}</svg>"
        )

    def ticks(self) -> str:
        """The axis below."""
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        texts = "".join(
            f'<text x="{self.x(tick)}" y="12" text-anchor="middle">{words.fixed(tick, decimals)}</text>'
            for tick in self._values()
        )
        return f'<svg class="ticks" aria-hidden="true">{texts}</svg>'

    def legend(self) -> str:
        """What the vertical lines are."""
        return "".join(
            '<span class="key"><svg class="swatch" viewBox="0 0 10 14" aria-hidden="true">'
            f'<line class="reference {name}" x1="5" x2="5" y1="0" y2="14"/></svg>'
            f"{e(text)} {words.number(value)}</span> "
            for name, text, value in self.references
        )
