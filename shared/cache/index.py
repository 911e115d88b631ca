"""What training looks rows up in: Arrow files that are memory-mapped, so that no row becomes a Python object.

`index/samples.arrow` gives every sound sample a number: its row, sorted by split, shape and key. `index/captions.arrow`
does so for distinct captions, the empty one being number 0. `index/LAYER.arrow` says where each number's tensors are.
A cache of ten million samples opens in about a second, and what a step costs does not depend on how many there are.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared import atomic
from shared.cache import schema
from shared.cache.schema import CacheError, Caption, Reads, Sample

FOLDER = "index"
_BUCKETS, _ABSENT = b"buckets", b"num_absent"

SAMPLES_INDEX = pa.schema([("key", pa.large_string()), ("image", pa.int32()), ("captions", pa.large_list(pa.int32()))])
"""Beside these, `caption_weights` (large_list of float32) where a sample's captions do not all weigh the same, and
`prior` (uint8, 1 or 0) where some sample is a class image."""
CAPTIONS_INDEX = pa.schema([("id", pa.binary(16))])
PLACES_INDEX = pa.schema(
    [("shard", pa.int32()), ("offset", pa.int64()), ("length", pa.int32()), ("checksum", pa.binary(16))]
)


def name_of(what: str) -> str:
    """Path inside the cache of the index of `samples`, `captions` or a layer (none is called so)."""
    return f"{FOLDER}/{what}.arrow"


@dataclass(frozen=True)
class Bucket:
    """Samples of one split and one shape: numbers `start` to `stop` (not included)."""

    split: Literal["train", "validation"]
    width: int
    """Pixels."""
    height: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Place(NamedTuple):
    """Where a member is: shard name, offset and length in its tar in bytes, checksum in hex."""

    shard: str
    offset: int
    length: int
    checksum: str


@dataclass(frozen=True)
class Places:
    """Where the first member of each row of a layer is, by number: arrays of one length N."""

    shard: NDArray[np.int32]
    """Number of the tar: 7 is 00007.tar. -1 where no shard has the row."""
    offset: NDArray[np.int64]
    """Of the member's first byte in the tar."""
    length: NDArray[np.int32]
    """Of the member in bytes; -1 where the layer has nothing for the row."""
    checksums: NDArray[np.uint8]
    """(N, 16): XXH3-128 of the member, big-endian as in hex."""
    num_absent: int = 0
    """Rows that no shard has."""

    def __len__(self) -> int:
        return len(self.shard)

    def place(self, number: int) -> Place:
        """The place of one row that has one."""
        return Place(
            schema.shard_name(int(self.shard[number])),
            int(self.offset[number]),
            int(self.length[number]),
            self.checksums[number].tobytes().hex(),
        )

    @classmethod
    def find(cls, shards: Iterable[tuple[int, pa.Table]], keys: Sequence[str], inputs: Sequence[str]) -> Places:
        """Look rows up by (key, input) in the indexes of shards (number, table). Of several the first counts, and one
        with tensors before one that says why there are none."""
        numbers, tables = [], []
        for number, table in shards:
            numbers.append(np.full(len(table), number, np.int32))
            tables.append(table.select(["key", "input", "offset", "length", "checksum"]).replace_schema_metadata())
        empty = schema.INDEX_TABLE.empty_table().select(["key", "input", "offset", "length", "checksum"])
        rows = pa.concat_tables([empty, *tables])
        shard = np.concatenate([np.empty(0, np.int32), *numbers])
        column = {name: rows[name].combine_chunks() for name in rows.schema.names}
        have = _joined(column["key"], column["input"])
        want = _joined(pa.array(keys, pa.string()), pa.array(inputs, pa.string()))
        sound = column["length"].is_valid()
        found = np.full(len(keys), -1, np.int64)
        for which in (sound, pc.invert(sound)):
            at = np.flatnonzero(which.to_numpy(zero_copy_only=False))
            place = pc.index_in(want, value_set=have.take(pa.array(at))).fill_null(-1).to_numpy(zero_copy_only=False)
            open_rows = (found < 0) & (place >= 0)
            found[open_rows] = at[place[open_rows]]
        there = found >= 0
        offset = column["offset"].fill_null(-1).to_numpy(zero_copy_only=False)
        length = column["length"].fill_null(-1).to_numpy(zero_copy_only=False)
        assert length.size == 0 or length.max() <= np.iinfo(np.int32).max, "a member is below 2 GiB"
        taken = found[there]
        places = cls(
            shard=np.full(len(keys), -1, np.int32),
            offset=np.full(len(keys), -1, np.int64),
            length=np.full(len(keys), -1, np.int32),
            checksums=np.zeros((len(keys), 16), np.uint8),
            num_absent=int(np.count_nonzero(~there)),
        )
        places.shard[there], places.offset[there] = shard[taken], offset[taken]
        places.length[there] = length[taken]
        hexes = column["checksum"].take(pa.array(taken)).fill_null("0" * 32)
        places.checksums[there] = np.frombuffer(bytes.fromhex("".join(hexes.to_pylist())), np.uint8).reshape(-1, 16)
        return places

    def table(self) -> pa.Table:
        """As it is written."""
        flat = np.ascontiguousarray(self.checksums).reshape(-1)
        checksums = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(self), [None, pa.py_buffer(flat)])
        table = pa.table([self.shard, self.offset, self.length, checksums], schema=PLACES_INDEX)
        return table.replace_schema_metadata({_ABSENT: str(self.num_absent)})

    @classmethod
    def of(cls, table: pa.Table) -> Places:
        """Views of a mapped table: nothing is copied."""
        return cls(
            shard=_view(table["shard"]),
            offset=_view(table["offset"]),
            length=_view(table["length"]),
            checksums=_fixed(table["checksum"], 16),
            num_absent=int(table.schema.metadata[_ABSENT]),
        )


