"""Units of work: a shard of one layer, with all that is needed to make it in any process on any machine.

A unit is a pure function's argument: the same unit gives the same bytes, whoever makes it and however often. It holds
no pixels, only where they are: some KB at most for a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preprocess import encode
from preprocess.images import ImageError
from preprocess.sources import Blob
from shared.cache import schema
from shared.cache.reader import Place, read_member
from shared.cache.schema import Caption, Reads, Sample
from shared.cache.storage import Listed, Storage


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """A sample's image, or the drawing that came with it, as the sample's placement makes it."""

    sample: Sample
    reads: Reads
    blob: Blob | None
    """Where the bytes of what is read are; None where it has no conditioning image."""

    @property
    def key(self) -> str:
        """The sample's."""
        return self.sample.key

    @property
    def input(self) -> str:
        """Digest of the file and the placement."""
        return self.sample.input(self.reads)

    @property
    def name(self) -> str:
        """For people."""
        return self.sample.source

    def load(self, storage: Storage) -> NDArray[np.uint8]:
        """uint8 (H, W, 3). Raises as `encode.load_placed`."""
        return encode.load_placed(self.blob, self.sample, self.reads)


@dataclass(frozen=True, slots=True)
class Drawings:
    """The drawings of a sample, made before, in their tars."""

    key: str
    input: str
    name: str
    """The image's, for people."""
    layer: str
    """That holds them."""
    tar: Listed | None
    """Of that layer."""
    places: tuple[Place, ...]
    """Of 0.png to R-1.png in the tar."""
    error: str | None
    """Why there are none."""

    def load(self, storage: Storage) -> NDArray[np.uint8]:
        """uint8 (R, H, W, 3). Raises `ImageError` where there are none, `CacheError` where they were altered."""
        if self.error is not None:
            raise ImageError(self.error)
        assert self.tar is not None
        return encode.load_drawings([read_member(storage, self.tar, self.layer, self.key, p) for p in self.places])


@dataclass(frozen=True, slots=True)
class Text:
    """A caption."""

    caption: Caption

    @property
    def key(self) -> str:
        """The caption's id."""
        return self.caption.id

    @property
    def input(self) -> str:
        """A caption's input is its id: the digest of its text."""
        return self.caption.id

    @property
    def name(self) -> str:
        """The beginning of the text, for people."""
        text = " ".join(self.caption.text.split())
        return f"caption '{text if len(text) <= 60 else text[:59] + chr(0x2026)}'"

    def load(self, storage: Storage) -> str:
        """The text."""
        return self.caption.text


Item = PlacedImage | Drawings | Text


@dataclass(frozen=True)
class Unit:
    """One shard to be made."""

    layer: str
    """As the cache names it: `canny_latents`."""
    fingerprint: str
    """Of the layer's recipe."""
    number: int
    """The shard's."""
    items: tuple[Item, ...]
    """What its rows are made from, in order. Samples are all of one shape."""

    @property
    def folder(self) -> str:
        """The layer's folder in the cache."""
        return schema.layer_folder(self.layer, self.fingerprint)

    @property
    def name(self) -> str:
        """`canny-77ab01de/00007`: unique in a run."""
        return f"{self.folder}/{schema.shard_name(self.number)}"

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(key, input) of each row."""
        return [(item.key, item.input) for item in self.items]

    def names(self, most: int) -> str:
        """What it is made from, for people: up to `most` names, and how many more there are."""
        names = [item.name for item in self.items]
        more = f" and {len(names) - most} more" if len(names) > most else ""
        return ", ".join(names[:most]) + more
