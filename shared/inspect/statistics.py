"""Statistics of latents: moments of every channel, moments of every sample, and which samples stand out.

Letters: N samples, R drawings of a sample, C channels, h w latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

STATISTICS = ("mean", "std", "min", "max")
"""What is computed of every sample and every channel."""
OUTLIER_SCORE = 3.5
"""Beyond this robust z-score a sample is an outlier: Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993."""
_LEAST_SAMPLES = 8
"""With fewer, nothing can be said about what is usual."""


@dataclass(frozen=True)
class Statistics:
    """What the latents of one layer look like."""

    keys: list[str]
    """N samples, in the order they came."""
    samples: NDArray[np.float64]
    """(N, 4): mean, std, min and max of each sample, over its drawings, channels and positions. NaN where a sample has
    a value that is not finite."""
    channels: NDArray[np.float64]
    """(C, 4): mean, std, min and max of each channel, over all samples without such values."""
    z: NDArray[np.float64]
    """(N, 4): robust z-scores of `samples`; infinite where a value is not finite."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """(N,): the largest |z| of each sample."""
        return np.abs(self.z).max(axis=1) if len(self.keys) else np.empty(0)

    @property
    def outliers(self) -> list[int]:
        """Rows of the samples that stand out, those farthest out first."""
        scores = self.scores
        order = np.argsort(-scores, kind="stable")
        return [int(row) for row in order if scores[row] > OUTLIER_SCORE]


def measure(latents: Iterable[tuple[str, torch.Tensor]]) -> Statistics:
    """Statistics of (key, latents (..., C, h, w)) pairs, read one at a time. Sums are taken in fp64."""
    keys: list[str] = []
    rows: list[list[float]] = []
    count = 0
    total = squares = low = high = np.empty(0)
    for key, tensor in latents:
        values = tensor.double().movedim(-3, 0).flatten(1)  # (C, R * h * w)
        keys.append(key)
        if not torch.isfinite(values).all():
            rows.append([np.nan] * len(STATISTICS))
            continue
        rows.append([values.mean().item(), values.std(correction=0).item(), values.min().item(), values.max().item()])
        sums = [part.numpy() for part in (values.sum(1), values.square().sum(1), values.amin(1), values.amax(1))]
        if not count:
            total, squares, low, high = sums
        else:
            total, squares = total + sums[0], squares + sums[1]
            low, high = np.minimum(low, sums[2]), np.maximum(high, sums[3])
        count += values.shape[1]
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))
    samples = np.array(rows, dtype=np.float64).reshape(len(rows), len(STATISTICS))
    return Statistics(keys, samples, np.stack([mean, std, low, high], axis=1), robust_z(samples))


def robust_z(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns of numbers (N, K) -> z = 0.6745 (x - median) / MAD of each, MAD being the median of |x - median|.

    The median and MAD are not moved by the outliers that they are to find; 0.6745 makes z a usual z-score where the
    numbers are normal. Where more than half are equal, the MAD is zero and 1.2533 times the mean of |x - median| stands
    for it. Of fewer than eight samples, none stands out. Infinite where a number is not finite.
    """
    z = np.zeros_like(samples)
    finite = np.isfinite(samples).all(axis=1)
    if finite.sum() >= _LEAST_SAMPLES:
        sound = samples[finite]
        distance = np.abs(sound - np.median(sound, axis=0))
        scale = np.median(distance, axis=0) / 0.6745
        scale = np.where(scale > 0, scale, 1.2533 * distance.mean(axis=0))
        signed = sound - np.median(sound, axis=0)
        z[finite] = np.divide(signed, scale, out=np.zeros_like(signed), where=scale > 0)
    z[~finite] = np.inf
    return z
