"""What every kind of source gives: records, one for each image, and where their bytes are. No image is opened."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from preprocess.sources.blobs import Blob
from shared.errors import UserError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "validation",
}
"""The names that folders and files of splits have. A test split is held out like a validation split."""


@dataclass(frozen=True)
class SourceOptions:
    """How the data set is read."""

    kind: str = "auto"
    """folder, webdataset (tars), parquet, or huggingface (made by `save_to_disk`). auto: told from DATA; touch it where
    a folder holds files of several kinds."""
    missing_caption: Literal["report", "empty"] = "report"
    """What becomes of an image without a caption: `report` leaves it out and names it in the report; `empty` keeps it
    with the empty caption. Touch it for images that were never meant to have captions."""
    caption: str | None = None
    """The caption of every image that comes without one, as the prompt of a LoRA's subject: "a photo of sks dog"."""
    image_column: str | None = None
    """The column (of Parquet, Arrow or metadata) or the tar member's ending (`jpg`, `target.png`) that holds the image.
    Default: a customary name. Touch it where there are several."""
    caption_column: str | None = None
    """The column, the key of a JSON member, or the tar member's ending that holds the captions. Default: a customary
    name."""
    conditioning_column: str | None = None
    """The column or tar member's ending that holds the drawing that comes with the image, for CONDITION=precomputed.
    Default: a customary name, where there is one."""
    metadata: str | None = None
    """The file in a folder that names its images and captions, one JSON object per line, CSV or Parquet. Default:
    metadata.jsonl, metadata.csv or metadata.parquet."""

    def check(self) -> None:
        """Refuse impossible values. The kind is looked up when the source is opened."""
        if self.caption is not None and not self.caption.strip():
            raise UserError("source.caption is blank; leave it out, or set source.missing_caption empty")
        for name in ("image_column", "caption_column", "conditioning_column", "metadata"):
            if getattr(self, name) == "":
                raise UserError(f"source.{name} is empty; leave it out to have it chosen")


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as its source tells it, before anyone has opened the image."""

    name: str
    """Unique, and the same in every run: `dogs/a.png`, `00012.tar/000123.jpg`, `train-00000.parquet/00000017`."""
    image: Blob
    captions: tuple[str, ...]
    """Stripped and never blank, save for the one empty caption of `missing_caption="empty"`. Of an image without any,
    `source.caption` where that is given."""
    weights: tuple[float, ...]
    """How often each caption is drawn, beside the others of this sample; as many as there are captions."""
    conditioning_name: str | None
    """The name of the drawing that came with the image, as unique as the image's; None where none did."""
    conditioning: Blob | None
    """That drawing; only the `precomputed` condition reads it. Whether it can be read, nobody knows yet."""
    split: Split | None
    """None: the source does not say."""
    error: str | None
    """Why this sample cannot be used, in plain words, where that is known already; else None."""
    prior: bool = False
    """Whether this is a class image, painted by the model: see `preprocess.class_images`."""


class Part(ABC):
    """A piece of a source that is read from its beginning to its end: a tar, a Parquet file, a whole folder."""

    name: str
    """Unique within the source, and the same in every run."""
    version: str | None = None
    """What changes whenever the bytes do, as the store states it (an ETag): records of a version that was read once
    need not be read again. None where only reading tells."""

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Its samples, in order. What is broken about one image is that image's `Record.error`; what cannot be read of
        the part is a record of the part's own name with the reason. Raises `UserError` where a remote store does not
        answer."""

    def blob(self, place: list[Any]) -> Blob:
        """The blob of this part whose `place` this is. Only parts with a version are asked."""
        raise AssertionError(f"{self.name} has no version")


class Source(ABC):
    """A data set that was opened: what it is made of is known, and no image was read."""

    conditioned: bool | None = None
    """Whether drawings come with the images. None: known when they are read."""
    conditioning_advice: str
    """What to do so that drawings come with the images; `give ...`."""
    num_images: int | None = None
    """None: known when they are read."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """What it is made of, in order."""

    def __iter__(self) -> Iterator[Record]:
        """All records, part by part."""
        for part in self.parts:
            yield from part.records()

    def remarks(self) -> list[str]:
        """Sentences that a user should read before the images are."""
        return []


def captions_of(text: Any, where: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The captions in a `text`, stripped, and the weight of each. A blank one is none: it holds nothing to learn from.

    `text` may be a string, or a list of strings and of `{"text": ..., "weight": ...}`; a missing weight is 1. The same
    caption twice is one with both weights. Raises `UserError` for anything else.
    """
    weights: dict[str, float] = {}
    for item in text if isinstance(text, list) else [] if text is None else [text]:
        caption, weight = (item.get("text"), item.get("weight", 1)) if isinstance(item, dict) else (item, 1)
        if not isinstance(caption, str) or (isinstance(item, dict) and not isinstance(text, list)):
            raise UserError(
                f"{where} must be a string, a list of strings, or a list of {{'text': ..., 'weight': ...}}, "
                f"but is {json.dumps(text, default=str)[:80]}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UserError(f"{where}: a caption's weight must be a number above 0, but is {weight!r}")
        refuse_lone_surrogates(caption, where)
        if caption := caption.strip():
            weights[caption] = weights.get(caption, 0.0) + float(weight)
    return tuple(weights), tuple(weights.values())


def refuse_lone_surrogates(text: str, where: str) -> None:
    """JSON can spell half a character (`\\ud800`), which no tokenizer and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a character ({error.reason}); write it as UTF-8") from error


def or_missing(
    captions: tuple[tuple[str, ...], tuple[float, ...]], why_none: str, options: SourceOptions
) -> tuple[tuple[str, ...], tuple[float, ...], str | None]:
    """The captions, the weights and the error of a sample, after `missing_caption` has had its say."""
    if captions[0]:
        return *captions, None
    if options.caption is not None:
        return (options.caption.strip(),), (1.0,), None
    if options.missing_caption == "empty":
        return ("",), (1.0,), None
    return (), (), f"no caption: {why_none}"


def splits_of(names: Sequence[str]) -> list[Split | None]:
    """What the names of a data set's files say about their split, as the hub lays data sets out: a folder `train/`, a
    file `validation-00000-of-00002.parquet`. None for all where they tell nothing apart: a data set that has nothing
    but a train split says nothing about what to hold out.
    """
    found = [_split_of(name) for name in names]
    return found if any(split == "validation" for split in found) else [None] * len(names)


def _split_of(name: str) -> Split | None:
    *folders, file = name.lower().split("/")
    for folder in folders:
        if folder in _SPLIT_WORDS:
            return _SPLIT_WORDS[folder]
    word = file.replace(".", "-").replace("_", "-").partition("-")[0]
    return _SPLIT_WORDS.get(word)
