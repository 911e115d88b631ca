"""What detectors have in common: a network on its device, that looks at the image at resolutions of its own.

controlnet-aux's detectors take one image at a time; their networks take a batch, and normalize, if at all, image by
image, so that the drawing is the same. What is around the networks is written again here and in the conditions' files,
batched, and tested to equal the detectors.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions.base import Drawer
from shared.errors import UserError

if TYPE_CHECKING:
    import torch

_SIDE_MULTIPLE: Final = 64
"""The detectors look at sides that are multiples of this."""

_IMPORT_WARNINGS: Final = (
    r"The module 'mediapipe' is not installed",
    r"Importing from timm\.models\.(layers|registry) is deprecated",
    r"Overwriting tiny_vit_\w+ in registry",
    r"Please import `gaussian_filter` from the `scipy\.ndimage` namespace",
    r"`torch\.jit\.script` is deprecated",
)
"""What `import controlnet_aux` prints about detectors that are not used here."""


@contextmanager
def quiet_import() -> Iterator[None]:
    """Inside, `import controlnet_aux` says nothing about detectors that are not used here."""
    with warnings.catch_warnings():
        for message in _IMPORT_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


def check_resolutions(condition: str, resolutions: tuple[int, ...]) -> None:
    """Refuse (`UserError`) detect resolutions that the detectors cannot look at."""
    if not resolutions:
        raise UserError(f"{condition}: detect_resolutions is empty; give at least one, as 512")
    for resolution in resolutions:
        if resolution < _SIDE_MULTIPLE or resolution % _SIDE_MULTIPLE:
            raise UserError(
                f"{condition}: detect_resolutions has {resolution}, but the detector works in multiples of "
                f"{_SIDE_MULTIPLE}; use 128, 256, 384 or 512"
            )
    if len(set(resolutions)) < len(resolutions):
        raise UserError(f"{condition}: detect_resolutions has a number twice: {resolutions}; name each once")


class NetworkDrawer(Drawer):
    """Holds a network on its device until it is closed."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._network: torch.nn.Module | None = network

    @property
    def network(self) -> torch.nn.Module:
        """The open network."""
        assert self._network is not None, "the drawer is closed"
        return self._network

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.network.parameters()).device

    def close(self) -> None:
        import torch

        self._network = None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class DetectorDrawer(NetworkDrawer):
    """Grey drawings, one for each detect resolution. A kind of detector says what its network makes of pixels."""

    black_on_white: ClassVar[bool]
    """As the network draws: then the drawing is its negative."""

    def __init__(self, network: torch.nn.Module, detect_resolutions: tuple[int, ...]) -> None:
        super().__init__(network)
        self._detect_resolutions = detect_resolutions
        self.num_drawings = len(detect_resolutions)

    @abstractmethod
    def _detect(self, seen: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (B, h, w, 3) -> (B, h, w) of about 0..255, as the network draws."""

    def _draw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.stack([self._draw_at(resolution, images) for resolution in self._detect_resolutions], axis=1)

    def _draw_at(self, resolution: int, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (B, H, W, 3) -> uint8 (B, H, W, 3), seen with a short side of `resolution` pixels."""
        import cv2
        import torch

        H, W = images.shape[1:3]
        seen = np.stack([_resize_for_detection(image, resolution) for image in images])  # (B, h, w, 3)
        # cuDNN's default for fp32 convolutions is TF32, with 10 bits of mantissa: then GPUs would draw unlike CPUs
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            lines = to_bytes(self._detect(seen))
        drawings = np.stack([cv2.resize(line, (W, H), interpolation=cv2.INTER_LINEAR) for line in lines])
        return np.repeat((255 - drawings if self.black_on_white else drawings)[..., None], 3, axis=3)


def to_bytes(lines: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0..255 cut off to whole numbers, as upstream does it. `ImageError` where a value is not finite."""
    if not np.isfinite(lines).all():
        from preprocess.images import ImageError

        raise ImageError("the detector gave values that are not finite")
    return lines.clip(0, 255).astype(np.uint8)


def _resize_for_detection(image: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """(H, W, 3) -> (h, w, 3): the short side becomes `resolution`, both sides round to multiples of 64, as upstream."""
    import cv2

    H, W = image.shape[:2]
    scale = resolution / min(H, W)
    h, w = (round(side * scale / _SIDE_MULTIPLE) * _SIDE_MULTIPLE for side in (H, W))
    resized: NDArray[np.uint8] = cv2.resize(
        image, (w, h), interpolation=cv2.INTER_LANCZOS4 if scale > 1 else cv2.INTER_AREA
    )
    return resized
