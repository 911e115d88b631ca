"""Procedural pictures: one coloured shape on a coloured background, at a free position and size.

"red circle with blue background", in the spirit of fill50k. Three things are held out, so that what was learned can be
told from what was memorised: the shapes in `HELD_OUT_SHAPES`, the (foreground, background) pairs in `HELD_OUT_PAIRS`,
and the drawings of every split but "train" (each split draws from its own random stream).

Letters: H, W = height and width of the picture in pixels, both `size`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 30),
    "green": (20, 140, 40),
    "blue": (30, 60, 220),
    "yellow": (250, 225, 40),
    "orange": (250, 140, 10),
    "purple": (125, 30, 150),
    "pink": (255, 160, 190),
    "brown": (115, 65, 25),
    "black": (10, 10, 10),
    "white": (248, 248, 248),
    "gray": (128, 128, 128),
    "cyan": (20, 215, 225),
    "magenta": (225, 30, 200),
    "navy": (10, 20, 90),
    "teal": (10, 125, 125),
    "olive": (125, 125, 15),
    "lime": (130, 240, 30),
    "salmon": (250, 125, 110),
    "light blue": (165, 205, 240),
    "dark green": (5, 70, 20),
}
TEMPLATES = (
    "{foreground} {shape} with {background} background",
    "a {foreground} {shape} on a {background} background",
    "{foreground} {shape} on {background}",
)
GENERIC_SHAPE = "shape"
"""The word that names any shape: the base hears it too, so that a held-out shape can be asked for without its name."""

MIN_CONTRAST = 110.0
"""Least distance in RGB between foreground and background: below it, Canny at (100, 200) would miss the outline."""


def _arc(start: float, stop: float, num_points: int = 96, radius: float = 1.0) -> np.ndarray:
    """Points (num_points, 2) on a circle around the origin; angles in turns from the right, clockwise."""
    angle = 2 * np.pi * np.linspace(start, stop, num_points)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star_points(num_tips: int, inner: float) -> np.ndarray:
    """Corners (2 * num_tips, 2) of a star with one tip up; `inner` is the radius of its notches."""
    radius = np.where(np.arange(2 * num_tips) % 2 == 0, 1.0, inner)
    angle = np.pi * np.arange(2 * num_tips) / num_tips
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def _heart_points() -> np.ndarray:
    u = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = 16 * np.sin(u) ** 3
    y = -(13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u))
    return np.stack([x, y], axis=1)


def _centred(*contours: np.ndarray) -> tuple[np.ndarray, ...]:
    """The contours moved and scaled together, so that their bounding box is centred and its longer side is 2."""
    points = np.concatenate(contours)
    low, high = points.min(axis=0), points.max(axis=0)
    return tuple((contour - (low + high) / 2) * (2 / (high - low).max()) for contour in contours)


_ARM = 0.34
_CROSS_QUARTER = np.array([(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM)])
_QUARTER_TURN = np.array([(0, 1), (-1, 0)])
OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": _centred(_arc(0, 1)),
    "square": _centred(np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)),
    "triangle": _centred(np.array([(0, -np.sqrt(3)), (1, 0), (-1, 0)], float)),
    "diamond": _centred(np.array([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)], float)),
    "cross": _centred(
        np.concatenate([_CROSS_QUARTER @ np.linalg.matrix_power(_QUARTER_TURN, turns) for turns in range(4)])
    ),
    "ellipse": _centred(_arc(0, 1) * (1, 0.55)),
    "rectangle": _centred(np.array([(-1, -0.55), (1, -0.55), (1, 0.55), (-1, 0.55)])),
    "ring": _centred(_arc(0, 1), _arc(0, 1, radius=0.5)),
    "semicircle": _centred(_arc(0.5, 1)),
    "star": _centred(_star_points(5, 0.45)),
    "hexagon": _centred(_arc(0, 5 / 6, num_points=6)),
    "heart": _centred(_heart_points()),
}
"""Shape -> its contours, each (num_points, 2) as (x, y) in [-1, 1]; a point within two contours is outside (a hole)."""

HELD_OUT_SHAPES = ("star", "hexagon", "heart")
TRAIN_SHAPES = tuple(shape for shape in OUTLINES if shape not in HELD_OUT_SHAPES)

Pair = tuple[str, str]
"""(foreground, background), both names of `COLORS`."""


def _contrast(foreground: str, background: str) -> float:
    return float(np.linalg.norm(np.subtract(COLORS[foreground], COLORS[background], dtype=float)))


ALL_PAIRS: tuple[Pair, ...] = tuple(
    (foreground, background)
    for foreground in COLORS
    for background in COLORS
    if foreground != background and _contrast(foreground, background) > MIN_CONTRAST
)
HELD_OUT_PAIRS: tuple[Pair, ...] = tuple(
    ALL_PAIRS[i] for i in sorted(np.random.default_rng(20_000).permutation(len(ALL_PAIRS))[: len(ALL_PAIRS) // 10])
)
TRAIN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)


@dataclass(frozen=True)
class Split:
    """What may be drawn in a split."""

    shapes: tuple[str, ...]
    pairs: tuple[Pair, ...]


SPLITS: dict[str, Split] = {
    "train": Split(TRAIN_SHAPES, TRAIN_PAIRS),
    "validation": Split(TRAIN_SHAPES, TRAIN_PAIRS),
    "test": Split(TRAIN_SHAPES, TRAIN_PAIRS),
    "new_pairs": Split(TRAIN_SHAPES, HELD_OUT_PAIRS),
    "new_shapes": Split(HELD_OUT_SHAPES, TRAIN_PAIRS),
}
"""Choose settings on "validation"; report "test" (new drawings), "new_pairs" and "new_shapes" (never trained on)."""


@dataclass(frozen=True)
class Drawing:
    """One picture and all that is known about it."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    mask: np.ndarray
    """(H, W) bool, True where the shape is."""
    caption: str
    """The first paraphrase."""
    captions: tuple[str, ...]
    """All paraphrases, one per template."""
    shape: str
    foreground: str
    background: str
    center: tuple[float, float]
    """(x, y) of the bounding box' centre, in pixels."""
    half_extent: float
    """Half the longer side of the bounding box, in pixels."""


