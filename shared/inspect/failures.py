"""What is not in a cache although the data set has it, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.inspect.opened import Opened


@dataclass(frozen=True)
class Failure:
    """One thing that failed."""

    key: str
    """Of a sample that it befell; empty where there is none."""
    what: str
    """The sample's source, or the caption's text."""
    where: str
    """Reading the image, or the layers."""
    reason: str


@dataclass(frozen=True)
class Failures:
    """All of them."""

    listed: list[Failure]
    left_out: list[int]
    """Rows of samples.parquet of samples that no layer has."""
    incomplete: set[int]
    """Numbers of samples that some layer has nothing for, or nothing for one of their captions."""


def find(opened: Opened) -> Failures:
    """Samples whose image could not be used, samples that a layer has nothing for, captions that none has."""
    left_out = np.flatnonzero(pc.equal(opened.samples["status"], "error").to_numpy())
    listed = [
        Failure(row["key"], row["source"], "reading the image", row["error"])
        for row in opened.samples.take(pa.array(left_out)).to_pylist()
    ]
    lacking: dict[tuple[str, str], list[str]] = {}
    for layer in opened.of_samples:
        for key, reason in layer.errors.items():
            lacking.setdefault((key, reason), []).append(layer.summary.name)
    sources = [row["source"] for row in opened.rows([key for key, _ in lacking])]
    for source, ((key, reason), names) in zip(sources, lacking.items(), strict=True):
        listed.append(Failure(key, source, _layers(names), reason))
    incomplete = {opened.index.sample_numbers[key] for key, _ in lacking} if lacking else set()

    lost: dict[tuple[str, str], list[str]] = {}
    for layer in opened.of_captions:
        for caption, reason in layer.errors.items():
            lost.setdefault((caption, reason), []).append(layer.summary.name)
    texts = opened.texts([caption for caption, _ in lost])
    starts, used = opened.index.all_captions
    for (caption, reason), names in lost.items():
        at = np.flatnonzero(used == opened.index.caption_numbers[caption])
        users = np.searchsorted(starts, at, side="right") - 1
        incomplete |= set(users.tolist())
        key = opened.index.key(int(users[0])) if len(users) else ""
        what = f"caption of {len(users):,} sample{'s' * (len(users) != 1)}: {texts[caption] or '(empty)'}"
        listed.append(Failure(key, what, _layers(names), reason))
    return Failures(listed, left_out.tolist(), incomplete)


def _layers(names: Iterable[str]) -> str:
    listed = list(names)
    return f"layer{'s' * (len(listed) > 1)} {', '.join(listed)}"
