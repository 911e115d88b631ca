"""What there is to see in a cache: totals of all of it, statistics of what is measured, and the gallery.

What is drawn is drawn with a fixed seed, so that the same cache gives the same page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from shared.cache.reader import CacheError, Layer, LayerSummary, parse_safetensors
from shared.inspect import failures, gallery
from shared.inspect.config import InspectConfig
from shared.inspect.failures import Failures
from shared.inspect.gallery import Gallery
from shared.inspect.model import Model
from shared.inspect.opened import Opened, drawn, latents_field
from shared.inspect.statistics import Statistics, measure
from shared.report import progress

_CAPTIONS_AT_ONCE = 1000


@dataclass(frozen=True)
class LayerFacts:
    """One layer in numbers."""

    summary: LayerSummary
    num_rows: int
    """Samples or captions that it must have."""
    num_errors: int
    """Of them, those it has nothing for."""
    num_bytes: int
    """Of its tars."""
    num_unused: int
    """Rows in its shards that nothing refers to any more."""


@dataclass
class BucketFacts:
    """All samples of one shape."""

    width: int
    height: int
    num_train: int = 0
    num_validation: int = 0
    num_incomplete: int = 0
    num_shards: int = 0
    num_bytes: int = 0
    """Of the tars that hold them, those of text not counted."""


@dataclass(frozen=True)
class LatentsFacts:
    """The statistics of one layer of latents."""

    layer: str
    meaning: str
    statistics: Statistics


@dataclass(frozen=True)
class Facts:
    """All that the page shows."""

    where: str
    """The cache's folder or URL."""
    manifest: dict[str, Any]
    problems: list[str]
    """Damage: what was read and is not as it was written."""
    notes: list[str]
    """What could not be shown, and why."""
    num_samples: int
    """Those left out too."""
    num_images: int
    """Of which there are samples that are not left out."""
    num_prior: int
    """Samples of class images, which the model painted."""
    num_captions: int
    """Distinct ones, the empty one not counted."""
    layers: list[LayerFacts]
    buckets: list[BucketFacts]
    """From the tallest to the widest."""
    sizes: NDArray[np.int64]
    """(N, 4), one row for each sound image: width and height of the image, then of its bucket."""
    caption_characters: NDArray[np.int64]
    """Of every distinct caption but the empty one."""
    caption_tokens: NDArray[np.int64] | None
    """Of those drawn; None where they could not be counted."""
    text_length: int | None
    """Tokens that are encoded of each caption; None where the layers do not say."""
    latents: list[LatentsFacts]
    num_measured: int
    """Samples whose latents were measured."""
    failures: Failures
    outliers: list[str]
    """Keys of the samples that stand out, the farthest first."""
    gallery: Gallery
    picture_model: str
    """Whose VAE decoded the pictures, if any were."""


def gather(options: InspectConfig) -> Facts:
    """Read a cache. Raises `CacheError` where it cannot be opened; damage further inside is one of the `problems`."""
    opened = Opened(options.cache)
    made_with = opened.cache.manifest["model"]
    model = Model(
        family=opened.cache.family,
        summaries=opened.summaries,
        name=options.model or made_with["name"],
        revision=None if options.model else made_with["revision"],
        device="cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu",
    )
    numbers = drawn(opened.index.num_samples, options.statistics_samples)
    latents = [
        LatentsFacts(layer.summary.name, field.meaning, _measure(opened, layer, numbers))
        for layer in opened.of_samples
        if (field := latents_field(layer.summary)) is not None
    ]
    outliers = _outliers([entry.statistics for entry in latents])
    count_tokens = model.token_counter()
    failed = failures.find(opened)
    chosen = gallery.choose(opened, failed, outliers, options.samples)
    shown = gallery.fill(opened, chosen, outliers, model, count_tokens, options)
    recipes = [summary.recipe for summary in opened.summaries.values()]
    return Facts(
        where=opened.cache.url,
        manifest=opened.cache.manifest,
        problems=list(opened.problems),
        notes=model.notes,
        num_samples=len(opened.samples),
        num_images=len(np.unique(opened.index.images)),
        num_prior=0 if opened.index.prior is None else int(opened.index.prior.sum()),
        num_captions=opened.index.num_captions - 1,
        layers=[_layer(layer) for layer in opened.layers.values()],
        buckets=_buckets(opened, failed.incomplete),
        sizes=_sizes(opened),
        caption_characters=_caption_characters(opened),
        caption_tokens=None if count_tokens is None else _caption_tokens(opened, count_tokens, options),
        text_length=next((recipe["text_length"] for recipe in recipes if "text_length" in recipe), None),
        latents=latents,
        num_measured=len(numbers),
        failures=failed,
        outliers=outliers,
        gallery=shown,
        picture_model=model.name,
    )


