"""What a cache looks like on disk: names, versions, tables, fingerprints and checksums. `cache_schema.md` in code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shared import atomic
from shared.errors import UserError

FORMAT = "underdrawing cache"
SCHEMA_VERSION = 1
"""Raised by one whenever a reader of the old version would misread the new one."""

MANIFEST = "cache.json"
SAMPLES = "samples.parquet"
CAPTIONS = "captions.parquet"
LAYER = "layer.json"

SAMPLES_TABLE = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("sha256", pa.string()),
        ("conditioning_source", pa.string()),
        ("conditioning_sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("variant", pa.int32()),
        ("placement", pa.string()),
        ("bucket_width", pa.int32()),
        ("bucket_height", pa.int32()),
        ("split", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
CAPTIONS_TABLE = pa.schema([("id", pa.string()), ("text", pa.string())])
INDEX_TABLE = pa.schema(
    [
        ("key", pa.string()),
        ("input", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("checksum", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)


Reads = Literal["image", "conditioning_image", "caption"]
"""What a layer is made from, at the bottom: the images, the drawings that came with them, or the captions."""


class CacheError(UserError):
    """This cache cannot be used as it is: damaged, incomplete, of another version, or not a cache."""


@dataclass(frozen=True)
class Sample:
    """One image (or one variant of it: a crop, a mirrored copy) with its captions; a row of `samples.parquet`."""

    key: str
    """Unique, stable from run to run, fit for a WebDataset tar (no dots, no slashes)."""
    source: str
    """Where the image is, relative to the data set."""
    sha256: str | None
    """Of the image file's bytes. None where they could not be read."""
    conditioning_source: str | None
    conditioning_sha256: str | None
    width: int | None
    """Of the whole image in pixels, upright."""
    height: int | None
    variant: int
    placement: str | None
    """JSON: resize, crop and flip that make the bucket's pixels out of the image."""
    bucket_width: int | None
    """Pixels that were encoded."""
    bucket_height: int | None
    split: Literal["train", "validation"]
    captions: tuple[str, ...]
    """Ids of rows of `captions.parquet`."""
    status: Literal["ok", "error"]
    error: str | None
    """Why this sample is not part of the cache, in words."""

    def input(self, reads: Reads) -> str:
        """Digest of all that this sample's bytes in a layer depend on beside the recipe: the file and its placement."""
        source = self.conditioning_sha256 if reads == "conditioning_image" else self.sha256
        return digest([source, self.placement])


@dataclass(frozen=True)
class Caption:
    """One distinct caption; a row of `captions.parquet`. The empty one is always there."""

    id: str
    text: str

    @classmethod
    def of(cls, text: str) -> Caption:
        """The caption with this text; its id is the text's digest."""
        return cls(id=digest(text), text=text)


@dataclass(frozen=True)
class Field:
    """One tensor of a layer's members."""

    name: str
    dtype: str
    """A safetensors dtype in torch's words ("bfloat16"), or "as encoded" before the encoder's precision is known."""
    shape: str
    """Letters and numbers, e.g. "16 h w"."""
    meaning: str


@dataclass(frozen=True)
class Shard:
    """A finished shard as `layer.json` lists it."""

    name: str
    rows: int
    errors: int
    tar_bytes: int
    tar_checksum: str
    index_checksum: str


def canonical(value: Any) -> bytes:
    """The one JSON text of `value`: keys sorted, no white space, so that equal values have equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) of a layer's recipe: all that its bytes depend on, and nothing else."""
    return hashlib.sha256(canonical(recipe)).hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of any JSON value, shortened to 32 hex digits: ids of captions and inputs."""
    return hashlib.sha256(canonical(value)).hexdigest()[:32]


def layer_folder(name: str, layer_fingerprint: str) -> str:
    """`latents-1f3a9c02`: a layer's folder inside the cache."""
    return f"{name}-{layer_fingerprint[:8]}"


def checksum(data: bytes | memoryview) -> str:
    """XXH3-128 of `data`: guards against accidents (a flipped bit, a torn write), not against malice."""
    return xxhash.xxh3_128_hexdigest(data)


def file_checksum(path: Path) -> str:
    """XXH3-128 of a whole file, read in pieces."""
    running = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            running.update(piece)
    return running.hexdigest()


def shard_name(number: int) -> str:
    """`00007`: the stem of a shard's tar and index."""
    return f"{number:05d}"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with the checksum of its canonical JSON as the last key, so that the file vouches for itself."""
    return {**content, "checksum": checksum(canonical(content))}


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON file written from `seal`. Raises `CacheError` if it is missing, broken or altered."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing; run the same `make preprocess` again to mend the cache.") from error
    except ValueError as error:
        raise CacheError(
            f"{path} is damaged (not JSON: {error}); run the same `make preprocess` again to mend it."
        ) from error
    stated = content.pop("checksum", None) if isinstance(content, dict) else None
    if stated != checksum(canonical(content)):
        raise CacheError(
            f"{path} was altered: its checksum does not match its content. "
            "Run the same `make preprocess` again to mend it."
        )
    return content


def read_sealed_checksum(path: Path) -> str:
    """The checksum that a sealed JSON file states of itself."""
    return checksum(canonical(read_sealed(path)))


def write_table(path: Path, table: pa.Table) -> str:
    """Write a Parquet table whole or not at all; its checksum comes back."""
    with atomic.writing(path) as file:
        pq.write_table(table, file, compression="zstd")
    return file_checksum(path)


def samples_table(samples: Sequence[Sample]) -> pa.Table:
    """`samples.parquet` for these samples."""
    rows = [{**asdict(sample), "captions": list(sample.captions)} for sample in samples]
    return pa.Table.from_pylist(rows, schema=SAMPLES_TABLE)


def captions_table(captions: Sequence[Caption]) -> pa.Table:
    """`captions.parquet` for these captions."""
    return pa.Table.from_pylist([asdict(caption) for caption in captions], schema=CAPTIONS_TABLE)


def read_samples(path: Path) -> list[Sample]:
    """The rows of a `samples.parquet`."""
    return [Sample(**{**row, "captions": tuple(row["captions"])}) for row in read_table(path).to_pylist()]


def read_captions(path: Path) -> list[Caption]:
    """The rows of a `captions.parquet`."""
    return [Caption(**row) for row in read_table(path).to_pylist()]


def read_table(path: Path) -> pa.Table:
    """A Parquet table as a whole. Raises `CacheError` where it is missing or cannot be read."""
    try:
        return pq.read_table(path)
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing; run the same `make preprocess` again to mend the cache.") from error
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"{path} is damaged ({error}); run `make verify` to see what else is.") from error
