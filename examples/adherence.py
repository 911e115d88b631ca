"""How well a generated picture follows its outline and its caption: measured, not looked at.

A picture of a flat shape on a flat background is cut in two by colour (`segment`); the cut is compared with the true
mask (`iou`, `edge_f1`) and its two colours with the caption's. `measure` does all of it for a list of pictures.

Letters: B = number of pictures, H, W = height and width in pixels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

import cv2
import numpy as np

from examples.shapes import COLORS, OUTLINES, Drawing, shape_coverage

MIN_FOREGROUND_PIXELS = 20
MIN_FOREGROUND_DISTANCE = 45.0
"""A second colour nearer than this to the background (in RGB) is none: the picture counts as empty."""


@dataclass(frozen=True)
class Segmentation:
    """A picture cut in two by colour."""

    mask: np.ndarray
    """(H, W) bool, True where the shape is; all False if there is no second colour."""
    foreground: np.ndarray | None
    """(3,) float RGB, or None if there is no second colour."""
    background: np.ndarray
    """(3,) float RGB."""


def segment(image: np.ndarray) -> Segmentation:
    """Cut a picture (H, W, 3) uint8 in two: two-means over RGB, from the border's median and what is furthest off."""
    pixels = image.astype(np.float32)
    border = np.concatenate([side.reshape(-1, 3) for side in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])])
    background = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - background, axis=2)
    foreground = pixels[distance >= np.percentile(distance, 98)].mean(axis=0)
    mask = np.zeros(image.shape[:2], bool)
    for _ in range(5):
        mask = np.linalg.norm(pixels - foreground, axis=2) < np.linalg.norm(pixels - background, axis=2)
        if mask.sum() < MIN_FOREGROUND_PIXELS:
            break
        foreground = pixels[mask].mean(axis=0)
        if not mask.all():
            background = pixels[~mask].mean(axis=0)
    is_empty = np.linalg.norm(foreground - background) < MIN_FOREGROUND_DISTANCE
    if is_empty or mask.sum() < MIN_FOREGROUND_PIXELS:
        return Segmentation(np.zeros(image.shape[:2], bool), None, background)
    return Segmentation(mask, foreground, background)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) bool, in [0, 1]; 0 if both are empty."""
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 0.0


def edge_f1(image: np.ndarray, mask: np.ndarray, tolerance: int = 2) -> float:
    """F1 of a picture's (H, W, 3) Canny edges against the outline of the true mask (H, W) within `tolerance` pixels."""
    found = cv2.Canny(np.ascontiguousarray(image), 100, 200) > 0
    truth = cv2.Canny(mask.astype(np.uint8) * 255, 100, 200) > 0
    near = np.ones((2 * tolerance + 1, 2 * tolerance + 1), np.uint8)
    near_found, near_truth = (cv2.dilate(edges.astype(np.uint8), near) > 0 for edges in (found, truth))
    precision = (found & near_truth).sum() / max(1, found.sum())
    recall = (truth & near_found).sum() / max(1, truth.sum())
    return float(2 * precision * recall / max(1e-9, precision + recall))


def color_name(rgb: np.ndarray) -> str:
    """The name in `COLORS` nearest to an RGB value (3,)."""
    distances = {name: np.linalg.norm(np.subtract(color, rgb, dtype=float)) for name, color in COLORS.items()}
    return min(distances, key=distances.__getitem__)


TEMPLATE_SIZE = 64


def _aligned(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W) moved and scaled to one centroid and area: (64, 64) bool. What is left is shape."""
    y, x = np.nonzero(mask)
    scale = np.sqrt(0.25 * TEMPLATE_SIZE**2 / len(x))
    move = TEMPLATE_SIZE / 2 - scale * np.array([x.mean(), y.mean()])
    matrix = np.array([[scale, 0, move[0]], [0, scale, move[1]]])
    coverage = mask.astype(np.float32)
    return cv2.warpAffine(coverage, matrix, (TEMPLATE_SIZE, TEMPLATE_SIZE), flags=cv2.INTER_LINEAR) > 0.5


@cache
def _template(shape: str) -> np.ndarray:
    return _aligned(shape_coverage(shape, (64.0, 64.0), 40.0) > 127)


MIN_TEMPLATE_IOU = 0.75
"""A shape that is less like every template than this is called none of them: a blob."""


def classify(mask: np.ndarray, shapes: Sequence[str] = tuple(OUTLINES)) -> str | None:
    """The one of `shapes` whose template a mask (H, W) overlaps best, centroid and area aligned; None for a blob.

    Shapes are drawn upright, so a rotated one counts as another.
    """
    if mask.sum() < MIN_FOREGROUND_PIXELS:
        return None
    aligned = _aligned(mask)
    scores = {shape: iou(aligned, _template(shape)) for shape in shapes}
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] >= MIN_TEMPLATE_IOU else None


@dataclass(frozen=True)
class Adherence:
    """Means over pictures, each in [0, 1]."""

    iou: float
    """Intersection over union of the shape painted with the shape asked for."""
    edge_f1: float
    """How well the edges coincide, within 2 pixels."""
    foreground: float
    """Part of the pictures whose shape has the colour named."""
    background: float
    """Part of the pictures whose background has the colour named."""
    shape: float
    """Part of the pictures with the shape named, by `classify` over all shapes; blobs count as wrong."""
    found: float
    """Part of the pictures that show a shape at all."""

    def as_dict(self) -> dict[str, float]:
        """The same numbers, rounded to four digits, ready for JSON."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def measure(images: Sequence[np.ndarray] | np.ndarray, drawings: Sequence[Drawing]) -> Adherence:
    """Compare pictures (B of (H, W, 3) uint8) with the drawings that they should show, one by one."""
    assert len(images) == len(drawings), f"{len(images)} pictures, {len(drawings)} drawings"
    rows = []
    for image, drawing in zip(images, drawings, strict=True):
        cut = segment(image)
        named = color_name(cut.foreground) if cut.foreground is not None else None
        rows.append(
            (
                iou(cut.mask, drawing.mask),
                edge_f1(image, drawing.mask),
                named == drawing.foreground,
                color_name(cut.background) == drawing.background,
                classify(cut.mask) == drawing.shape,
                cut.foreground is not None,
            )
        )
    return Adherence(*(float(np.mean(column)) for column in zip(*rows, strict=True)))
