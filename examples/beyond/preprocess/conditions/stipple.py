"""Dots, the denser the brighter: Bayer's ordered dithering (1973). Needs no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions.base import Condition, Drawer
from shared.errors import UserError

_ORDER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
"""Which of 16 cells is filled at which brightness."""


@dataclass(frozen=True)
class StippleOptions:
    """How the dots are drawn."""

    dot: int = 1
    """Side of a dot in pixels. Larger: coarser, and more is left to the model."""

    def check(self) -> None:
        if self.dot < 1:
            raise UserError(f"stipple: dot must be 1 or more, not {self.dot}")


@final
class Stipple(Condition[StippleOptions]):
    """White dots on black."""

    name = "stipple"
    Options = StippleOptions
    reads = "image"
    lines = False  # paintings are compared with it by structure, not by edges

    def recipe(self) -> dict[str, Any]:
        return {"dither": "bayer 4x4", "dot": self.options.dot}

    def open(self, device: str) -> Drawer:
        """There is nothing to load; `device` is not touched."""
        return StippleDrawer(self.options)


class StippleDrawer(Drawer):
    num_drawings = 1

    def __init__(self, options: StippleOptions) -> None:
        self.options = options

    def _draw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = images.shape[1:3]
        rows, columns = np.arange(height) // self.options.dot % 4, np.arange(width) // self.options.dot % 4
        thresholds = (_ORDER[rows[:, None], columns] + 0.5) * 16  # (H, W)
        dots = np.where(images.mean(axis=-1) > thresholds, 255, 0).astype(np.uint8)  # (B, H, W)
        return np.repeat(dots[:, None, :, :, None], 3, axis=4)