def _layer(layer: Layer) -> LayerFacts:
    shards, num_rows = layer.summary.shards, len(layer.places)
    return LayerFacts(
        summary=layer.summary,
        num_rows=num_rows,
        num_errors=layer.num_errors,
        num_bytes=sum(shard.tar_bytes for shard in shards),
        num_unused=sum(shard.rows for shard in shards) - num_rows,
    )


def _buckets(opened: Opened, incomplete: set[int]) -> list[BucketFacts]:
    lost = np.array(sorted(incomplete), np.int64)
    found: dict[tuple[int, int], BucketFacts] = {}
    for bucket in opened.index.buckets:
        entry = found.setdefault((bucket.width, bucket.height), BucketFacts(bucket.width, bucket.height))
        if bucket.split == "train":
            entry.num_train += len(bucket)
        else:
            entry.num_validation += len(bucket)
        entry.num_incomplete += int(np.searchsorted(lost, bucket.stop) - np.searchsorted(lost, bucket.start))
    for layer in opened.of_samples:
        for shape, (num_shards, num_bytes) in _tars_by_shape(opened, layer).items():
            found[shape].num_shards += num_shards
            found[shape].num_bytes += num_bytes
    return sorted(found.values(), key=lambda bucket: (bucket.width / bucket.height, bucket.width))


def _tars_by_shape(opened: Opened, layer: Layer) -> dict[tuple[int, int], tuple[int, int]]:
    """Shape to the number of a layer's tars with samples of it, and their bytes. A tar of several shapes is shared out
    by its rows."""
    tars: dict[int, dict[tuple[int, int], int]] = {}
    for bucket in opened.index.buckets:
        shape = (bucket.width, bucket.height)
        numbers, counts = np.unique(layer.places.shard[bucket.start : bucket.stop], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            rows = tars.setdefault(number, {})
            rows[shape] = rows.get(shape, 0) + count
    total: dict[tuple[int, int], tuple[int, int]] = {}
    for number, rows in tars.items():
        for shape, count in rows.items():
            num_shards, num_bytes = total.get(shape, (0, 0))
            share = layer.tar(number).num_bytes * count // sum(rows.values())
            total[shape] = num_shards + 1, num_bytes + share
    return total


def _sizes(opened: Opened) -> NDArray[np.int64]:
    first = opened.samples.filter(
        pc.and_(pc.equal(opened.samples["status"], "ok"), pc.equal(opened.samples["variant"], 0))
    )
    columns = [first[name].to_numpy() for name in ("width", "height", "bucket_width", "bucket_height")]
    return np.stack(columns, axis=1).astype(np.int64)


def _caption_characters(opened: Opened) -> NDArray[np.int64]:
    lengths = pc.utf8_length(opened.captions["text"]).to_numpy().astype(np.int64)
    return lengths[lengths > 0]


def _caption_tokens(
    opened: Opened, count_tokens: Callable[[Sequence[str]], list[int]], options: InspectConfig
) -> NDArray[np.int64]:
    texts = opened.captions.filter(pc.not_equal(opened.captions["text"], ""))["text"]
    chosen = texts.take(drawn(len(texts), options.statistics_samples)).to_pylist()
    counts: list[int] = []
    with progress(title="count tokens", unit="caption", total=len(chosen)) as bar:
        for i in range(0, len(chosen), _CAPTIONS_AT_ONCE):
            counts += count_tokens(chosen[i : i + _CAPTIONS_AT_ONCE])
            bar.update(len(chosen[i : i + _CAPTIONS_AT_ONCE]))
    return np.array(counts, np.int64)


def _measure(opened: Opened, layer: Layer, numbers: NDArray[np.int64]) -> Statistics:
    field = latents_field(layer.summary)
    assert field is not None

    def latents() -> Iterator[tuple[str, torch.Tensor]]:
        for number in progress(numbers.tolist(), title=f"measure {layer.summary.name}", unit="sample"):
            if layer.places.length[number] >= 0:
                try:
                    tensors = parse_safetensors(layer.read_row(number))
                except CacheError as error:
                    opened.altered(number, error)
                    continue
                yield opened.index.key(number), tensors[field.name]

    return measure(latents())


def _outliers(measured: Sequence[Statistics]) -> list[str]:
    """Keys of the samples that stand out in any layer, the farthest first."""
    scores: dict[str, float] = {}
    for statistics in measured:
        of_rows = statistics.scores
        for row in statistics.outliers:
            key = statistics.keys[row]
            scores[key] = max(scores.get(key, 0.0), float(of_rows[row]))
    return sorted(scores, key=lambda key: (-scores[key], key))
