"""Numbers as a reader wants them."""

from __future__ import annotations

import math

from train.compare.data import Figure

MINUS, NOTHING = "\u2212", "\u2013"


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, whole thousands in groups."""
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif value != 0 and abs(value) < 1e-4:
        text = f"{value:.{digits - 1}e}"
    else:
        text = fixed(value, max(0, digits - 1 - math.floor(math.log10(abs(value)))))
    return text.replace("-", MINUS, 1) if value < 0 else text


def fixed(value: float, decimals: int) -> str:
    """So many decimals."""
    return f"{value:,.{decimals}f}"


def half_of(figure: Figure) -> float | None:
    """Half of a figure's interval."""
    return None if figure.high is None else figure.high - figure.value


def with_half(value: float, half: float | None) -> tuple[str, str]:
    """The value and, as "± 0.021", half of its interval, in as many decimals as that has to say."""
    if half is None:
        return number(value, 4), ""
    if half <= 0:
        return number(value, 4), "\u00b1 0"
    decimals = min(6, max(0, 1 - math.floor(math.log10(half))))
    return fixed(value, decimals).replace("-", MINUS), f"\u00b1 {fixed(half, decimals)}"


def count(value: float) -> str:
    """A large number: 1.35 B, 740 M, 12.3 k."""
    for unit, one in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= one * 0.9995:
            return f"{value / one:.3g}\u202f{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Of a step: 394 ms, 2.41 s."""
    return f"{1000 * seconds:.3g}\u202fms" if seconds < 1 else f"{seconds:.3g}\u202fs"


def hours(value: float) -> str:
    """41.2 h, 12 min, 8 s."""
    if value >= 1:
        return f"{value:.3g}\u202fh"
    return f"{60 * value:.3g}\u202fmin" if value >= 1 / 60 else f"{3600 * value:.2g}\u202fs"


def plural(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
