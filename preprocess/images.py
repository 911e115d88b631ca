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

MAX_BYTES: Final = 12 * MAX_PIXELS
"""Larger files are refused unread: no image within the limit needs more, be it stored with 32 bits for each of RGB."""

_STRIP_PIXELS: Final = 1 << 20
"""Pixels that are converted at a time: conversions take several times the memory of the picture that comes out."""

_UPRIGHT: Final[dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
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
    kind, plugin = _format(data)
    try:
        with _truncation_raises(), plugin(io.BytesIO(data)) as image:
            _refuse_impossible_sizes(image.size)
            image.load()
            pixels, orientation = _rgb(image), _orientation(image)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # GIF frames and TIFF tiles may be larger than the image claims to be
        raise ImageError(f"larger than {MAX_PIXELS} pixels once unpacked: {error}") from error
    except Exception as error:  # a damaged file trips Pillow's parsers anywhere: OSError, SyntaxError, KeyError, ...
        how = "truncated" if "truncated" in str(error).lower() else "damaged or truncated"
        raise ImageError(f"{how} {kind} file: {str(error) or type(error).__name__}") from error
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


@contextmanager
def decoded(data: bytes) -> Iterator[NDArray[np.uint8]]:
    """`decode(data)` for the length of a `with` block, in its turn: what all threads together have unpacked at a time
    is at most `MAX_PIXELS`, however many they are and however large their images.

    Inside, no other may be asked for: it might wait for this one.
    """
    with _room(_claimed_pixels(data)):
        yield decode(data)


def size(data: bytes) -> tuple[int, int]:
    """Width and height of the picture in `data`, which is decoded for it: what is broken about it is found out. Raises
    `ImageError` as `decode` does."""
    with decoded(data) as pixels:
        height, width, _ = pixels.shape
        return width, height


def refuse_large_file(num_bytes: int) -> None:
    """Raise `ImageError` where a file is too large to be an image that can be read: to be asked before it is read."""
    if num_bytes > MAX_BYTES:
        raise ImageError(f"{num_bytes} bytes is larger than any image within the limit of {MAX_PIXELS} pixels")


def _format(data: bytes) -> tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]:
    """The name of the format that `data` begins like, and what opens it."""
    if not data:
        raise ImageError("0 bytes")
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


# --- how much is unpacked at a time ---

_turn = threading.Condition()
_num_unpacked_pixels = 0


@contextmanager
def _room(num_pixels: int) -> Iterator[None]:
    """Inside, so many pixels may be unpacked: waits while with those of others they would be more than `MAX_PIXELS`."""
    global _num_unpacked_pixels
    with _turn:
        _turn.wait_for(lambda: not _num_unpacked_pixels or _num_unpacked_pixels + num_pixels <= MAX_PIXELS)
        _num_unpacked_pixels += num_pixels
    try:
        yield
    finally:
        with _turn:
            _num_unpacked_pixels -= num_pixels
            _turn.notify_all()


def _claimed_pixels(data: bytes) -> int:
    """How many pixels the file says that it has; 0 where it will be refused before they are unpacked."""
    try:
        with _format(data)[1](io.BytesIO(data)) as image:
            width, height = image.size
            return width * height if width * height <= MAX_PIXELS else 0
    except MemoryError:
        raise
    except Exception:  # as in `decode`, which will say what is wrong with it
        return 0


# --- from the file's pixels to upright, opaque RGB ---


def _orientation(image: Image.Image) -> int:
    """EXIF's word on how the picture is held; 1, upright, where it has none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, struct.error):  # EXIF too damaged to be parsed: the pixels are whole, and stay as stored
        return 1
    return orientation if isinstance(orientation, int) else 1


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of 0..255 from any of Pillow's modes."""
    white = _white(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        pixels[top : top + strip.height] = _strip_rgb(strip, white)
    return pixels


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in pieces of its whole width, each with the row that it begins at."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _white(image: Image.Image) -> int:
    """What white is in a picture of wide grey values; 255 in all others."""
    if image.mode.startswith("I;16"):
        return 65535
    if image.mode == "I" and image.format == "PPM":  # Pillow has scaled these to 16 bits, whatever the file's white was
        return 65535
    if image.mode not in ("I", "F"):
        return 255
    ends = [(float(grey.min()), float(grey.max())) for grey in (np.asarray(strip) for _, strip in _strips(image))]
    lowest, highest = (float(bound([end[i] for end in ends])) for i, bound in enumerate((np.min, np.max)))  # NaN stays
    return _customary_white(lowest, highest, (255, 65535) if image.mode == "I" else (1, 255, 65535))


def _strip_rgb(image: Image.Image, white: int) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of 0..255. `white`: the grey value that is white, where one is wider than 8 bits."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[grey == transparent] = white
        return _grey_to_rgb(grey, white)
    if image.mode in ("I", "F"):
        return _grey_to_rgb(np.asarray(image, np.float64), white)
    if image.mode == "La":  # premultiplied grey, which Pillow turns into nothing but LA
        image = image.convert("LA")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return np.asarray(image.convert("RGB"))


def _customary_white(lowest: float, highest: float, whites: Sequence[int]) -> int:
    """What white is in grey values whose file does not say: the first of `whites` that no pixel exceeds.

    `ImageError` where there is none: guessing would make a picture that nobody has seen.
    """
    white = next((white for white in whites if lowest >= 0 and highest <= white), None)
    if white is None:
        raise ImageError(f"grey values from {lowest:g} to {highest:g}, of which none is known to be white; save 8 bits")
    return white


def _grey_to_rgb(grey: NDArray[np.float64], white: int) -> NDArray[np.uint8]:
    """(H, W) of 0..white -> (H, W, 3) of 0..255, rounded to the nearest."""
    return np.repeat(np.rint(grey * (255 / white)).astype(np.uint8)[..., None], 3, axis=2)
