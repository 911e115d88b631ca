"""What a cache looks like on disk: names, versions, tables, fingerprints and checksums. `cache_schema.md` in code."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, overload

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shared import atomic
from shared.errors import UserError

FORMAT = "underdrawing cache"
SCHEMA_VERSION = 2
"""Raised by one whenever a reader of the old version would misread the new one."""

MANIFEST = "cache.json"
SAMPLES = "samples.parquet"
CAPTIONS = "captions.parquet"
LAYER = "layer.json"
SCAN = "scan"
"""A folder that no list names: preprocessing's own memory of the data set. It may be removed."""
OPTIONS = "options.json"
"""What preprocessing was run with last, but for the cache's own path: what `status` and `repair` go by."""

PRIOR = "prior"
"""The folder of class images is `prior-1f3a9c02`, and its `prior.json` says what they were painted by."""

MEND = "run the same `make preprocess` again to mend it, only what is damaged is made again."
"""The end of a refusal whose damage the preprocessing stage finds and mends by itself."""

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
        ("caption_weights", pa.list_(pa.float32())),
        ("prior", pa.bool_()),
    ]
)
"""`prior` is a column only where some sample is a class image."""
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


@dataclass(frozen=True, slots=True)
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
    caption_weights: tuple[float, ...] = ()
    """How often each caption is drawn, relative to the others; empty where all weigh the same."""
    prior: bool = False
    """Whether this is a class image: painted by the model itself, to be trained on beside the pictures."""

    def input(self, reads: Reads) -> str:
        """Digest of all that this sample's bytes in a layer depend on beside the recipe: the file and its placement."""
        source = self.conditioning_sha256 if reads == "conditioning_image" else self.sha256
        return digest([source, self.placement])


@dataclass(frozen=True, slots=True)
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


class Shards(Sequence[Shard]):
    """The shards of a layer as `layer.json` lists them: of a hundred thousand, objects are made for those asked for."""

    def __init__(self, listed: Sequence[Mapping[str, Any]]) -> None:
        self._listed = listed
        self._places = {int(shard["name"]): i for i, shard in enumerate(listed)}

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> Shards:
        """These shards."""
        return shards if isinstance(shards, cls) else cls([asdict(shard) for shard in shards])

    def __len__(self) -> int:
        return len(self._listed)

    @overload
    def __getitem__(self, i: int) -> Shard: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[Shard]: ...

    def __getitem__(self, i: int | slice) -> Shard | Sequence[Shard]:
        return Shard(**self._listed[i]) if isinstance(i, int) else Shards(self._listed[i])

    def numbered(self, number: int) -> Shard:
        """The shard of this number: 7 is 00007."""
        return self[self._places[number]]

    @property
    def sizes(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of each shard's tar."""
        return ((f"{shard['name']}.tar", shard["tar_bytes"]) for shard in self._listed)

    @property
    def errors(self) -> int:
        """Rows of them all that have an error."""
        return sum(shard["errors"] for shard in self._listed)


def wanted(reads: Reads, samples: Iterable[Sample], captions: Iterable[Caption]) -> dict[str, str]:
    """Key to input digest of every row that a layer must have: all sound samples, or all captions."""
    if reads == "caption":
        return {caption.id: caption.id for caption in captions}
    return {sample.key: sample.input(reads) for sample in samples if sample.status == "ok"}


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
    """`content` with the checksum of all that `atomic.write_json` writes above it as the last key, so that the file
    vouches for itself."""
    assert content, "there is nothing to vouch for"
    return {**content, "checksum": checksum(atomic.json_bytes(content)[: -len(_CLOSING)])}


_CLOSING = b"\n}\n"
_SEAL = re.compile(rb',\n  "checksum": "([0-9a-f]{32})"\n}\n')
_SEAL_BYTES = len(b',\n  "checksum": ""\n}\n') + 32


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON file written from `seal`, without its checksum. Raises `CacheError` if it is missing, broken or
    altered by as much as a space."""
    return read_sealed_and_checksum(path)[0]


def read_sealed_and_checksum(path: Path) -> tuple[dict[str, Any], str]:
    """`read_sealed`, and the checksum that the file states of itself."""
    data = _read_bytes(path)
    try:
        content = json.loads(data)
    except ValueError as error:
        raise CacheError(f"{path} is damaged (not JSON: {error}); {MEND}") from error
    sealed = _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if sealed is None or checksum(memoryview(data)[:-_SEAL_BYTES]) != sealed[1].decode():
        raise CacheError(f"{path} was altered: its checksum does not match its content; {MEND}")
    return content, content.pop("checksum")


def write_table(path: Path, table: pa.Table) -> str:
    """Write a Parquet table whole or not at all; the file's checksum comes back."""
    data = table_bytes(table)
    atomic.write_bytes(path, data)
    return checksum(data)


def table_bytes(table: pa.Table) -> memoryview:
    """A Parquet file of the table.

    The table's metadata are kept, and the checksum of the rows joins them: so the rows vouch for themselves where no
    list vouches for the file yet.
    """
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    table = table.replace_schema_metadata({**metadata, _ROWS_CHECKSUM: _rows_checksum(table, metadata)})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return memoryview(buffer.getvalue())


def read_table(path: Path, stated: str | None = None) -> pa.Table:
    """A Parquet table as a whole, where its bytes have the checksum `stated` of them, or without one where its rows
    have their own. Raises `CacheError` where it is missing, cannot be read or was altered."""
    data = _read_bytes(path)
    if stated is not None and checksum(data) != stated:
        raise CacheError(f"{path} was altered: it does not have the checksum that the cache states; {MEND}")
    try:
        # Without Arrow's threads: a process that ends soon after they were started may abort ("terminate called
        # without an active exception", one exit in five on two busy cores), and the tables are small.
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        own = metadata.pop(_ROWS_CHECKSUM, None)
        sound = stated is not None or own == _rows_checksum(table, metadata)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:  # TypeError: texts that have become bytes
        raise CacheError(f"{path} is damaged ({str(error).splitlines()[0]}); {MEND}") from error
    if not sound:
        raise CacheError(f"{path} was altered: its rows do not have their own checksum; {MEND}")
    return table.replace_schema_metadata(metadata)


def read_index(path: Path, stated: str | None = None) -> pa.Table:
    """The index of a shard, as `read_table`. Raises `CacheError` also where a column has another type: a flipped bit
    can make one of a column that holds nothing, and no row would differ."""
    table = read_table(path, stated)
    if not table.schema.equals(INDEX_TABLE, check_metadata=False):
        raise CacheError(f"{path} was altered: its columns are not those of an index; {MEND}")
    return table


_ROWS_CHECKSUM = "rows_checksum"


def _rows_checksum(table: pa.Table, metadata: Mapping[str, str]) -> str:
    return checksum(canonical([table.schema.names, dict(metadata), table.to_pydict()]))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing; {MEND}") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read ({error.strerror}); {MEND}") from error


