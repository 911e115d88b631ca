"""Does a painting keep to its drawing? The detector that drew the condition draws the painting, and the two drawings
are compared: by their lines, by their structure, and by the regions that their outlines enclose.

Each measure is from 0 to 1, higher is better. What a figure is worth shows beside three others of the same drawings:
painted without control (`_without`), compared with another sample's drawing (`_other`: chance), and the original
through the VAE (`_ceiling`: no model that paints in its latents does better).

Letters: H, W = height and width in pixels; S = samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Drawing = NDArray[np.uint8]
"""(H, W, 3), white on black where it is of lines."""
Mask = NDArray[np.bool_]
Scores = Mapping[str, float]
"""Measure to value, NaN where it does not apply."""

LINES, TONES = ("edge_f1", "ssim", "region_iou"), ("ssim",)
"""What is measured of drawings of lines, and of others, as depth."""
_TOLERANCE = 0.0075
"""Of the diagonal: how far apart two lines may be and still be the same (Martin, Fowlkes, Malik 2004, "Learning to
detect natural image boundaries": their benchmark's)."""
_FAINTEST = 32
_SMALLEST_REGION, _MOST_REGIONS, _LARGEST_SHARE = 0.002, 4, 0.9


def compare(found: Drawing, wanted: Drawing, measures: Sequence[str] = LINES) -> dict[str, float]:
    """How alike the drawing of a painting (`found`) is to the drawing that it was to keep to."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    functions = {"edge_f1": edge_f1, "ssim": ssim, "region_iou": region_iou}
    return {name: functions[name](found, wanted) for name in measures}


def tolerance(height: int, width: int) -> int:
    """Pixels by which two lines may miss each other: 2 at 128 x 128, 6 at 512 x 512."""
    return math.ceil(_TOLERANCE * math.hypot(height, width))


def edge_f1(found: Drawing, wanted: Drawing) -> float:
    """F1 of the lines: precision is the share of what was found that lies within `tolerance` of a wanted line, recall
    the share of what was wanted that lies within it of a found one. Both are thinned to a pixel, so that a bold line
    weighs as much as a fine one. Two empty drawings are alike (1)."""
    level = _level(wanted)
    lines_found, lines_wanted = (thinned(_grey(drawing) >= level) for drawing in (found, wanted))
    if not lines_found.any() or not lines_wanted.any():
        return float(lines_found.any() == lines_wanted.any())
    distance = tolerance(*lines_wanted.shape)
    precision = (lines_found & grown(lines_wanted, distance)).sum() / lines_found.sum()
    recall = (lines_wanted & grown(lines_found, distance)).sum() / lines_wanted.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def ssim(found: Drawing, wanted: Drawing) -> float:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004): the mean over pixels and colours, with their
    Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03; 0 where it would be below. Of lines on an empty ground
    most of it is the ground's: look at it beside what chance gives."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    like = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return max(0.0, float(like.mean()))


def _blurred(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(cv2.GaussianBlur(x, (11, 11), 1.5))


def region_iou(found: Drawing, wanted: Drawing) -> float:
    """Intersection over union of what the outlines of the two drawings enclose. NaN where the wanted one is no drawing
    of outlines: encloses nothing, more than a few regions, or all but everything."""
    level = _level(wanted)
    region = enclosed(_grey(wanted) >= level)
    num_regions, _, statistics, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=4)
    areas = statistics[1:num_regions, cv2.CC_STAT_AREA]
    if not 1 <= (areas >= _SMALLEST_REGION * region.size).sum() <= _MOST_REGIONS:
        return math.nan
    if region.mean() > _LARGEST_SHARE:
        return math.nan
    painted = enclosed(_grey(found) >= level)
    return float((region & painted).sum() / (region | painted).sum())


def enclosed(lines: Mask) -> Mask:
    """What cannot be reached from the border without crossing a line, the lines left out. Gaps of up to `tolerance`
    pixels are taken for closed."""
    reach = max(1, tolerance(*lines.shape) // 2)
    closed = np.pad(grown(lines, reach), reach + 1)
    _, labels = cv2.connectedComponents((~closed).astype(np.uint8), connectivity=4)
    inside = ~closed & (labels != labels[0, 0])
    return grown(inside, reach)[reach + 1 : -reach - 1, reach + 1 : -reach - 1]


def grown(mask: Mask, radius: int) -> Mask:
    """All that lies within `radius` pixels (Euclidean) of the mask."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x * x + y * y <= radius * radius).astype(np.uint8)
    return np.asarray(cv2.dilate(mask.astype(np.uint8), disk, borderType=cv2.BORDER_CONSTANT, borderValue=0)) > 0


def thinned(mask: Mask) -> Mask:
    """Lines of one pixel where lines were (Zhang and Suen 1984, "A fast parallel algorithm for thinning digital
    patterns")."""
    image = np.pad(mask, 1)
    while True:
        before = image.copy()
        for first in (True, False):
            # The eight neighbours, clockwise from above: as P2 to P9 in the paper.
            p2, p3, p4, p5, p6, p7, p8, p9 = (
                np.roll(image, (-dy, -dx), (0, 1))
                for dy, dx in ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
            )
            ring = (p2, p3, p4, p5, p6, p7, p8, p9, p2)
            num_neighbours = np.sum(ring[:8], axis=0, dtype=np.int8)
            num_rises = np.sum([~a & b for a, b in itertools.pairwise(ring)], axis=0, dtype=np.int8)
            peeled = image & (num_neighbours >= 2) & (num_neighbours <= 6) & (num_rises == 1)
            peeled &= ~(p2 & p4 & p6) & ~(p4 & p6 & p8) if first else ~(p2 & p4 & p8) & ~(p2 & p6 & p8)
            image = image & ~peeled
        if np.array_equal(image, before):
            return image[1:-1, 1:-1]


def _grey(drawing: Drawing) -> NDArray[np.uint8]:
    """(H, W, 3) -> (H, W)."""
    return drawing.max(axis=2)


def _level(wanted: Drawing) -> int:
    """From which value on a pixel is of a line: half of the strongest line that is wanted, the same for what is found,
    so that a painting whose lines are too faint shows."""
    return max(_FAINTEST, int(wanted.max()) // 2)


def figures(kinds: Mapping[str, Sequence[Scores]]) -> dict[str, float]:
    """Means over samples, of the kind "" with standard errors: {"edge_f1", "edge_f1_error", "edge_f1_without", ...}.

    `kinds`: suffix ("", "without", "other", "ceiling") to the scores of the same S samples; NaN is left out of the
    means. A measure that applies to fewer than half of the samples is left out.
    """
    found: dict[str, float] = {}
    for name in kinds[""][0]:
        own = _values(kinds[""], name)
        if 2 * len(own) < len(kinds[""]):
            continue
        found[name] = float(own.mean())
        found[f"{name}_error"] = float(own.std(ddof=1) / math.sqrt(len(own))) if len(own) > 1 else math.nan
        for kind in (kind for kind in kinds if kind):
            others = _values(kinds[kind], name)
            found[f"{name}_{kind}"] = float(others.mean()) if len(others) else math.nan
    return found


def _values(scores: Sequence[Scores], name: str) -> NDArray[np.float64]:
    values = np.array([score[name] for score in scores], np.float64)
    return values[~np.isnan(values)]
