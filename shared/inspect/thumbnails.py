"""Pictures small enough to stand in a page: data URIs of WebP."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

_QUALITY = 82
_SIDES = ((400, 512), (1500, 384), (5000, 256))
_SMALLEST = 192


@dataclass(frozen=True)
class Thumbnail:
    """A picture in the page."""

    src: str
    """`data:image/webp;base64,...`"""
    width: int
    height: int


def side_for(num_pictures: int) -> int:
    """The long side, in pixels, at which so many pictures make a page of some tens of MB at most."""
    return next((side for most, side in _SIDES if num_pictures <= most), _SMALLEST)


def thumbnail(picture: Image.Image, side: int) -> Thumbnail:
    """The picture, made smaller where its long side is longer than `side` pixels."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=_QUALITY)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(source, small.width, small.height)
