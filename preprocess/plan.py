"""What is to be done, decided before any model loads: which images are sound, how each is placed, who is held out."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import posixpath
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from preprocess import geometry
from preprocess.config import PreprocessConfig
from preprocess.scan import Memory, Scan, Sizes, scan_all
from preprocess.sources import Blob, Record, Source
from shared.cache.schema import Caption, Sample
from shared.errors import UserError
from shared.report import progress

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Plan:
    """The samples and captions that the cache will have."""

    samples: list[Sample]
    """All variants of all images, by key; those that cannot be used with the reason."""
    captions: list[Caption]
    """Distinct captions of sound samples: the empty one first, then in the order in which units of samples meet them,
    so that shards of text lie along the shards of samples."""
    blobs: Mapping[str, Blob] = field(compare=False)
    """Where the bytes of each sample's source and conditioning source are."""

    @property
    def sound(self) -> list[Sample]:
        """The samples that will be encoded."""
        return [sample for sample in self.samples if sample.status == "ok"]


def make(
    records: Iterable[Record],
    options: PreprocessConfig,
    multiple: int,
    before: Iterable[Sample] = (),
    cache: Path | None = None,
    remember: bool = True,
) -> Plan:
    """Read the files of all records and lay out the cache. `multiple`: sides are multiples of so many pixels.

    `before` are the samples of an earlier plan; where `records` are a `Source` and `cache` is given, what is remembered
    there is not found out again, and what is found out is remembered, unless `remember` is False. Records pass by one
    at a time, and of their bytes a few at a time are in memory. Raises `UserError` where no sample is sound, and where
    a store does not answer.
    """
    known: Sizes = {
        bytes.fromhex(s.sha256): (s.width, s.height)
        for s in before
        if s.status == "ok" and s.sha256 is not None and s.width is not None and s.height is not None
    }
    memory = None if cache is None else Memory(cache, options.source, remember)
    rows = _Rows(options, multiple)
    num_images = records.num_images if isinstance(records, Source) else None
    scans = scan_all(records, known, memory, options.encode.workers)
    for scan in progress(scans, title="read images", unit="image", total=num_images):
        rows.add(scan)
    return rows.plan()


class _Rows:
    """The rows of the tables to be, as compact as they can be: what many share is one object."""

    def __init__(self, options: PreprocessConfig, multiple: int) -> None:
        self._options, self._multiple = options, multiple
        self._samples: list[Sample] = []
        self._captions: dict[str, Caption] = {}
        self._blobs: dict[str, Blob] = {}
        self._once: dict[Hashable, Any] = {}
        self._source_says_splits = False

    def _shared(self, value: T) -> T:
        """The first object that was equal to this one."""
        return self._once.setdefault(value, value)

    def add(self, scan: Scan) -> None:
        """Take up one image."""
        record = scan.record
        self._blobs[record.name] = record.image
        if record.conditioning is not None and record.conditioning_name is not None:
            self._blobs[record.conditioning_name] = record.conditioning
        if scan.error is None:
            self._source_says_splits |= record.split is not None
        ids = []
        for text in record.captions:
            caption = Caption.of(text)
            if scan.error is None:
                caption = self._captions.setdefault(caption.id, caption)
            ids.append(caption.id)
        base = Sample(
            key=key_of(record.name, 0),
            source=record.name,
            sha256=scan.sha256,
            conditioning_source=record.conditioning_name,
            conditioning_sha256=scan.conditioning_sha256,
            width=self._shared(scan.width),
            height=self._shared(scan.height),
            variant=0,
            placement=None,
            bucket_width=None,
            bucket_height=None,
            split=record.split or "train",
            captions=tuple(ids),
            caption_weights=self._shared(record.weights),
            status="ok",
            error=None,
            prior=record.prior,
        )
        if scan.error is not None:
            self._samples.append(replace(base, status="error", error=scan.error))
            return
        assert scan.width is not None
        assert scan.height is not None
        placements = geometry.place(scan.width, scan.height, record.name, self._options.geometry, self._multiple)
        self._samples += [
            replace(
                base,
                key=key_of(record.name, variant),
                variant=variant,
                placement=self._shared(json.dumps(asdict(placement), sort_keys=True)),
                bucket_width=self._shared(placement.bucket_width),
                bucket_height=self._shared(placement.bucket_height),
            )
            for variant, placement in enumerate(placements)
        ]

    def plan(self) -> Plan:
        """The plan of all that were added."""
        samples = self._samples
        given = [sample for sample in samples if not sample.prior]
        if not given:
            raise UserError(f"there is not one image in {self._options.data}")
        if not any(sample.status == "ok" for sample in given):
            reasons = "; ".join(sorted({str(sample.error) for sample in given})[:3])
            raise UserError(f"none of the {len(given)} images in {self._options.data} can be used: {reasons}")
        samples.sort(key=lambda sample: sample.key)
        assert all(a.key != b.key for a, b in itertools.pairwise(samples)), "keys are unique"
        if not self._source_says_splits:
            names = (s.source for s in samples if s.status == "ok" and s.variant == 0 and not s.prior)
            held_out = choose_held_out(names, self._options)
            for i, sample in enumerate(samples):
                if sample.source in held_out:
                    samples[i] = replace(sample, split="validation")
        return Plan(samples=samples, captions=self._ordered_captions(), blobs=self._blobs)

    def _ordered_captions(self) -> list[Caption]:
        sound = (sample for sample in self._samples if sample.status == "ok")
        empty = Caption.of("")
        ordered = {empty.id: empty}
        for sample in sorted(sound, key=unit_order):
            for caption in sample.captions:
                ordered.setdefault(caption, self._captions[caption])
        return list(ordered.values())


def unit_order(sample: Sample) -> tuple[int, int, str]:
    """What sound samples are sorted by before units are cut: a unit holds one shape, and follows the source's order."""
    assert sample.bucket_width is not None
    assert sample.bucket_height is not None
    return sample.bucket_width, sample.bucket_height, sample.key


def choose_held_out(names: Iterable[str], options: PreprocessConfig) -> set[str]:
    """Who is held out where the source says nothing: names whose hash falls into the lowest `validation_fraction`, up
    to `validation_max` of the lowest; where none does, the lowest one, unless it is the only one.

    A name's own hash decides: images that are added move no trained image into the held-out ones, and below
    `validation_max` they move none out.
    """
    if options.validation_fraction <= 0 or options.validation_max <= 0:
        return set()
    lowest = heapq.nsmallest(max(2, options.validation_max), ((_share(name), name) for name in names))
    if len(lowest) < 2:
        return set()
    lowest = lowest[: options.validation_max]
    return {name for share, name in lowest if share < options.validation_fraction} or {lowest[0][1]}


def _share(name: str) -> float:
    """A number in [0, 1) that a name's hash draws, the same everywhere."""
    return int.from_bytes(hashlib.sha256(f"split {name}".encode()).digest()[:6], "big") / 2**48


def key_of(name: str, variant: int) -> str:
    """A sample's key: readable, unique by the hash of its whole name, without the dots that end a tar member's key.

    The readable part is the end of the name with all its folders, so that the keys of one container follow each other
    and samples in the order of their keys lie beside each other in it, too. 16 hex digits, since names that are not
    ASCII may have nothing else to tell them apart.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", posixpath.splitext(name)[0])[-40:]
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}-{variant}"
