"""Which pixels of an image a sample shows: its bucket, its crop, and whether it is mirrored.

Everything is decided from the image's size and name alone, before any pixel is read, and is the same in every order and
on every machine. Sizes are in pixels, (width, height) as everywhere in plans; arrays are (H, W, 3).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.errors import UserError

_AREA_TOLERANCE: Final = Fraction(15, 100)
"""How far a bucket's area may be from the square's: batches of all buckets then cost about the same."""


@dataclass(frozen=True)
class GeometryOptions:
    """How images of all sizes become samples of a few sizes."""

    resolution: int = 512
    """Side of the square samples, in pixels; other buckets have about the same area. A multiple of what the model needs
    (16 for FLUX). Memory and time of everything grow with its square."""
    buckets: bool = True
    """Keep each image's aspect ratio roughly, in buckets of about `resolution`^2 pixels. Off: squares only."""
    bucket_step: int = 64
    """Bucket sides are multiples of this (or of less, where `resolution` is small or no multiple of it). Smaller: more
    buckets and less cropped away, but fewer samples of one shape to batch."""
    max_aspect: float = 2.0
    """The longest bucket's long side over its short side. Raise it for panoramas, which are otherwise cropped to it."""
    crop: Literal["center", "random"] = "center"
    """Which part is kept of an image that does not fit its bucket: the middle, or a part that `seed` draws."""
    crops: int = 1
    """Random crops per image, each a sample of its own; needs `crop=random`. An image with the very aspect ratio of its
    bucket fits whole, and its crops are all alike."""
    flip: bool = False
    """Add a mirrored variant of each crop, which doubles the cache. Not where left and right matter, as in writing."""
    seed: int = 0
    """Draws the random crops, together with each image's name; without effect on `crop=center`."""

    def check(self) -> None:
        if self.resolution < 1:
            raise UserError(f"resolution={self.resolution} must be positive, as 512")
        if self.bucket_step < 1:
            raise UserError(f"bucket_step={self.bucket_step} must be positive, as 64")
        if not (1 <= self.max_aspect < math.inf):
            raise UserError(f"max_aspect={self.max_aspect} must be at least 1 (squares only), as 2.0")
        if self.crops < 1:
            raise UserError(f"crops={self.crops} must be at least 1")
        if self.crops > 1 and self.crop == "center":
            raise UserError(f"crops={self.crops} would all be the same centre crop; add crop=random or use crops=1")


@dataclass(frozen=True)
class Placement:
    """How one variant is made: resize, cut the bucket out at (crop_left, crop_top), mirror if `flip`."""

    bucket_width: int
    bucket_height: int
    resize_width: int
    resize_height: int
    crop_left: int
    crop_top: int
    flip: bool