def samples_table(samples: Sequence[Sample]) -> pa.Table:
    """`samples.parquet` for these samples."""
    table = _table(samples, SAMPLES_TABLE)
    return table if any(sample.prior for sample in samples) else table.drop_columns(["prior"])


def captions_table(captions: Sequence[Caption]) -> pa.Table:
    """`captions.parquet` for these captions."""
    return _table(captions, CAPTIONS_TABLE)


def _table(rows: Sequence[Sample] | Sequence[Caption], table_schema: pa.Schema) -> pa.Table:
    columns = [pa.array([getattr(row, field.name) for row in rows], type=field.type) for field in table_schema]
    return pa.Table.from_arrays(columns, schema=table_schema)


def read_samples(path: Path, stated: str | None = None) -> list[Sample]:
    """The rows of a `samples.parquet`. Raises `CacheError` as `read_table`."""
    table = read_table(path, stated)
    columns = {name: table[name].to_pylist() for name in SAMPLES_TABLE.names if name in table.column_names}
    columns.setdefault("prior", [False] * len(table))
    # Few placements for many samples, and captions that many share: one string of each in memory.
    once: dict[str, str] = {}
    columns["placement"] = [text and once.setdefault(text, text) for text in columns["placement"]]
    columns["captions"] = [tuple(once.setdefault(text, text) for text in texts) for texts in columns["captions"]]
    columns["caption_weights"] = [tuple(weights) for weights in columns["caption_weights"]]
    for name in ("split", "status"):
        columns[name] = [sys.intern(text) for text in columns[name]]
    return [Sample(*row) for row in zip(*columns.values(), strict=True)]


def read_captions(path: Path, stated: str | None = None) -> list[Caption]:
    """The rows of a `captions.parquet`. Raises `CacheError` as `read_table`."""
    table = read_table(path, stated)
    return [Caption(*row) for row in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)]
