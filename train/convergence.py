"""When did it begin to follow? The step of *sudden convergence* in a curve that rises when the condition is followed.

ControlNets are known to learn to follow all at once, after thousands of steps of seemingly nothing (Zhang, Rao,
Agrawala 2023, section 3.3 and figure 4). Here that means: a logistic step, flat before, steep, explains the curve far
better than any gradual rise does, and it is too large to be noise. Where there is no such step, none is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]

_FEWEST = 7
"""Points below which a curve says nothing."""
_WIDEST = 0.25
"""Of the steps looked at: how long the rise from a tenth to nine tenths may take and still be sudden."""
_TENTH_TO_NINE_TENTHS = 2 * math.log(9)
"""Of a logistic curve, in units of its scale."""
_DEVIATIONS = 5.0
"""By how many standard errors of their difference the levels must differ."""
_FLAT = 2
"""Points that must lie before the rise, and after it."""
_MUCH_BETTER = 10.0
"""By how much the Bayesian information criterion must favour the step: beyond 10 is called very strong (Kass and
Raftery 1995)."""


@dataclass(frozen=True)
class Convergence:
    """A sudden rise."""

    step: int
    """The first one looked at by which half of it was done."""
    before: float
    """The mean until it began."""
    after: float
    """The mean since it was done."""
    begun: int
    """The last step looked at before the rise."""
    done: int
    """The first one after it."""

    def as_dict(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self)


def find(steps: Sequence[int], values: Sequence[float], errors: Sequence[float] | None = None) -> Convergence | None:
    """The sudden rise of a curve, None where there is none: noise, a gradual rise, a fall, or a rise that has not come
    to its end. `errors`: the values' standard errors, NaN where unknown."""
    if len(steps) < _FEWEST:
        return None
    s, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    span = s[-1] - s[0]
    spacing = float(np.median(np.diff(s)))
    scales = span * _WIDEST / _TENTH_TO_NINE_TENTHS * np.array([1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05])
    scales = np.unique(np.maximum(scales, spacing / 10))  # narrower is between two looks, and all the same
    middles = np.unique(np.concatenate([s, (s[1:] + s[:-1]) / 2]))
    middles = middles[:: max(1, len(middles) // 200)]
    rises = {
        (middle, scale): 1 / (1 + np.exp(-np.clip((s - middle) / scale, -50, 50)))
        for middle in middles
        for scale in scales
    }
    (middle, scale), rest = min(((key, _rest(y, shape)) for key, shape in rises.items()), key=lambda found: found[1])
    _, rise = _fitted(y, rises[middle, scale])
    half = scale * _TENTH_TO_NINE_TENTHS / 2
    flat_before, flat_after = s < middle - half, s > middle + half
    if rise <= 0 or flat_before.sum() < _FLAT or flat_after.sum() < _FLAT:
        return None
    scatter = math.sqrt(rest / max(1, len(y) - 4))
    given = np.full(len(y), math.nan) if errors is None else np.asarray(errors, np.float64)
    one = max(scatter, float(np.nanmedian(given)) if np.isfinite(given).any() else 0.0)
    if rise < _DEVIATIONS * one * math.sqrt(1 / flat_before.sum() + 1 / flat_after.sum()):
        return None
    if _criterion(rest, len(y), 4) + _MUCH_BETTER > min(_gradual(s, y)):
        return None
    return Convergence(
        step=int(s[s >= middle][0]),
        before=float(y[flat_before].mean()),
        after=float(y[flat_after].mean()),
        begun=int(s[flat_before][-1]),
        done=int(s[flat_after][0]),
    )


def _gradual(s: Curve, y: Curve) -> list[float]:
    """The criterion of each curve that rises without a step: none, a line, a root, and saturation at several rates."""
    since = (s - s[0]) / (s[-1] - s[0])
    rests = [
        (_rest(y, np.zeros_like(y)), 1),
        (_rest(y, since), 2),
        (_rest(y, np.sqrt(since)), 2),
        (_rest(y, since**2), 2),
    ]
    rests += [(_rest(y, 1 - np.exp(-since / rate)), 3) for rate in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)]
    return [_criterion(rest, len(y), parameters) for rest, parameters in rests]


def _fitted(y: Curve, shape: Curve) -> tuple[float, float]:
    """(a, b) of the least-squares fit of a + b shape."""
    centred = shape - shape.mean()
    square = float(centred @ centred)
    b = float(centred @ y) / square if square > 0 else 0.0
    return float(y.mean() - b * shape.mean()), b


def _rest(y: Curve, shape: Curve) -> float:
    """Sum of squares that the fit leaves."""
    a, b = _fitted(y, shape)
    return float(np.square(y - a - b * shape).sum())


def _criterion(rest: float, count: int, parameters: int) -> float:
    """Bayesian information criterion (Schwarz 1978) of a least-squares fit; lower is better."""
    return count * math.log(max(rest, 1e-18) / count) + parameters * math.log(count)
