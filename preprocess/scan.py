"""What is known of each image file once it was read: its hash, its size, why it cannot be used. And the memory of it.

Every image is read once for each plan, so that a broken one is known by its reason before hours of encoding. It is
decoded only where nothing remembers its bytes, and not even read where it lies in a part of the source whose version
the store states and the memory knows.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import xxhash

from preprocess import images
from preprocess.images import ImageError
from preprocess.lookahead import mapped
from preprocess.sources import Part, Record, Source, SourceOptions
from shared import atomic
from shared.cache.schema import SCAN, canonical, digest

Sizes = dict[bytes, tuple[int, int]]
"""Content hash -> width and height."""


@dataclass(frozen=True, slots=True)
class Scan:
    """One record after its files were read. Its blobs have nothing in hand."""

    record: Record
    sha256: str | None
    width: int | None
    height: int | None
    conditioning_sha256: str | None
    error: str | None


def scan(record: Record, known: Sizes) -> Scan:
    """Read one record's files; an unusable one comes back with its reason. `known`: sizes by content hash.

    A conditioning image is only hashed. One that is missing or broken is a matter of the condition that reads it: the
    sample serves the others. Raises `UserError` where a store does not answer.
    """
    sha256 = width = height = None
    error = record.error
    if error is None:
        try:
            content = record.image.read()
            hashed = hashlib.sha256(content)
            sha256 = hashed.hexdigest()
            width, height = known.get(hashed.digest()) or images.size(content)
        except ImageError as problem:
            error = str(problem)
        except OSError as problem:
            error = f"cannot be read: {problem.strerror}"
    conditioning, conditioning_sha256 = record.conditioning, None
    if error is None and conditioning is not None:
        with suppress(OSError, ImageError):  # the row of the condition that needs it will say so
            conditioning_sha256 = hashlib.sha256(conditioning.read()).hexdigest()
    at_rest = replace(
        record,
        image=record.image.at_rest(),
        conditioning=None if conditioning is None else conditioning.at_rest(),
    )
    return Scan(at_rest, sha256, width, height, conditioning_sha256, error)


@dataclass(frozen=True)
class _Begin:
    """In the stream of records: here a part begins."""

    part: Part
    remembered: bool


def scan_all(records: Iterable[Record], known: Sizes, memory: Memory | None, workers: int) -> Iterator[Scan]:
    """The scans of all records, in order, by `workers` threads. What they find joins the memory part by part, and of
    the part that is being read when the caller stops, what it can use.

    `known`: sizes of images that an earlier plan saw; those that the memory knows join them.
    """

    def stream() -> Iterator[Record | Scan | _Begin]:
        if memory is None or not isinstance(records, Source):
            yield from records
            return
        for part in records.parts:
            remembered = memory.recall(part)
            yield _Begin(part, remembered is not None)
            if remembered is None:
                memory.add_sizes(part, known)
                yield from part.records()
            else:
                yield from remembered

    def look(item: Record | Scan | _Begin) -> Scan | _Begin:
        return scan(item, known) if isinstance(item, Record) else item

    learnt: _Learnt | None = None
    whole = False
    try:
        for item in mapped(look, stream(), workers, ahead=4 * workers):
            if isinstance(item, Scan):
                if learnt is not None:
                    learnt.add(item)
                yield item
                continue
            if memory is not None and learnt is not None:
                memory.keep(learnt, whole=True)
            learnt = None if item.remembered else _Learnt(item.part)
        whole = True
    finally:
        if memory is not None and learnt is not None:
            memory.keep(learnt, whole)


# --- the memory ---


@dataclass
class _Learnt:
    """What was found in one part: the sizes in its images, and all of its rows where it has a version."""

    part: Part
    hashes: bytearray = field(default_factory=bytearray)
    """32 bytes for each image that was decoded."""
    sizes: array[int] = field(default_factory=lambda: array("i"))
    """Width and height of each."""
    rows: list[Scan] = field(default_factory=list)

    def add(self, scan: Scan) -> None:
        """Take up one row."""
        if self.part.version is not None:
            self.rows.append(scan)
        elif scan.width is not None and scan.height is not None and scan.sha256 is not None:
            self.hashes += bytes.fromhex(scan.sha256)
            self.sizes.extend((scan.width, scan.height))


_SIZES = pa.schema([("sha256", pa.binary(32)), ("width", pa.int32()), ("height", pa.int32())])
_ROWS = pa.schema(
    [
        ("name", pa.string()),
        ("image", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("weights", pa.list_(pa.float64())),
        ("conditioning_name", pa.string()),
        ("conditioning", pa.string()),
        ("split", pa.string()),
        ("record_error", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("conditioning_sha256", pa.string()),
        ("error", pa.string()),
    ]
)
_FORMAT: Final = 1
"""Raised when the same part with the same options would be read into other rows."""


class Memory:
    """What earlier plans found out, one file for each part of the source, in the cache: `scan/DIGEST.scan`.

    A file is 16 bytes of XXH3-128 and the Arrow stream that they vouch for. One that is damaged or of another format is
    as good as none. A full disk raises `UserError`.
    """

    def __init__(self, cache: Path, options: SourceOptions, remember: bool) -> None:
        """`remember`: whether anything may be written."""
        # An option that came later is named only where it is set: what was read before it was there stays known.
        stated = {name: value for name, value in asdict(options).items() if name != "caption" or value is not None}
        self._folder, self._options, self._remember = cache / SCAN, digest(stated), remember

    def recall(self, part: Part) -> list[Scan] | None:
        """The part's rows, where its version is stated and they were read of this very version, in the same way."""
        table = None if part.version is None else self._table(part)
        if table is None or table.schema.metadata != self._metadata(part):
            return None
        return [_scan_of(row, part) for row in table.to_pylist()]

    def add_sizes(self, part: Part, sizes: Sizes) -> None:
        """Add what is known of the images of a part, whatever became of the part since."""
        table = self._table(part)
        if table is None:
            return
        once: dict[tuple[int, int], tuple[int, int]] = {}  # few sizes for many images
        for batch in table.select(["sha256", "width", "height"]).to_batches(max_chunksize=4096):
            for sha256, width, height in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if width is not None:
                    key = bytes.fromhex(sha256) if isinstance(sha256, str) else sha256
                    sizes[key] = once.setdefault((width, height), (width, height))

    def keep(self, learnt: _Learnt, whole: bool) -> None:
        """Write down what was found in a part. `whole`: to its end; else what was known of it stays known, too."""
        part = learnt.part
        if part.version is not None:
            if not whole:
                return
            table = pa.Table.from_pylist([_row_of(scan) for scan in learnt.rows], _ROWS)
        else:
            numbers = pa.array(memoryview(learnt.sizes)) if learnt.sizes else pa.array([], pa.int32())
            hashes = pa.Array.from_buffers(
                pa.binary(32), len(learnt.hashes) // 32, [None, pa.py_buffer(bytes(learnt.hashes))]
            )
            table = pa.Table.from_arrays([hashes, numbers[0::2], numbers[1::2]], schema=_SIZES)
            before = None if whole else self._table(part)
            if before is not None and before.schema.equals(_SIZES):
                table = pa.concat_tables([table, before.replace_schema_metadata(None)])
        table = table.replace_schema_metadata(self._metadata(part))
        if self._remember and table.num_rows and not self._is_there(part, table):
            self._folder.mkdir(parents=True, exist_ok=True)
            stream = pa.BufferOutputStream()
            with pa.ipc.new_stream(stream, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
                writer.write_table(table)
            content = stream.getvalue().to_pybytes()
            atomic.write_bytes(self._path(part), xxhash.xxh3_128_digest(content) + content)

    def _is_there(self, part: Part, table: pa.Table) -> bool:
        before = self._table(part)
        return before is not None and before.equals(table, check_metadata=True)

    def _path(self, part: Part) -> Path:
        return self._folder / f"{digest(part.name)}.scan"

    def _metadata(self, part: Part) -> dict[bytes, bytes]:
        state = {"format": _FORMAT, "part": part.name, "version": part.version}
        return {b"state": canonical({**state, "options": self._options} if part.version else state)}

    def _table(self, part: Part) -> pa.Table | None:
        """What the part's file holds; None where there is none that is sound."""
        with suppress(OSError, pa.ArrowException):
            content = self._path(part).read_bytes()
            if xxhash.xxh3_128_digest(content[16:]) == content[:16]:
                table = pa.ipc.open_stream(pa.py_buffer(content)[16:]).read_all()
                if json.loads(table.schema.metadata[b"state"])["format"] == _FORMAT:
                    return table
        return None


def _row_of(scan: Scan) -> dict[str, Any]:
    record = scan.record
    return {
        "name": record.name,
        "image": json.dumps(record.image.place),
        "captions": record.captions,
        "weights": record.weights,
        "conditioning_name": record.conditioning_name,
        "conditioning": None if record.conditioning is None else json.dumps(record.conditioning.place),
        "split": record.split,
        "record_error": record.error,
        "sha256": scan.sha256,
        "width": scan.width,
        "height": scan.height,
        "conditioning_sha256": scan.conditioning_sha256,
        "error": scan.error,
    }


def _scan_of(row: dict[str, Any], part: Part) -> Scan:
    conditioning = row["conditioning"]
    record = Record(
        name=row["name"],
        image=part.blob(json.loads(row["image"])),
        captions=tuple(row["captions"]),
        weights=tuple(row["weights"]),
        conditioning_name=row["conditioning_name"],
        conditioning=None if conditioning is None else part.blob(json.loads(conditioning)),
        split=row["split"],
        error=row["record_error"],
    )
    return Scan(record, row["sha256"], row["width"], row["height"], row["conditioning_sha256"], row["error"])
