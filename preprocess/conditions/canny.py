"""Canny edges (Canny 1986) by OpenCV: needs no weights, draws every strong edge, texture included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions.base import Condition, Drawer
from shared.errors import UserError


@dataclass(frozen=True)
class CannyOptions:
    """Thresholds on the gradient of 0..255 pixels (3x3 Sobel, |dx| + |dy|)."""

    low: int = 100
    """An edge goes on as long as its gradient is above this. Lower: longer lines."""
    high: int = 200
    """An edge starts only above this. Lower: more lines, and more texture."""

    def check(self) -> None:
        if not 0 <= self.low <= self.high:
            raise UserError(f"canny: low={self.low}, high={self.high} must be 0 <= low <= high, as 100 and 200")


@final
class Canny(Condition[CannyOptions]):
    """Binary edges, equal to `cv2.Canny(rgb, low, high)`."""

    name = "canny"
    Options = CannyOptions
    reads = "image"

    def recipe(self) -> dict[str, Any]:
        return {"detector": "cv2.Canny", "low": self.options.low, "high": self.options.high}

    def open(self, device: str) -> Drawer:
        """OpenCV draws on the CPU, whatever `device` is."""
        return CannyDrawer(self.options)


class CannyDrawer(Drawer):
    num_drawings = 1

    def __init__(self, options: CannyOptions) -> None:
        self.options = options

    def _draw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        import cv2

        edges = np.stack([cv2.Canny(image, self.options.low, self.options.high) for image in images])  # (B, H, W)
        return np.repeat(edges[:, None, :, :, None], 3, axis=4)
