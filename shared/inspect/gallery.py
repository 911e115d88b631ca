"""The samples to look at: which ones, their pictures, their captions, and where each of their members lies."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from PIL import Image

from shared.cache.reader import CacheError, Layer
from shared.inspect.config import InspectConfig
from shared.inspect.failures import Failures
from shared.inspect.model import Model, Picture
from shared.inspect.opened import Opened, drawn, is_drawings
from shared.inspect.thumbnails import Thumbnail, side_for, thumbnail
from shared.report import progress

Status = Literal["ok", "incomplete", "damaged", "left out"]
"""`left out`: no layer has it, its own row says why; `incomplete`: a layer has nothing for it or for one of its
captions; `damaged`: bytes of it are not the ones that were written."""


@dataclass(frozen=True)
class PlaceFacts:
    """Where a member lies."""

    layer: str
    file: str
    """The tar, relative to the cache."""
    member: str
    offset: int
    length: int


@dataclass
class SampleFacts:
    """One sample of the gallery."""

    row: dict[str, Any]
    """Its row of samples.parquet."""
    number: int | None
    """In the cache's index; None for one that is left out."""
    status: Status = "ok"
    reasons: list[str] = field(default_factory=list)
    places: list[PlaceFacts] = field(default_factory=list)
    captions: list[tuple[str, float]] = field(default_factory=list)
    """Ids and weights."""
    picture: Thumbnail | None = None
    """Decoded from its latents."""
    drawings: dict[str, list[Thumbnail]] = field(default_factory=dict)
    """By condition, in the order of their numbers."""


@dataclass(frozen=True)
class CaptionFacts:
    """One distinct caption."""

    text: str | None
    """None where only samples that are left out have it: then it is not in the cache."""
    num_tokens: int | None
    places: list[PlaceFacts]
    reasons: list[str]


@dataclass(frozen=True)
class Gallery:
    """What is shown, and how it came about."""

    samples: list[SampleFacts]
    captions: dict[str, CaptionFacts]
    """By id."""
    num_drawn: int
    """Samples that were drawn; the others are there as failures or outliers."""
    picture_layer: str | None
    """Whose latents were decoded; None where none were."""
    side: int
    """Of the embedded pictures, at most, in pixels."""


def choose(opened: Opened, failures: Failures, outliers: Sequence[str], most: int) -> list[SampleFacts]:
    """Up to `most` sound samples that are drawn, and with them up to as many failures and as many `outliers` (keys,
    the farthest first). By number, those that are left out last."""
    numbers = set(drawn(opened.index.num_samples, most).tolist())
    numbers |= set(sorted(failures.incomplete | set(opened.damaged))[:most])
    numbers |= {opened.index.sample_numbers[key] for key in outliers[:most]}
    ordered = sorted(numbers)
    chosen = []
    for number, row in zip(ordered, opened.rows([opened.index.key(n) for n in ordered]), strict=True):
        weights = opened.index.caption_weights(number).tolist()
        captions = list(zip(row["captions"], weights, strict=True))
        status: Status = "incomplete" if number in failures.incomplete else "ok"
        chosen.append(SampleFacts(row, number, status, captions=captions))
    for row in opened.samples.take(pa.array(failures.left_out[:most], pa.int64())).to_pylist():
        captions = [(caption, 1.0) for caption in row["captions"]]
        chosen.append(SampleFacts(row, None, "left out", [row["error"]], captions=captions))
    return chosen


def fill(
    opened: Opened,
    chosen: list[SampleFacts],
    outliers: Sequence[str],
    model: Model,
    count_tokens: Callable[[Sequence[str]], list[int]] | None,
    options: InspectConfig,
) -> Gallery:
    """Look up where the chosen samples lie, read their drawings, decode their latents, read their captions."""
    for sample in chosen:
        if sample.number is not None:
            for layer in opened.of_samples:
                _locate(opened, layer, sample.row["key"], sample.places, sample.reasons)
    num_drawings = sum(place.member.endswith(".png") for sample in chosen for place in sample.places)
    side = options.picture_side or side_for(len(chosen) + num_drawings)
    captions = _captions(opened, chosen, count_tokens)
    for sample in chosen:
        for caption, _ in sample.captions:
            sample.reasons += (reason for reason in captions[caption].reasons if reason not in sample.reasons)
    for sample in progress(chosen, title="drawings", unit="sample"):
        for layer in opened.of_samples:
            if is_drawings(layer.summary) and sample.number is not None and sample.row["key"] in layer:
                sample.drawings[layer.summary.name] = list(_drawings(opened, layer, sample, side))
    picture_layer = _decode(opened, chosen, outliers, model, side, options.decode)
    for sample in chosen:
        if sample.number is not None and (altered := opened.damaged.get(sample.number)):
            sample.status = "damaged"
            sample.reasons = [*altered, *(reason for reason in sample.reasons if reason not in altered)]
    num_drawn = min(opened.index.num_samples, options.samples)
    return Gallery(chosen, captions, num_drawn, picture_layer, side)


