"""Grids of pictures with a heading over each column: what a validation, a sample and the demo show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_HEAD, _GAP = 18, 2


def grid(rows: Sequence[Sequence[NDArray[np.uint8]]], headings: Sequence[str]) -> NDArray[np.uint8]:
    """Rows of pictures, each uint8 (H, W, 3), under one heading per column -> one picture, uint8 (H', W', 3).

    Pictures of different sizes are set into cells of the largest.
    """
    assert rows
    assert all(len(row) == len(headings) for row in rows)
    height = max(picture.shape[0] for row in rows for picture in row)
    width = max(picture.shape[1] for row in rows for picture in row)
    sheet = Image.new(
        "RGB", (len(headings) * (width + _GAP) - _GAP, _HEAD + len(rows) * (height + _GAP) - _GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((column * (width + _GAP) + 2, 3), heading, fill="black")
    for i, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (column * (width + _GAP), _HEAD + i * (height + _GAP)))
    return np.asarray(sheet)
