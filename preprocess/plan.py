"""What is to be done, decided before any model loads: which images are sound, how each is placed, who is held out.

Every image is read and decoded once here, so that a broken one is known by its reason before hours of encoding; images
whose bytes an earlier plan has seen are only hashed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from preprocess import geometry, images
from preprocess.config import PreprocessConfig
from preprocess.images import ImageError
from preprocess.lookahead import mapped
from preprocess.sources import Record
from shared.cache.schema import Caption, Sample
from shared.errors import UserError
from shared.report import progress

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Scan:
    """One record after its files were read."""

    record: Record
    sha256: str | None
    width: int | None
    height: int | None
    conditioning_sha256: str | None
    error: str | None


@dataclass(frozen=True)
class Plan:
    """The samples and captions that the cache will have."""

    samples: list[Sample]
    """All variants of all images, by key; those that cannot be used with the reason."""
    captions: list[Caption]
    """Distinct captions of sound samples, the empty one first."""

    @property
    def sound(self) -> list[Sample]:
        """The samples that will be encoded."""
        return [sample for sample in self.samples if sample.status == "ok"]


def make(records: Sequence[Record], options: PreprocessConfig, multiple: int, before: Iterable[Sample] = ()) -> Plan:
    """Read every file of `records` and lay out the cache. `multiple`: sides are multiples of so many pixels.

    `before` are the samples of an earlier plan. Raises `UserError` where no sample is sound.
    """
    known = {s.sha256: (s.width, s.height) for s in before if s.status == "ok" and s.sha256 is not None}
    workers = options.encode.workers
    scans = mapped(lambda record: scan(record, known), records, workers, ahead=4 * workers)
    scanned = list(progress(scans, title="read images", unit="image", total=len(records)))
    splits = choose_splits([s.record for s in scanned if s.error is None], options)
    samples = [sample for s in scanned for sample in _samples(s, splits, options, multiple)]
    if not any(sample.status == "ok" for sample in samples):
        reasons = "; ".join(sorted({str(sample.error) for sample in samples})[:3])
        raise UserError(f"none of the {len(records)} images in {options.data} can be used: {reasons}")
    texts = {caption: None for s in scanned if s.error is None for caption in s.record.captions}
    captions = [Caption.of(""), *(Caption.of(text) for text in texts if text)]
    assert len({sample.key for sample in samples}) == len(samples), "keys are unique"
    return Plan(samples=sorted(samples, key=lambda sample: sample.key), captions=captions)


def scan(record: Record, known: Mapping[str, tuple[int | None, int | None]]) -> Scan:
    """Read one record's files; an unusable one comes back with its reason. `known`: sizes by content hash.

    A conditioning image is only hashed. One that is missing or broken is a matter of the condition that reads it: the
    sample serves the others.
    """
    sha256 = width = height = None
    error = record.error
    if error is None:
        try:
            data = record.image.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 in known:
                width, height = known[sha256]
            else:
                height, width = images.decode(data).shape[:2]
        except ImageError as problem:
            error = str(problem)
        except OSError as problem:
            error = f"cannot be read: {problem.strerror}"
    conditioning_sha256 = None
    if error is None and record.conditioning is not None:
        with suppress(OSError):  # the row of the condition that needs it will say so
            conditioning_sha256 = hashlib.sha256(record.conditioning.read_bytes()).hexdigest()
    return Scan(record, sha256, width, height, conditioning_sha256, error)


def choose_splits(records: Sequence[Record], options: PreprocessConfig) -> dict[str, Split]:
    """Name to split. Where the source names any split, its word holds. Else a name whose hash falls into the lowest
    `validation_fraction` is held out, up to `validation_max` of the lowest; where none does, the lowest one.

    A name's own hash decides: images that are added move no trained image into the held-out ones, and below
    `validation_max` they move none out.
    """
    if any(record.split is not None for record in records):
        return {record.name: record.split or "train" for record in records}
    held_out: set[str] = set()
    if options.validation_fraction > 0 and options.validation_max > 0 and len(records) > 1:
        shares = {record.name: _share(record.name) for record in records}
        lowest = sorted(shares, key=lambda name: (shares[name], name))[: options.validation_max]
        held_out = {name for name in lowest if shares[name] < options.validation_fraction} or set(lowest[:1])
    return {record.name: "validation" if record.name in held_out else "train" for record in records}


def _share(name: str) -> float:
    """A number in [0, 1) that a name's hash draws, the same everywhere."""
    return int.from_bytes(hashlib.sha256(f"split {name}".encode()).digest()[:6], "big") / 2**48


def _samples(scan: Scan, splits: dict[str, Split], options: PreprocessConfig, multiple: int) -> list[Sample]:
    record = scan.record
    base = Sample(
        key=key_of(record.name, 0),
        source=record.name,
        sha256=scan.sha256,
        conditioning_source=_relative(record.conditioning, options),
        conditioning_sha256=scan.conditioning_sha256,
        width=scan.width,
        height=scan.height,
        variant=0,
        placement=None,
        bucket_width=None,
        bucket_height=None,
        split=splits.get(record.name, "train"),
        captions=tuple(Caption.of(caption).id for caption in record.captions),
        status="ok",
        error=None,
    )
    if scan.error is not None:
        return [replace(base, status="error", error=scan.error)]
    assert scan.width is not None
    assert scan.height is not None
    placements = geometry.place(scan.width, scan.height, record.name, options.geometry, multiple)
    return [
        replace(
            base,
            key=key_of(record.name, variant),
            variant=variant,
            placement=json.dumps(asdict(placement), sort_keys=True),
            bucket_width=placement.bucket_width,
            bucket_height=placement.bucket_height,
        )
        for variant, placement in enumerate(placements)
    ]


def _relative(path: Path | None, options: PreprocessConfig) -> str | None:
    return None if path is None else path.relative_to(Path(options.data).expanduser()).as_posix()


def key_of(name: str, variant: int) -> str:
    """A sample's key: readable, unique by the hash of its whole name, without the dots that end a tar member's key.

    16 hex digits, since names that are not ASCII may have nothing else to tell them apart.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[:40]
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}-{variant}"