def caption(foreground: str, shape: str, background: str, template: int = 0) -> str:
    """The caption of a picture, worded by one of `TEMPLATES`."""
    return TEMPLATES[template].format(foreground=foreground, shape=shape, background=background)


def shape_coverage(shape: str, center: tuple[float, float], half_extent: float, size: int = 128) -> np.ndarray:
    """Coverage (H, W) uint8 of a shape: 255 inside, 0 outside, between them on the edge (4 x 4 supersampled)."""
    factor = 4
    canvas = np.zeros((size * factor, size * factor), np.uint8)
    # OpenCV puts integer coordinates on pixel centres, we put them on pixel corners: hence the half pixel.
    contours = [(contour * half_extent + center) * factor - 0.5 for contour in OUTLINES[shape]]
    cv2.fillPoly(canvas, [np.round(contour).astype(np.int32) for contour in contours], 255)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def draw(
    rng: np.random.Generator,
    size: int = 128,
    shapes: Sequence[str] = TRAIN_SHAPES,
    pairs: Sequence[Pair] = TRAIN_PAIRS,
    extent: tuple[float, float] = (0.18, 0.36),
) -> Drawing:
    """Draw one picture of `size` x `size` pixels.

    Shape, colours, position and size are uniform over what is allowed; `extent` is the range of the half extent as a
    fraction of `size`. The shape is fully inside, at least 3 pixels (of 128) from the border, and both colours are
    jittered by N(0, 3).
    """
    foreground, background = pairs[int(rng.integers(len(pairs)))]
    shape = shapes[int(rng.integers(len(shapes)))]
    half_extent = float(rng.uniform(*extent)) * size
    margin = half_extent + 3 * size / 128
    center = (float(rng.uniform(margin, size - margin)), float(rng.uniform(margin, size - margin)))
    coverage = shape_coverage(shape, center, half_extent, size)
    inside, outside = (
        np.clip(np.array(COLORS[name], np.float32) + rng.normal(0, 3, 3), 0, 255) for name in (foreground, background)
    )
    alpha = coverage[..., None].astype(np.float32) / 255
    captions = tuple(caption(foreground, shape, background, template) for template in range(len(TEMPLATES)))
    return Drawing(
        image=np.round(inside * alpha + outside * (1 - alpha)).astype(np.uint8),
        mask=coverage > 127,
        caption=captions[0],
        captions=captions,
        shape=shape,
        foreground=foreground,
        background=background,
        center=center,
        half_extent=half_extent,
    )


def pictures(count: int, seed: int, split: str = "train", size: int = 128) -> Iterator[Drawing]:
    """Yield `count` drawings of a split. A (seed, split) always gives the same ones, however many are taken."""
    allowed = SPLITS[split]
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    for _ in range(count):
        yield draw(rng, size, allowed.shapes, allowed.pairs)


def write_dataset(folder: Path | str, count: int, seed: int, split: str = "train", size: int = 128) -> Path:
    """Write `count` drawings as PNG files and a line for each to `folder`/metadata.jsonl; return that file's path.

    A line is {"file_name", "text": [3 paraphrases], "split", "shape", "foreground", "background"}. Several splits may
    be written into one folder, one call each: the file names begin with the split. A repeated call replaces its split's
    lines.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = folder / "metadata.jsonl"
    kept = []
    if metadata.exists():
        kept = [line for line in metadata.read_text().splitlines() if json.loads(line)["split"] != split]
    added = []
    for index, drawing in enumerate(pictures(count, seed, split, size)):
        file_name = f"{split}-{index:05d}.png"
        Image.fromarray(drawing.image).save(folder / file_name)
        row = {
            "file_name": file_name,
            "text": list(drawing.captions),
            "split": split,
            "shape": drawing.shape,
            "foreground": drawing.foreground,
            "background": drawing.background,
        }
        added.append(json.dumps(row))
    metadata.write_text("\n".join(kept + added) + "\n")
    return metadata
