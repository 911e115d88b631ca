"""What two processes say to each other over a pipe: a line of JSON, and pictures behind it as plain bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_PIXELS = "pixels_shape"


def write(stream: IO[bytes], words: Mapping[str, Any], pixels: NDArray[np.uint8] | None = None) -> None:
    """Say `words` (JSON values), with an array of uint8 where there is one. Raises `OSError` where nobody listens."""
    shape = {} if pixels is None else {_PIXELS: list(pixels.shape)}
    stream.write(json.dumps({**words, **shape}).encode() + b"\n")
    if pixels is not None:
        assert pixels.dtype == np.uint8, pixels.dtype
        stream.write(np.ascontiguousarray(pixels).data)
    stream.flush()


def read(stream: IO[bytes]) -> tuple[dict[str, Any], NDArray[np.uint8] | None] | None:
    """What was said next; None where the other one has ended, in the middle of it too."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    words: dict[str, Any] = json.loads(line)
    shape = words.pop(_PIXELS, None)
    if shape is None:
        return words, None
    data = stream.read(int(np.prod(shape)))
    if len(data) < np.prod(shape):
        return None
    return words, np.frombuffer(data, np.uint8).reshape(shape)
