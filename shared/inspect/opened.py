"""A cache opened as far as it goes: what is damaged in it is noted and the rest is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared.cache import schema
from shared.cache.reader import Cache, CacheError, Layer, LayerSummary


class Opened:
    """A cache, its tables as columns, its layers that can be read, and what was found wrong so far."""

    def __init__(self, path: str) -> None:
        """Open the cache in a folder or at a URL. Raises `CacheError` where there is none, or its lists are damaged; a
        damaged layer is a problem."""
        self.cache = Cache(path)
        self.index = self.cache.index
        self.problems: dict[str, None] = {}
        """Damage in words, each once."""
        self.damaged: dict[int, dict[str, None]] = {}
        """Number of a sample to what was found altered in it."""
        stated = {name: self.cache.manifest[name]["checksum"] for name in ("samples", "captions")}
        # Columns and not `cache.samples`: an object for each row would be GBs of a cache of millions.
        self.samples = self._table(schema.SAMPLES, stated["samples"])
        self.captions = self._table(schema.CAPTIONS, stated["captions"])
        self.layers: dict[str, Layer] = {}
        for name in self.cache.layer_names:
            try:
                self.layers[name] = self.cache.layer(name)
            except CacheError as error:
                self.problems[str(error)] = None

    def _table(self, name: str, checksum: str) -> pa.Table:
        return schema.read_table(self.cache.storage.fetch(name, checksum=checksum), checksum).combine_chunks()

    @property
    def summaries(self) -> dict[str, LayerSummary]:
        """What the layers are that can be read."""
        return {name: layer.summary for name, layer in self.layers.items()}

    @property
    def of_samples(self) -> list[Layer]:
        """The layers that have a row for each sample."""
        return [layer for layer in self.layers.values() if layer.summary.reads != "caption"]

    @property
    def of_captions(self) -> list[Layer]:
        """The layers that have a row for each distinct caption."""
        return [layer for layer in self.layers.values() if layer.summary.reads == "caption"]

    def altered(self, number: int, error: CacheError) -> None:
        """Note that bytes of a sample are not the ones that were written."""
        self.problems[str(error)] = None
        self.damaged.setdefault(number, {})[str(error)] = None

    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of samples.parquet of these keys, in their order."""
        return self.samples.take(_at(keys, self.samples["key"])).to_pylist()

    def texts(self, ids: Sequence[str]) -> dict[str, str]:
        """Id to text of these captions; only those of samples that are not left out are in the cache."""
        found = self.captions.take(_at(ids, self.captions["id"]).drop_null())
        return dict(zip(found["id"].to_pylist(), found["text"].to_pylist(), strict=True))


def _at(values: Sequence[str], column: pa.ChunkedArray) -> pa.Array:
    return pc.index_in(pa.array(values, pa.string()), value_set=column)


def drawn(num: int, most: int) -> NDArray[np.int64]:
    """`most` numbers below `num`, or all, ascending: the same ones every time."""
    if num <= most:
        return np.arange(num)
    return np.sort(np.random.default_rng(0).choice(num, most, replace=False))


def latents_field(summary: LayerSummary) -> schema.Field | None:
    """The field of a layer that is an image of latents: the posterior's mean, or the one sample that is kept of it."""
    return next((field for field in summary.fields if field.shape.endswith(" h w")), None)


def is_drawings(summary: LayerSummary) -> bool:
    """Whether the layer holds the drawings of a condition, as PNG."""
    return any(field.name.endswith(".png") for field in summary.fields)