def bucket_sizes(options: GeometryOptions, multiple: int) -> list[tuple[int, int]]:
    """The sizes that samples can have, from tallest to widest, (resolution, resolution) always among them.

    All sides are multiples of `multiple` and of one step: the largest up to `bucket_step` and a quarter of the
    resolution that divides the resolution, so that a small resolution has buckets too and the square is exact.
    `UserError` where `resolution` is no multiple of `multiple`.
    """
    resolution = options.resolution
    if resolution % multiple:
        below = resolution // multiple * multiple
        fits = f"{below} or {below + multiple}" if below else f"{multiple}"
        raise UserError(f"resolution={resolution} is not a multiple of {multiple}, which this model needs; use {fits}")
    if not options.buckets:
        return [(resolution, resolution)]
    limit = max(multiple, min(options.bucket_step, resolution // 4))
    step = max(step for step in range(multiple, limit + 1, multiple) if resolution % step == 0)
    side = resolution // step  # from here on, lengths are counted in steps
    sizes = {(side, side)}
    for long in range(side + 1, math.floor(side * math.sqrt(options.max_aspect * (1 + _AREA_TOLERANCE))) + 1):
        short = max(1, round(Fraction(side * side, long)))
        fits_area = abs(Fraction(long * short, side * side) - 1) <= _AREA_TOLERANCE
        if fits_area and short < long <= options.max_aspect * short:
            sizes |= {(long, short), (short, long)}
    return sorted((width * step, height * step) for width, height in sizes)


def place(width: int, height: int, name: str, options: GeometryOptions, multiple: int) -> list[Placement]:
    """The variants of the image `name` of this size: for each crop the plain one and then, with `flip`, its mirror.

    The image is made just large enough to cover the bucket that keeps most of it; small images are enlarged.
    """
    assert min(width, height) > 0, (width, height)
    bucket_width, bucket_height = _bucket(width, height, bucket_sizes(options, multiple))
    if bucket_width * height >= bucket_height * width:  # the width decides, in whole numbers: no rounding from floats
        resize_width, resize_height = bucket_width, max(bucket_height, round(Fraction(height * bucket_width, width)))
    else:
        resize_width, resize_height = max(bucket_width, round(Fraction(width * bucket_height, height))), bucket_height
    free_width, free_height = resize_width - bucket_width, resize_height - bucket_height
    placements: list[Placement] = []
    for crop in range(options.crops):
        if options.crop == "center":
            left, top = free_width // 2, free_height // 2
        else:
            left, top = _random_corner(free_width, free_height, f"{options.seed}/{crop}/{name}")
        placements += [
            Placement(bucket_width, bucket_height, resize_width, resize_height, left, top, flip)
            for flip in ((False, True) if options.flip else (False,))
        ]
    return placements


def apply(image: NDArray[np.uint8], placement: Placement) -> NDArray[np.uint8]:
    """The variant's pixels: uint8 (H, W, 3) -> uint8 (bucket_height, bucket_width, 3).

    Resizing and cropping are one step: the crop is traced back into `image`'s own pixels and only this part is
    resampled, so that a picture a thousand times as long as wide costs no more than another. An image that is neither
    resized nor cropped comes out unchanged.

    A conditioning image goes the same way, whatever its size: the placement is read in fractions of the picture, as if
    the conditioning image had been stretched to the image's size first, so that both align pixel for pixel. Both are
    resampled with Lanczos (antialiased when shrinking): NEAREST would tear one-pixel lines and shift them by up to half
    a pixel. The price: where colours are labels, as in segmentation maps, borders between areas blend.
    """
    assert image.dtype == np.uint8, image.dtype
    assert image.ndim == 3, image.shape
    assert image.shape[2] == 3, image.shape
    height, width = image.shape[:2]
    box = (
        placement.crop_left * width / placement.resize_width,
        placement.crop_top * height / placement.resize_height,
        (placement.crop_left + placement.bucket_width) * width / placement.resize_width,
        (placement.crop_top + placement.bucket_height) * height / placement.resize_height,
    )
    bucket = (placement.bucket_width, placement.bucket_height)
    pixels = np.array(Image.fromarray(image).resize(bucket, Image.Resampling.LANCZOS, box=box))
    return np.ascontiguousarray(pixels[:, ::-1]) if placement.flip else pixels


def recipe(options: GeometryOptions, multiple: int) -> dict[str, Any]:
    """All that the pixels of a sample depend on beyond its image and name, as JSON values.

    What has no effect is left out (the seed of centre crops, the step that led to the buckets), so that touching it
    remakes nothing.
    """
    settings: dict[str, Any] = {
        "resolution": options.resolution,
        "bucket_sizes": [list(size) for size in bucket_sizes(options, multiple)],
        "crop": options.crop,
        "crops": options.crops,
        "flip": options.flip,
        "resampling": "lanczos",
    }
    if options.crop == "random":
        settings["seed"] = options.seed
    return settings


def _bucket(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket that keeps the largest part of the picture; of two equals the squarer one. Exact, in whole numbers."""

    def kept(size: tuple[int, int]) -> Fraction:
        image, bucket = width * size[1], height * size[0]
        return Fraction(min(image, bucket), max(image, bucket))

    return max(sizes, key=lambda size: (kept(size), Fraction(min(size), max(size))))


def _random_corner(free_width: int, free_height: int, key: str) -> tuple[int, int]:
    """A corner in 0..free_width, 0..free_height, drawn by a hash of `key` that is the same in every process."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    left, top = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
    return left % (free_width + 1), top % (free_height + 1)
