"""From the bytes of an image file to RGB pixels: whole, upright and opaque, or refused with a reason.

What a file is, its first bytes decide and not its name. The formats read are Pillow's own; each is opened by its plugin
directly and not through `Image.open`, which knows formats that run other programs (EPS) and would answer a huge image
before its size can be told, by a limit that any library in the process may have moved.
"""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS: Final = 178_956_970
"""Larger images are refused unread: a small file can claim any size and would take the machine's memory. The number is
Pillow's own, and above what cameras make (a 100-megapixel back has 102 million)."""

_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the stored pixels upright (the EXIF standard, tag 0x0112; 1 is upright already)."""


class ImageError(Exception):
    """An image that cannot be used. The message is the reason in plain words; the caller knows the file's name."""


def decode(data: bytes) -> NDArray[np.uint8]:
    """The picture in `data`, as (H, W, 3) RGB of 0..255.

    EXIF orientation is applied, transparency composited on white, 16 bits scaled to 8, and of an animation the first
    frame taken. Colour profiles are not applied. Raises `ImageError`: no bytes, not an image, truncated or damaged
    (never padded with grey), more than `MAX_PIXELS`, grey values without a known white. Several threads may call it.
    """
    if not data:
        raise ImageError("0 bytes")
    kind, plugin = _format(data)
    try:
        with _truncation_raises(), plugin(io.BytesIO(data)) as image:
            _refuse_impossible_sizes(image.size)
            image.load()
            return _rgb(_upright(image))
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # GIF frames and TIFF tiles may be larger than the image claims to be
        raise ImageError(f"larger than {MAX_PIXELS} pixels once unpacked: {error}") from error
    except Exception as error:  # a damaged file trips Pillow's parsers anywhere: OSError, SyntaxError, KeyError, ...
        how = "truncated" if "truncated" in str(error).lower() else "damaged or truncated"
        raise ImageError(f"{how} {kind} file: {str(error) or type(error).__name__}") from error


def _format(data: bytes) -> tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]:
    """The name of the format that `data` begins like, and what opens it."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG", PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", JpegImageFile  # of several pictures in one (MPO) this reads the first
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP", WebPImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF", GifImageFile
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF", TiffImageFile
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "AVIF", AvifImageFile
    if data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):
        return "JPEG 2000", Jpeg2KImageFile
    if data.startswith(b"BM"):
        return "BMP", BmpImageFile
    if data[:2] in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6") and data[2:3].isspace():
        return "PNM", PpmImageFile
    raise ImageError(f"not an image that can be read: it begins with {data[:16]!r}")


def _refuse_impossible_sizes(size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{width} x {height} pixels: there is nothing in it")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels is larger than the limit of {MAX_PIXELS} pixels; make it smaller")


# --- Pillow's one switch that would let half a picture pass ---

_switch = threading.Lock()
_num_decoding = 0
_switched_by_others = False


@contextmanager
def _truncation_raises() -> Iterator[None]:
    """Inside, truncated files raise, whatever `LOAD_TRUNCATED_IMAGES` says; afterwards it says the same as before.

    Some libraries switch it on when imported, and Pillow then fills the missing part with grey without a word. It is
    one switch for all threads, so that the first to decode turns it off and the last to finish puts it back.
    """
    global _num_decoding, _switched_by_others
    with _switch:
        if _num_decoding == 0:
            _switched_by_others = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _num_decoding += 1
    try:
        yield
    finally:
        with _switch:
            _num_decoding -= 1
            if _num_decoding == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _switched_by_others


# --- from the file's pixels to upright, opaque RGB ---


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, struct.error):  # EXIF too damaged to be parsed: the pixels are whole, and stay as stored
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of 0..255 from any of Pillow's modes."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[grey == transparent] = 65535
        return _grey_to_rgb(grey, white=65535)
    if image.mode == "I" and image.format == "PPM":  # Pillow has scaled these to 16 bits, whatever the file's white was
        return _grey_to_rgb(np.asarray(image, np.float64), white=65535)
    if image.mode in ("I", "F"):
        grey = np.asarray(image, np.float64)
        return _grey_to_rgb(grey, white=_customary_white(grey, (255, 65535) if image.mode == "I" else (1, 255, 65535)))
    if image.mode == "La":  # premultiplied grey, which Pillow turns into nothing but LA
        image = image.convert("LA")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.array(image.convert("RGB"))


def _customary_white(grey: NDArray[np.float64], whites: Sequence[int]) -> int:
    """What white is in `grey`, whose file does not say: the first of `whites` that no pixel exceeds.

    `ImageError` where there is none: guessing would make a picture that nobody has seen.
    """
    lowest, highest = float(grey.min()), float(grey.max())
    white = next((white for white in whites if lowest >= 0 and highest <= white), None)
    if white is None:
        raise ImageError(f"grey values from {lowest:g} to {highest:g}, of which none is known to be white; save 8 bits")
    return white


def _grey_to_rgb(grey: NDArray[np.float64], white: int) -> NDArray[np.uint8]:
    """(H, W) of 0..white -> (H, W, 3) of 0..255, rounded to the nearest."""
    return np.repeat(np.rint(grey * (255 / white)).astype(np.uint8)[..., None], 3, axis=2)