def _locate(opened: Opened, layer: Layer, key: str, places: list[PlaceFacts], reasons: list[str]) -> None:
    """Add where a row's members lie, or why it has none."""
    summary = layer.summary
    if key not in layer:
        reasons.append(f"layer {summary.name}: {layer.errors[key]}")
        return
    try:
        members = layer.members(key)
    except CacheError as error:  # the shard's index, for all its rows
        opened.problems[str(error)] = None
        reasons.append(str(error))
        return
    for member, place in sorted(members.items(), key=lambda item: item[1].offset):
        tar = f"{summary.folder}/{place.shard}.tar"
        places.append(PlaceFacts(summary.name, tar, member, place.offset, place.length))


def _captions(
    opened: Opened, chosen: Sequence[SampleFacts], count_tokens: Callable[[Sequence[str]], list[int]] | None
) -> dict[str, CaptionFacts]:
    ids = list(dict.fromkeys(caption for sample in chosen for caption, _ in sample.captions))
    texts = opened.texts(ids)
    counts = dict(zip(texts, count_tokens(list(texts.values())), strict=True)) if count_tokens is not None else {}
    found = {}
    for caption in ids:
        places: list[PlaceFacts] = []
        reasons: list[str] = []
        if caption in texts:
            for layer in opened.of_captions:
                _locate(opened, layer, caption, places, reasons)
        found[caption] = CaptionFacts(texts.get(caption), counts.get(caption), places, reasons)
    return found


def _drawings(opened: Opened, layer: Layer, sample: SampleFacts, side: int) -> Iterator[Thumbnail]:
    assert sample.number is not None
    pages = [place.member for place in sample.places if place.layer == layer.summary.name]
    for member in sorted(pages, key=lambda name: int(name.split(".")[0])):
        try:
            data = bytes(layer.read(sample.row["key"], member))
        except CacheError as error:
            opened.altered(sample.number, error)
            continue
        try:
            with Image.open(io.BytesIO(data)) as page:
                yield thumbnail(page, side)
        except OSError as error:
            sample.reasons.append(f"layer {layer.summary.name}: {member} is no picture ({error})")


def _decode(
    opened: Opened, chosen: Sequence[SampleFacts], outliers: Sequence[str], model: Model, side: int, most: int | None
) -> str | None:
    """Decode latents into the samples' pictures, outliers first; the layer that they are of comes back."""
    if most == 0 or (decoder := model.decoder()) is None:
        return None
    name, decode = decoder
    layer = opened.layers[name]
    rank = {key: i for i, key in enumerate(outliers)}
    there = [sample for sample in chosen if sample.number is not None and sample.row["key"] in layer]
    there.sort(key=lambda sample: rank.get(sample.row["key"], len(rank)))
    if most is None:
        largest = max((s.row["bucket_width"] * s.row["bucket_height"] for s in there), default=0)
        most = model.num_affordable(largest)
    if most is not None and most < len(there):
        model.notes.append(
            f"The latents of {most:,} samples were decoded, those that stand out first; the other "
            f"{len(there) - most:,} show their first drawing. --decode decodes more."
        )
    for sample in progress(there[:most], title="decode", unit="picture"):
        sample.picture = _picture(opened, layer, sample, decode, side)
    return name


def _picture(opened: Opened, layer: Layer, sample: SampleFacts, decode: Picture, side: int) -> Thumbnail | None:
    assert sample.number is not None
    try:
        tensors = layer.tensors(sample.row["key"])
    except CacheError as error:
        opened.altered(sample.number, error)
        return None
    pixels = decode(tensors, sample.row["bucket_height"], sample.row["bucket_width"])
    return thumbnail(Image.fromarray(pixels), side)
