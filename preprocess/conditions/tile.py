"""The image itself, made small and large again: what a tile ControlNet is given, to put the detail back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions.base import Condition, Drawer
from shared.errors import UserError


@dataclass(frozen=True)
class TileOptions:
    """How much detail is taken away."""

    factors: tuple[int, ...] = (8,)
    """How many times smaller the image is made before it is enlarged again: one drawing for each. Several, as 2 4 8,
    train a model that puts back a little or a lot; each drawing adds to the cache."""
    blur: float = 0.0
    """Standard deviation in pixels of a Gaussian blur before; 0: none. Touch it for models that are to sharpen."""

    def check(self) -> None:
        if not self.factors:
            raise UserError("tile: factors is empty; give at least one, as 8")
        for factor in self.factors:
            if factor < 1:
                raise UserError(
                    f"tile: factors has {factor}, but the image can be made 1 (not), 2, 3, ... times smaller"
                )
        if len(set(self.factors)) < len(self.factors):
            raise UserError(f"tile: factors has a number twice: {self.factors}; name each once")
        if not 0 <= self.blur < math.inf:
            raise UserError(f"tile: blur={self.blur} must be 0 (none) or more, as 2.0")


@final
class Tile(Condition[TileOptions]):
    """The image without its detail, in its colours, one drawing for each factor, in their order."""

    name = "tile"
    Options = TileOptions
    reads = "image"
    png_bytes_per_pixel = 1.5  # colours: measured 0.5 to 1.3 at factors of 16 and 4
    channels = 3
    lines = False

    @property
    def num_drawings(self) -> int:
        return len(self.options.factors)

    def recipe(self) -> dict[str, Any]:
        return {
            "detector": "cv2.GaussianBlur, INTER_AREA, INTER_CUBIC",
            "factors": list(self.options.factors),
            "blur": self.options.blur,
        }

    def open(self, device: str) -> Drawer:
        """OpenCV works on the CPU, whatever `device` is."""
        return TileDrawer(self.options)


class TileDrawer(Drawer):
    def __init__(self, options: TileOptions) -> None:
        self.options = options
        self.num_drawings = len(options.factors)

    def _draw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        import cv2

        H, W = images.shape[1:3]
        drawings = np.empty((len(images), self.num_drawings, H, W, 3), np.uint8)
        for image, row in zip(images, drawings, strict=True):
            blurred = cv2.GaussianBlur(image, (0, 0), self.options.blur) if self.options.blur else image
            for r, factor in enumerate(self.options.factors):
                size = max(1, round(W / factor)), max(1, round(H / factor))
                small = cv2.resize(blurred, size, interpolation=cv2.INTER_AREA)
                row[r] = cv2.resize(small, (W, H), interpolation=cv2.INTER_CUBIC)
        return drawings
