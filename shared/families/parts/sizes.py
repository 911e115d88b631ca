"""Where a sample's pixels come from: how large the image was, what was cut off, how large the rest is. SDXL is told so
(arXiv 2307.01952, section 2.2). Known from the placement alone, so the preprocessing stage makes this layer itself.
"""

from __future__ import annotations

from shared.cache.schema import Field
from shared.families.base import LayerKind

FIELD = "time_ids"

LAYER = LayerKind(
    "sizes",
    "image",
    (),
    (Field(FIELD, "float32", "6", "original height, width; top, left of the crop once resized; its height, width"),),
    shard_rows=4096,
)
