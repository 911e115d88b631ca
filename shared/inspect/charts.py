"""Charts as SVG that stands in the page: histograms, and the range of every channel.

All text is escaped, colours come from the page's style sheet by class, and each chart has a title and a description in
words for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

WIDE, NARROW = 440, 330
"""Widths of a chart, in units that are pixels at a normal size of text: of two or of three side by side."""
_HEIGHT = 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 32, 44
_MOST_BINS = 30
_MOST_TICKS = 6
_TICK_WIDTH = 24
_WIDE_RATIO = 60
"""Numbers that differ by more than this get bins of growing width."""
_ROUND_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


@dataclass(frozen=True)
class Histogram:
    """Counts in bins; all bins are drawn equally wide, whatever their edges."""

    edges: NDArray[np.float64]
    """(K + 1,): bin k holds edges[k] <= x < edges[k + 1]."""
    counts: NDArray[np.int64]
    """(K,)"""
    marked: NDArray[np.int64]
    """(K,): of them, those to be told apart by colour."""

    def position(self, value: float) -> float:
        """Where a value is on the axis: 0 at the first edge, 1 at the last."""
        return float(np.interp(value, self.edges, np.linspace(0, 1, len(self.edges))))


def count(values: ArrayLike, marked: ArrayLike | None = None, edges: NDArray[np.float64] | None = None) -> Histogram:
    """A histogram of at least one finite value. Without `edges`, they are round numbers."""
    numbers = np.asarray(values, np.float64)
    edges = round_edges(numbers) if edges is None else edges
    chosen = np.zeros(len(numbers), bool) if marked is None else np.asarray(marked, bool)
    inside = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    bins = len(edges) - 1
    return Histogram(edges, np.bincount(inside, minlength=bins), np.bincount(inside[chosen], minlength=bins))


def round_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of at most some thirty bins at round numbers: even ones, or growing ones for numbers far apart."""
    low, high = float(values.min()), float(values.max())
    if _spread_wide(low, high):
        return _growing_edges(values)
    whole = bool((values == np.floor(values)).all())
    step = _nice((high - low) / _MOST_BINS) if high > low else (abs(low) / 10 or 1.0)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.floor(low / step)
    num_bins = math.floor(high / step) - first + 1
    return np.arange(first, first + num_bins + 1, dtype=np.float64) * step


def _spread_wide(low: float, high: float) -> bool:
    return low > 0 and high / low > _WIDE_RATIO


