"""Drawings that came with the images (`conditioning_image` in metadata.jsonl): taken as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions.base import Condition, Drawer


@dataclass(frozen=True)
class PrecomputedOptions:
    """What to do with the drawings' pixels."""

    invert: bool = False
    """Turn black on white into white on black, as the other conditions draw. Touch it for scans and ink."""

    def check(self) -> None:
        """The types rule out all that is wrong."""


@final
class Precomputed(Condition[PrecomputedOptions]):
    """The conditioning image itself, placed like its image."""

    name = "precomputed"
    Options = PrecomputedOptions
    reads = "conditioning_image"
    png_bytes_per_pixel = 2.0  # they may be photographs
    channels = 3

    def recipe(self) -> dict[str, Any]:
        return {"invert": self.options.invert}

    def open(self, device: str) -> Drawer:
        """There is nothing to load; `device` is not touched."""
        return PrecomputedDrawer(self.options)


class PrecomputedDrawer(Drawer):
    num_drawings = 1

    def __init__(self, options: PrecomputedOptions) -> None:
        self.options = options

    def _draw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return (255 - images if self.options.invert else images.copy())[:, None]