class SampleIndex:
    """The sound samples and the captions of a cache, by number."""

    def __init__(self, samples: pa.Table, captions: pa.Table) -> None:
        """Tables as `samples_table` and `captions_table` make them, in memory or mapped."""
        self.buckets = [Bucket(**bucket) for bucket in json.loads(samples.schema.metadata[_BUCKETS])]
        """Sorted by split, height and width; together they hold every sample."""
        self.num_samples, self.num_captions = len(samples), len(captions)
        self._keys, self._ids = _one(samples["key"]), _one(captions["id"])
        self.images: NDArray[np.int32] = _view(samples["image"])
        """By sample: the number of the image that it is a variant of."""
        self.prior: NDArray[np.uint8] | None = None
        """By sample: 1 where it is a class image. None where there is none."""
        if "prior" in samples.schema.names:
            self.prior = _view(samples["prior"])
        listed = _one(samples["captions"])
        self._starts: NDArray[np.int64] = _view(listed.offsets)
        self._captions: NDArray[np.int32] = _view(listed.values)
        self._weights: NDArray[np.float32] | None = None
        if "caption_weights" in samples.schema.names:
            self._weights = _view(_one(samples["caption_weights"]).values)

    def key(self, number: int) -> str:
        """The key of a sample."""
        return self._keys[number].as_py()

    def caption_id(self, number: int) -> str:
        """The id of a caption."""
        return self._ids[number].as_py().hex()

    def captions(self, number: int) -> NDArray[np.int32]:
        """The numbers of a sample's captions."""
        return self._captions[self._starts[number] : self._starts[number + 1]]

    def caption_weights(self, number: int) -> NDArray[np.float32]:
        """How often each of a sample's captions is drawn, relative to its others."""
        if self._weights is None:
            return np.ones(self._starts[number + 1] - self._starts[number], np.float32)
        return self._weights[self._starts[number] : self._starts[number + 1]]

    @property
    def weighted(self) -> bool:
        """Whether any sample's captions differ in weight."""
        return self._weights is not None

    @property
    def all_captions(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Of all samples: where each one's captions begin (N + 1), and the captions' numbers one after the other."""
        return self._starts, self._captions

    @cached_property
    def sample_numbers(self) -> dict[str, int]:
        """Key to number. Made when first asked for: an object for each sample."""
        return {key: number for number, key in enumerate(self._keys.to_pylist())}

    @cached_property
    def caption_numbers(self) -> dict[str, int]:
        """Id to number. Made when first asked for: an object for each caption."""
        return {caption.hex(): number for number, caption in enumerate(self._ids.to_pylist())}

    def numbers(self, reads: Reads) -> Mapping[str, int]:
        """Key (or id) to number of the rows of a layer that is made from `reads`."""
        return self.caption_numbers if reads == "caption" else self.sample_numbers


def in_order(samples: Iterable[Sample]) -> list[Sample]:
    """The sound samples in the order of their numbers."""
    return sorted(
        (sample for sample in samples if sample.status == "ok"),
        key=lambda sample: (sample.split, sample.bucket_height, sample.bucket_width, sample.key),
    )


def samples_table(ordered: Sequence[Sample], captions: Sequence[Caption]) -> pa.Table:
    """`index/samples.arrow` of samples that are `in_order`."""
    numbers = {caption.id: number for number, caption in enumerate(captions)}
    images: dict[str, int] = {}
    buckets: list[Bucket] = []
    for i, sample in enumerate(ordered):
        assert sample.bucket_width is not None
        assert sample.bucket_height is not None
        images.setdefault(sample.source, len(images))
        shape = (sample.split, sample.bucket_width, sample.bucket_height)
        if buckets and (buckets[-1].split, buckets[-1].width, buckets[-1].height) == shape:
            buckets[-1] = Bucket(*shape, buckets[-1].start, i + 1)
        else:
            buckets.append(Bucket(*shape, i, i + 1))
    columns = {
        "key": pa.array([sample.key for sample in ordered], pa.large_string()),
        "image": pa.array([images[sample.source] for sample in ordered], pa.int32()),
        "captions": pa.array([[numbers[c] for c in s.captions] for s in ordered], pa.large_list(pa.int32())),
    }
    if any(sample.caption_weights for sample in ordered):
        weights = [list(sample.caption_weights or [1.0] * len(sample.captions)) for sample in ordered]
        columns["caption_weights"] = pa.array(weights, pa.large_list(pa.float32()))
    if any(sample.prior for sample in ordered):
        columns["prior"] = pa.array([int(sample.prior) for sample in ordered], pa.uint8())
    return with_buckets(pa.table(columns), buckets)


def with_buckets(samples: pa.Table, buckets: Sequence[Bucket]) -> pa.Table:
    """The table with its buckets in its metadata."""
    return samples.replace_schema_metadata({_BUCKETS: json.dumps([asdict(bucket) for bucket in buckets])})


def captions_table(captions: Sequence[Caption]) -> pa.Table:
    """`index/captions.arrow`."""
    assert captions[0].text == "", "the empty caption is number 0"
    return pa.table({"id": pa.array([bytes.fromhex(caption.id) for caption in captions], pa.binary(16))})


def write(path: Path, table: pa.Table) -> str:
    """Write an index whole or not at all, as one record batch; the file's checksum comes back."""
    with atomic.writing(path) as file, pa.ipc.new_file(file, table.schema) as sink:
        for batch in table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]:
            sink.write_batch(batch)
    return schema.file_checksum(path)


