"""The image itself, made small and large again: what a tile ControlNet is given, to put the detail back."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions.base import Condition, Drawer
from shared.errors import UserError, nearest

Reduction = Literal["area", "bicubic"]


@dataclass(frozen=True)
class TileOptions:
    """How much detail is taken away, and what else is done to what is left."""

    factors: tuple[int, ...] = (8,)
    """How many times smaller the image is made before it is enlarged again: one drawing for each. Several, as 2 4 8,
    train a model that puts back a little or a lot; each drawing adds to the cache."""
    sizes: tuple[int, ...] = ()
    """In the place of `factors`: how many pixels the shorter side is made to have, whatever it has, as 64 (of 256). One
    drawing for each; list the largest last, pictures are compared with it. What has fewer pixels stays as it is."""
    reduce: tuple[Reduction, ...] = ("area",)
    """How it is made smaller: `area` averages pixels, `bicubic` keeps edges sharper. With both, each drawing draws one,
    and the model meets pictures that others made smaller."""
    blur: float = 0.0
    """Standard deviation in pixels of a Gaussian blur before; 0: none. Touch it for models that are to sharpen."""
    noise: float = 0.0
    """Standard deviation, in levels of 255, of Gaussian noise on the small image; 0: none. Touch it (10) for models
    that are to clean up."""
    jpeg: int = 0
    """Quality, from 1 to 100, at which the small image goes through JPEG; 0: it does not. Touch it (50) for models that
    are to take away its traces."""
    vary: bool = False
    """Draw the strength of blur, noise and JPEG for each drawing, from none to what is stated. Touch it for models that
    shall work for good and bad pictures alike."""

    def check(self) -> None:
        if not self.factors:
            raise UserError("tile: factors is empty; give at least one, as 8")
        for factor in self.factors:
            if factor < 1:
                raise UserError(
                    f"tile: factors has {factor}, but the image can be made 1 (not), 2, 3, ... times smaller"
                )
        for size in self.sizes:
            if size < 1:
                raise UserError(f"tile: sizes has {size}, but the shorter side needs a pixel at least; try 64")
        if self.sizes and self.factors != TileOptions.factors:
            raise UserError("tile: factors and sizes both say how small the image becomes; leave one of them out")
        if not self.reduce:
            raise UserError(f"tile: reduce is empty; give at least one of {', '.join(get_args(Reduction))}")
        for name in self.reduce:
            if name not in get_args(Reduction):
                raise UserError(f"tile: reduce has '{name}': {nearest(name, get_args(Reduction))}")
        for listed in ("factors", "sizes", "reduce"):
            values = getattr(self, listed)
            if len(set(values)) < len(values):
                raise UserError(f"tile: {listed} has one twice: {values}; name each once")
        for strength, example in (("blur", "2.0"), ("noise", "10")):
            if not 0 <= getattr(self, strength) < math.inf:
                raise UserError(f"tile: {strength}={getattr(self, strength)} must be 0 (none) or more, as {example}")
        if not 0 <= self.jpeg <= 100:
            raise UserError(f"tile: jpeg={self.jpeg} must be a quality from 1 to 100, or 0 (none)")
        if self.vary and not (self.blur or self.noise or self.jpeg):
            raise UserError("tile: vary draws the strength of blur, noise and jpeg, but none of them is set")


@final
class Tile(Condition[TileOptions]):
    """The image without its detail, in its colours, one drawing for each of `sizes` or `factors`, in their order."""

    name = "tile"
    Options = TileOptions
    reads = "image"
    png_bytes_per_pixel = 1.5  # colours: measured 0.5 to 1.3 at factors of 16 and 4
    lines = False
    channels = 3

    @property
    def num_drawings(self) -> int:
        return len(self.options.sizes or self.options.factors)

    def recipe(self) -> dict[str, Any]:
        """What came later than the first caches is named only where it is set: theirs stay what they are."""
        options = self.options
        later = {"reduce": list(options.reduce), "noise": options.noise, "jpeg": options.jpeg, "vary": options.vary}
        unset = {"reduce": list(TileOptions.reduce), "noise": 0, "jpeg": 0, "vary": False}
        return {
            "detector": "cv2.GaussianBlur, INTER_AREA, INTER_CUBIC",
            **({"sizes": list(options.sizes)} if options.sizes else {"factors": list(options.factors)}),
            "blur": options.blur,
            **{name: value for name, value in later.items() if value != unset[name]},
        }

    def open(self, device: str) -> Drawer:
        """OpenCV works on the CPU, whatever `device` is."""
        return TileDrawer(self.options)


class TileDrawer(Drawer):
    def __init__(self, options: TileOptions) -> None:
        self.options = options
        self.num_drawings = len(options.sizes or options.factors)

    def _draw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        H, W = images.shape[1:3]
        shrinks = self._shrinks(min(H, W))
        drawings = np.empty((len(images), self.num_drawings, H, W, 3), np.uint8)
        for image, row in zip(images, drawings, strict=True):
            for r, shrink in enumerate(shrinks):
                row[r] = self._drawn(image, shrink, _random(image, r))
        return drawings

    def _shrinks(self, shorter_side: int) -> list[float]:
        """How many times smaller the image is made, for each drawing."""
        if self.options.sizes:
            return [max(1.0, shorter_side / size) for size in self.options.sizes]
        return [float(factor) for factor in self.options.factors]

    def _drawn(self, image: NDArray[np.uint8], shrink: float, random: np.random.Generator) -> NDArray[np.uint8]:
        """Blurred, made smaller, noise added, through JPEG, enlarged: as pictures fare on their way to who restores
        them."""
        import cv2

        options = self.options
        # Drawn whether needed or not, so that what one option draws does not move with another.
        of_blur, of_noise, of_jpeg = random.random(3) if options.vary else (1.0, 1.0, 1.0)
        reduction = options.reduce[random.integers(len(options.reduce))]
        if blur := of_blur * options.blur:
            image = _pixels(cv2.GaussianBlur(image, (0, 0), blur))
        H, W = image.shape[:2]
        small = _reduced(image, (max(1, round(W / shrink)), max(1, round(H / shrink))), reduction)
        if noise := of_noise * options.noise:
            noisy = small + random.normal(0, noise, small.shape)
            small = np.rint(noisy).clip(0, 255).astype(np.uint8)
        if options.jpeg:
            small = _through_jpeg(small, round(100 - of_jpeg * (100 - options.jpeg)))
        return _pixels(cv2.resize(small, (W, H), interpolation=cv2.INTER_CUBIC))


def _random(image: NDArray[np.uint8], r: int) -> np.random.Generator:
    """What is drawn for drawing r of an image: a function of its pixels, not of the batch or the order."""
    digest = hashlib.sha256(image.tobytes()).digest()
    return np.random.default_rng([r, *np.frombuffer(digest, np.uint32)])


def _reduced(image: NDArray[np.uint8], size: tuple[int, int], reduction: Reduction) -> NDArray[np.uint8]:
    """`size` is (width, height). OpenCV's bicubic looks at four pixels however far apart; Pillow's at all it covers."""
    import cv2
    from PIL import Image

    if reduction == "bicubic":
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    return _pixels(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def _through_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    import cv2

    # OpenCV's order of channels; without it, brightness would be coded from the wrong ones.
    in_its_order = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    done, coded = cv2.imencode(".jpg", in_its_order, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, image.shape
    return _pixels(cv2.cvtColor(cv2.imdecode(coded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))


def _pixels(image: Any) -> NDArray[np.uint8]:
    assert image.dtype == np.uint8, image.dtype
    return image
