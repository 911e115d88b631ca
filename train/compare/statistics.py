"""Intervals over few seeds, and curves short enough to be drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np


@cache
def t95(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t with so many degrees of freedom, 1 or more: 12.7, 4.30, 3.18, ...

    By bisection of the distribution's closed form for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    assert degrees >= 1
    low, high = 0.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """The probability that |T| < t."""
    theta = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = 1.0, 1.0
    if odd:
        term = total = math.cos(theta) if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= math.cos(theta) ** 2 * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of independent values, and half of its 95 % interval; None where there is but one."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, t95(len(values) - 1) * math.sqrt(variance / len(values))


def thin(steps: Sequence[int], values: Sequence[float], most: int) -> tuple[list[int], list[float]]:
    """At most `most` points: of equal parts of the curve the mean, at the part's last step."""
    size = math.ceil(len(steps) / most) if steps else 1
    if size == 1:
        return list(steps), list(values)
    starts = range(0, len(steps), size)
    return (
        [steps[min(start + size, len(steps)) - 1] for start in starts],
        [float(np.mean(values[start : start + size])) for start in starts],
    )