def open_mapped(path: Path, stated: str) -> pa.Table:
    """A written index, mapped. Raises `CacheError` where it is missing or does not have the checksum `stated` of it."""
    try:
        # Read in pieces and not through the map, whose pages would all count as this process's memory.
        if schema.file_checksum(path) != stated:
            raise CacheError(f"{path} was altered: it does not have the checksum that the cache states; {schema.MEND}")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows are asked for in random order: the pages around them would only fill the memory.
        mapped.madvise(mmap.MADV_RANDOM)
        return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing; {schema.MEND}") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read ({error.strerror}); {schema.MEND}") from error


def _joined(keys: pa.Array, inputs: pa.Array) -> pa.Array:
    large = pa.large_string()  # together they may be more than the 2 GiB that a plain string column can hold
    return pc.binary_join_element_wise(keys.cast(large), inputs.cast(large), pa.scalar("/", large))


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _view(column: pa.ChunkedArray | pa.Array) -> NDArray:
    array = _one(column) if isinstance(column, pa.ChunkedArray) else column
    return array.to_numpy(zero_copy_only=True)


def _fixed(column: pa.ChunkedArray, width: int) -> NDArray[np.uint8]:
    array = _one(column)
    data = np.frombuffer(array.buffers()[1], np.uint8) if len(array) else np.empty(0, np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)
