"""What every condition answers: its options, what it reads, what its drawings depend on, and how to draw them.

Shapes: B images, R drawings of each, H and W pixels, 3 channels RGB, 0..255. Lines are drawn white-hot: white on
black.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray


class ConditionOptions(Protocol):
    """A frozen dataclass; `check` raises `UserError` for values that no single type can rule out."""

    def check(self) -> None: ...


OptionsT = TypeVar("OptionsT", bound=ConditionOptions)


class Condition(ABC, Generic[OptionsT]):
    """One kind of drawing. Making one is cheap and loads nothing; `open` does."""

    name: ClassVar[str]
    """As in `--condition NAME`, and the name of the condition's file."""
    Options: ClassVar[type[ConditionOptions]]
    """The frozen dataclass of its settings, with `check()`."""
    reads: ClassVar[Literal["image", "conditioning_image"]]
    """Which pixels the drawer is given: the sample's image, or the drawing that came with it; either placed already."""

    png_bytes_per_pixel: ClassVar[float] = 1 / 3
    """About how large the drawings are on disk, for the check before the start. Lines: measured 0.1 to 0.3."""

    channels: ClassVar[Literal[1, 3]] = 1
    """3 where drawings have colours. What is drawn in grey has three equal channels, of which one is kept in pixels."""

    lines: ClassVar[bool] = True
    """Whether the drawings are of lines, so that paintings are compared by their edges; else by their structure."""

    def __init__(self, options: OptionsT) -> None:
        options.check()
        self.options = options

    @property
    def num_drawings(self) -> int:
        """R: how many drawings there are of each sample, of which training picks one at a time."""
        return 1

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """All that the drawings depend on beyond the pixels, as JSON values: settings, and weights by their hash.

        May have to fetch weights, but puts nothing on a device. `UserError` where they are not to be had.
        """

    @abstractmethod
    def open(self, device: str) -> Drawer:
        """Load what drawing needs onto `device` (`cpu`, `cuda`, `cuda:1`). `UserError` as for `recipe`."""


class Drawer(ABC):
    """An open condition: call it with images, close it when done (or use it as a context manager)."""

    num_drawings: int

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (B, H, W, 3) -> uint8 (B, R, H, W, 3). A drawing depends on its own image, not on the batch."""
        assert images.dtype == np.uint8, images.dtype
        assert images.ndim == 4, images.shape
        B, H, W, channels = images.shape
        assert B > 0, images.shape
        assert channels == 3, images.shape
        drawings = self._draw(images)
        assert drawings.dtype == np.uint8, drawings.dtype
        assert drawings.shape == (B, self.num_drawings, H, W, 3), (drawings.shape, self.num_drawings, images.shape)
        return drawings

    @abstractmethod
    def _draw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What `__call__` does, of shapes that it has checked."""

    def close(self) -> None:  # noqa: B027 (not abstract: most drawers hold nothing)
        """Give back memory, on the device too. The drawer is of no use afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
