"""The gallery's data: what a card and the view of one sample show, and what there is to choose among."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from shared.inspect import words
from shared.inspect.gallery import CaptionFacts, PlaceFacts, SampleFacts, Status
from shared.inspect.gather import Facts
from shared.inspect.statistics import OUTLIER_SCORE, STATISTICS, Statistics
from shared.inspect.thumbnails import Thumbnail

_SHOWN_CHARACTERS = 2000
"""Of a caption. The page says how long longer ones are, and searches in what it shows."""
_SHOWN_PATH = 300
_SHOWN_REASON = 1000
_NOT_FINITE = 1e9
"""Stands for an infinite score, which JSON has not."""


class Choice(NamedTuple):
    """A value that the gallery can be filtered by."""

    value: str
    text: str
    num_samples: int


def choices(facts: Facts) -> dict[str, list[Choice]]:
    """By filter, the values that some sample has. A condition with "!" before it: the samples that lack it."""
    samples = facts.gallery.samples
    splits = Counter(sample.row["split"] for sample in samples)
    statuses = Counter(sample.status for sample in samples)
    buckets = Counter(
        (sample.row["bucket_width"], sample.row["bucket_height"])
        for sample in samples
        if sample.row["bucket_width"] is not None
    )
    conditions = Counter(name for sample in samples for name, pages in sample.drawings.items() if pages)
    having = [Choice(name, name, num) for name, num in conditions.items()]
    lacking = [Choice(f"!{name}", f"without {name}", len(samples) - num) for name, num in conditions.items()]
    return {
        "split": [Choice(split, split, num) for split, num in sorted(splits.items())],
        "bucket": [
            Choice(f"{width}x{height}", words.size(width, height), num)
            for (width, height), num in sorted(buckets.items(), key=lambda item: (item[0][0] / item[0][1], item[0]))
        ],
        "condition": [*having, *(choice for choice in lacking if choice.num_samples)],
        "status": [Choice(status, status, statuses[status]) for status in get_args(Status) if statuses[status]],
    }


def num_outliers(facts: Facts) -> int:
    """Outliers among the samples of the gallery."""
    outliers = set(facts.outliers)
    return sum(sample.row["key"] in outliers for sample in facts.gallery.samples)


def data(facts: Facts) -> dict[str, Any]:
    """What the page's script draws the gallery from, as JSON values."""
    gallery = facts.gallery
    numbers = {caption: i for i, caption in enumerate(gallery.captions)}
    measured = [
        (entry.layer, entry.statistics, {key: row for row, key in enumerate(entry.statistics.keys)})
        for entry in facts.latents
    ]
    return {
        "statistics": STATISTICS,
        "outlier_score": OUTLIER_SCORE,
        "text_length": facts.text_length,
        "captions": [_caption(caption) for caption in gallery.captions.values()],
        "samples": [_sample(sample, numbers, measured) for sample in gallery.samples],
    }


def _caption(caption: CaptionFacts) -> dict[str, Any]:
    return {
        "text": None if caption.text is None else caption.text[:_SHOWN_CHARACTERS],
        "shown": min(len(caption.text or ""), _SHOWN_CHARACTERS),
        "length": len(caption.text or ""),
        "tokens": caption.num_tokens,
        "places": [_place(place) for place in caption.places],
    }


def _place(place: PlaceFacts) -> list[str | int]:
    return [place.layer, place.file, place.member, place.offset, place.length]


def _sample(
    sample: SampleFacts, captions: dict[str, int], measured: Sequence[tuple[str, Statistics, dict[str, int]]]
) -> dict[str, Any]:
    row = sample.row
    latents, score = [], 0.0
    for layer, statistics, rows in measured:
        if (i := rows.get(row["key"])) is not None:
            latents.append([layer, _finite(statistics.samples[i].tolist()), _finite(statistics.z[i].tolist())])
            score = max(score, float(statistics.scores[i]))
    return {
        "key": row["key"],
        "source": words.cut(row["source"], _SHOWN_PATH),
        "split": row["split"],
        "status": sample.status,
        "reasons": [words.cut(reason, _SHOWN_REASON) for reason in sample.reasons],
        "size": [row["width"], row["height"]],
        "bucket": [row["bucket_width"], row["bucket_height"]],
        "variant": row["variant"],
        "placement": words.placement(row["placement"]),
        "captions": [[captions[caption], weight] for caption, weight in sample.captions],
        "picture": _thumbnail(sample.picture),
        "drawings": [[name, [_thumbnail(page) for page in pages]] for name, pages in sample.drawings.items() if pages],
        "latents": latents,
        "score": score if np.isfinite(score) else _NOT_FINITE,
        "places": [_place(place) for place in sample.places],
    }


def _finite(values: list[float]) -> list[float | None]:
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]


def _thumbnail(picture: Thumbnail | None) -> list[str | int] | None:
    return None if picture is None else [picture.src, picture.width, picture.height]