def _growing_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round edges whose distance grows with them; whole ones for whole numbers."""
    low, high = float(values.min()), float(values.max())
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
    ladder = [step * 10.0**exponent for exponent in exponents for step in _ROUND_STEPS]
    if (values == np.floor(values)).all():
        ladder = [edge for edge in ladder if edge == int(edge)]
    first = max(i for i, edge in enumerate(ladder) if edge <= low)
    last = min(i for i, edge in enumerate(ladder) if edge > high)
    return np.array(ladder[first : last + 1])


def round_ticks(edges: NDArray[np.float64]) -> list[float]:
    """Round numbers to write at an axis of bins with these edges, six or so."""
    low, high = float(edges[0]), float(edges[-1])
    if not np.allclose(np.diff(edges), edges[1] - edges[0]):
        for mantissas in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
            ticks = [
                edge for edge in edges.tolist() if round(edge / 10 ** math.floor(math.log10(edge)), 6) in mantissas
            ]
            if len(ticks) <= _MOST_TICKS:
                return ticks
        return ticks
    step = max(_nice((high - low) / (_MOST_TICKS - 1)), float(edges[1] - edges[0]))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _nice(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def number(value: float, digits: int = 3) -> str:
    """A number to be read: whole ones in groups of three, others with so many digits."""
    text = f"{int(value):,}" if value == int(value) and abs(value) < 1e15 else f"{value:.{digits}g}"
    return text.replace("-", "\u2212", 1) if value < 0 else text


def histogram_svg(
    histogram: Histogram,
    *,
    name: str,
    title: str,
    x_label: str,
    y_label: str,
    description: str,
    width: int = WIDE,
    marked_label: str = "",
    ticks: Sequence[tuple[float, str]] | None = None,
    line: tuple[float, str] | None = None,
    bin_label: Callable[[float, float], str] = lambda low, high: f"{number(low)} to below {number(high)}",
) -> str:
    """The chart. `name` is unique in the page; `ticks` are (value, text) at the x axis, by default round numbers;
    `line` is a (value, text) that is drawn from top to bottom."""
    bins = len(histogram.counts)
    plot_width, plot_height, right_end = width - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM, width - _RIGHT
    top_count, y_ticks = _count_axis(int(histogram.counts.max(initial=0)))
    if ticks is None:
        ticks = [(tick, _short(tick)) for tick in round_ticks(histogram.edges)]

    def x(value: float) -> float:
        return _LEFT + plot_width * histogram.position(value)

    def y(value: float) -> float:
        return _TOP + plot_height * (1 - value / top_count)

    parts = _frame(name, title, description, x_label, y_label, width)
    for tick in y_ticks:
        parts.append(_level(y(tick), right_end, _short(tick), "grid"))
    slot = plot_width / bins
    gap = min(2.0, slot * 0.15)
    wide = min(slot - gap, 64.0)
    for k in range(bins):
        total, marked = int(histogram.counts[k]), int(histogram.marked[k])
        if not total:
            continue
        told = f"{bin_label(float(histogram.edges[k]), float(histogram.edges[k + 1]))}: {total:,}"
        if marked:
            told += f", of them {marked:,} {marked_label}"
        left = _LEFT + slot * (k + 0.5) - wide / 2
        parts.append(f"<g><title>{escape(told)}</title>")
        for what, num in (("bar", total), ("bar marked", marked)):
            if num:
                tall = max(1.0, plot_height * num / top_count)  # one among thousands is still seen
                bottom = _TOP + plot_height
                parts.append(
                    f'<rect class="{what}" x="{left:.1f}" y="{bottom - tall:.1f}" width="{wide:.1f}" '
                    f'height="{tall:.1f}" rx="1"/>'
                )
        parts.append("</g>")
    parts.append(_level(y(0), right_end, "", "axis"))
    for value, text in ticks:
        parts.append(_under(x(value), text))
    if line is not None:
        value, text = line
        right = histogram.position(value) > 0.6
        parts.append(
            f'<line class="limit" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_TOP - 22}" y2="{y(0):.1f}"/>'
            f'<text class="limit-label" x="{x(value) + (-5 if right else 5):.1f}" y="{_TOP - 13}" '
            f'text-anchor="{"end" if right else "start"}">{escape(text)}</text>'
        )
    return "".join([*parts, "</svg>"])


def ranges_svg(
    rows: NDArray[np.float64], *, name: str, title: str, x_label: str, y_label: str, description: str, width: int = WIDE
) -> str:
    """Rows (K, 4) of mean, std, min and max: for each a line from min to max, a bar of one std around the mean, and a
    dot at the mean."""
    plot_width, plot_height = width - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    low, high = float(rows[:, 2].min()), float(rows[:, 3].max())
    step = _nice((high - low) / 5) if high > low else (abs(low) or 1.0)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)

    def y(value: float) -> float:
        return _TOP + plot_height * (1 - (value / step - first) / (last - first))

    parts = _frame(name, title, description, x_label, y_label, width)
    for i in range(first, last + 1):
        parts.append(_level(y(i * step), width - _RIGHT, number(i * step), "axis" if i == 0 else "grid"))
    slot = plot_width / len(rows)
    wide = min(12.0, slot * 0.55)
    every = math.ceil(_TICK_WIDTH / slot)
    for k, (mean, std, least, most) in enumerate(rows.tolist()):
        middle = _LEFT + slot * (k + 0.5)
        told = f"channel {k}: mean {number(mean)}, std {number(std)}, from {number(least)} to {number(most)}"
        upper, lower = y(min(mean + std, most)), y(max(mean - std, least))
        parts.append(
            f"<g><title>{told}</title>"
            f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" y1="{y(most):.1f}" y2="{y(least):.1f}"/>'
            f'<rect class="bar" x="{middle - wide / 2:.1f}" y="{upper:.1f}" width="{wide:.1f}" '
            f'height="{max(1.0, lower - upper):.1f}" rx="1"/>'
            f'<circle class="mean" cx="{middle:.1f}" cy="{y(mean):.1f}" r="2.2"/></g>'
        )
        if k % every == 0:
            parts.append(_under(middle, str(k)))
    return "".join([*parts, "</svg>"])


def _short(value: float) -> str:
    """A number that fits beside an axis: `9,000`, `12k`, `1.5M`."""
    for unit, one, least in (("M", 1e6, 1e6), ("k", 1e3, 1e4)):
        if value >= least:
            return f"{value / one:g}{unit}"
    return number(value)


def _level(at: float, right_end: float, text: str, kind: str) -> str:
    """A horizontal line across the plot, its text before it."""
    return (
        f'<line class="{kind}" x1="{_LEFT}" x2="{right_end}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _under(x: float, text: str) -> str:
    """A text under the x axis."""
    return f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'


def _frame(name: str, title: str, description: str, x_label: str, y_label: str, width: int) -> list[str]:
    """The opening of a chart: what it is in words, and its axes' labels."""
    middle = _LEFT + (width - _LEFT - _RIGHT) / 2
    return [
        f'<svg class="chart" viewBox="0 0 {width} {_HEIGHT}" role="img" aria-labelledby="{name}-title {name}-desc">',
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>',
        f'<text x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="0" y="{_TOP - 13}">{escape(y_label)}</text>',
    ]


def _count_axis(most: int) -> tuple[float, list[float]]:
    """The end of an axis of counts from 0 to at least `most`, and its ticks: whole numbers."""
    step = float(math.ceil(_nice(max(most, 1) / 5)))
    ticks = [step * i for i in range(math.ceil(max(most, 1) / step) + 1)]
    return ticks[-1], ticks
