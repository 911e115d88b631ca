"""Read a cache: accepted for good when it is opened or refused in one sentence; then any sample, by key, in any order.

Tensors come straight out of the memory-mapped tar: a view of the file's pages, no copy, no parsing but of the
member's small header. Each member's checksum is verified the first time this process reads it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from shared.cache import schema
from shared.cache.schema import CacheError, Caption, Field, Reads, Sample, Shard
from shared.errors import nearest

SAFETENSORS = "safetensors"
"""The member of a sample that holds its tensors."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Place(NamedTuple):
    """Where a member is: shard name, offset and length in its tar in bytes, checksum."""

    shard: str
    offset: int
    length: int
    checksum: str


@dataclass(frozen=True)
class LayerSummary:
    """What `layer.json` says: enough to choose a layer without opening it."""

    name: str
    folder: str
    reads: Reads
    fingerprint: str
    recipe: Mapping[str, Any]
    fields: tuple[Field, ...]
    shards: tuple[Shard, ...]


class Layer:
    """One layer of an opened cache, its shards mapped when first read. Threads may share it; a process that is given
    one maps the shards anew."""

    def __init__(self, folder: Path, summary: LayerSummary, wanted: Mapping[str, str]) -> None:
        """`wanted` maps each key to the digest of its input; anything else in the shards is not looked at.

        Raises `CacheError` where a shard is missing or has another size, or a wanted sample is in no shard.
        """
        self.folder, self.summary = folder, summary
        # Indexes of a hundred thousand samples as Python objects would be hundreds of MB: the columns stay Arrow's,
        # and a key maps to the numbers of its rows.
        self._rows: dict[str, list[int] | None] = dict.fromkeys(wanted)
        self._starts: list[int] = []
        """The number of each shard's first row."""
        self._maps: dict[str, memoryview] = {}
        errors: dict[str, str] = {}
        columns = [schema.INDEX_TABLE.empty_table().select(_PLACE)]
        start = 0
        for shard in summary.shards:
            index = self._index(shard)
            self._starts.append(start)
            self._find(index, start, wanted, errors)
            columns.append(index.select(_PLACE).replace_schema_metadata())
            start += len(index)
        places = pa.concat_tables(columns)
        self._places = [places[name].combine_chunks() for name in _PLACE]
        self._verified = bytearray(start)
        """By row: 1 once this process has compared the member with its checksum."""
        self.errors = {key: reason for key, reason in errors.items() if self._rows[key] is None}
        """Samples that have nothing in this layer, with the reason."""
        absent = [key for key, rows in self._rows.items() if rows is None and key not in self.errors]
        if absent:
            raise CacheError(
                f"layer '{summary.name}' of {folder.parent} has nothing for {len(absent)} of {len(wanted)} rows "
                f"(first: {absent[0]}); {schema.MEND}"
            )

    def _index(self, shard: Shard) -> pa.Table:
        tar = self.folder / f"{shard.name}.tar"
        if not tar.is_file():
            raise CacheError(f"{tar} is missing; {schema.MEND}")
        if (size := tar.stat().st_size) != shard.tar_bytes:
            raise CacheError(f"{tar} has {size} bytes instead of {shard.tar_bytes}; {schema.MEND}")
        return schema.read_table(self.folder / f"{shard.name}.parquet", shard.index_checksum)

    def _find(self, index: pa.Table, start: int, wanted: Mapping[str, str], errors: dict[str, str]) -> None:
        columns = (index[name].to_pylist() for name in ("key", "input", "status", "error"))
        for row, (key, input_digest, status, error) in enumerate(zip(*columns, strict=True), start):
            if wanted.get(key) != input_digest:
                continue  # a removed sample, or an earlier state of this one
            if status == "error":
                errors[key] = error
            elif (rows := self._rows[key]) is None:
                self._rows[key] = [row]
            else:
                rows.append(row)

    def __contains__(self, key: str) -> bool:
        return self._rows.get(key) is not None

    def members(self, key: str) -> dict[str, Place]:
        """Suffix to place of everything that is stored for this key. Raises `KeyError` where there is nothing."""
        return {member: place for member, (_, place) in self._members(key).items()}

    def _members(self, key: str) -> dict[str, tuple[int, Place]]:
        rows = self._rows[key]
        if rows is None:
            raise KeyError(key)
        found = {}
        for row in rows:
            member, offset, length, checksum = (column[row].as_py() for column in self._places)
            shard = self.summary.shards[bisect_right(self._starts, row) - 1]
            found[member] = row, Place(shard.name, offset, length, checksum)
        return found

    def read(self, key: str, member: str = SAFETENSORS) -> memoryview:
        """The bytes of a member, not copied. Raises `CacheError` if they are not the ones that were written."""
        row, place = self._members(key)[member]
        view = self._map(place.shard)[place.offset : place.offset + place.length]
        if not self._verified[row]:
            if schema.checksum(view) != place.checksum:
                raise CacheError(
                    f"sample '{key}' of layer '{self.summary.name}' was altered on disk "
                    f"({self.folder / place.shard}.tar at byte {place.offset}); run `make verify` to see what else is, "
                    "remove the damaged .tar, and run the same `make preprocess` again."
                )
            self._verified[row] = 1
        return view

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors stored for this key, views of the mapped file: copy before writing to them."""
        return parse_safetensors(self.read(key))

    def _map(self, shard: str) -> memoryview:
        if shard not in self._maps:
            tar = self.folder / f"{shard}.tar"
            # torch's map and not Python's, which keeps a file open for each: thousands of shards would be too many.
            # Private: what were written to a tensor would not reach the file.
            mapped = torch.from_file(str(tar), shared=False, size=tar.stat().st_size, dtype=torch.uint8)
            self._maps[shard] = mapped.numpy().data
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


_PLACE = ["member", "offset", "length", "checksum"]


class Cache:
    """An opened cache: what it is, its samples and captions, and its layers."""

    def __init__(self, path: Path) -> None:
        """Open and check everything but the tensors' own bytes. Raises `CacheError`, one sentence, if it is unfit."""
        self.path = path
        if not path.is_dir():
            raise CacheError(f"no such cache: {path}. Make one: make preprocess DATA=... CACHE={path}")
        if not (path / schema.MANIFEST).is_file():
            raise CacheError(
                f"{path} is not a finished cache: it has no {schema.MANIFEST}. "
                f"Run (again) make preprocess DATA=... CACHE={path}; what is finished is kept."
            )
        self.manifest = schema.read_sealed(path / schema.MANIFEST)
        if self.manifest.get("format") != schema.FORMAT:
            raise CacheError(f"{path / schema.MANIFEST} is not the manifest of an {schema.FORMAT}.")
        if (version := self.manifest.get("schema_version")) != schema.SCHEMA_VERSION:
            raise CacheError(
                f"{path} has cache schema version {version}, this code reads {schema.SCHEMA_VERSION}; "
                "use the version of Underdrawing that made it, or preprocess again into another folder."
            )
        sums = {name: self.manifest[name]["checksum"] for name in ("samples", "captions")}
        self.samples = {s.key: s for s in schema.read_samples(path / schema.SAMPLES, sums["samples"])}
        self.captions = {c.id: c for c in schema.read_captions(path / schema.CAPTIONS, sums["captions"])}
        self._layers: dict[str, Layer] = {}
        self._wanted: dict[Reads, dict[str, str]] = {}

    @property
    def family(self) -> str:
        """The model family that the layers are for."""
        return self.manifest["family"]

    @property
    def conditions(self) -> list[str]:
        """The conditions that this cache holds."""
        return list(self.manifest["conditions"])

    @property
    def layer_names(self) -> list[str]:
        """The layers that are complete for the samples of this cache."""
        return list(self.manifest["layers"])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Layer to fingerprint: what a run records to say which cache it was trained on."""
        return {name: entry["fingerprint"] for name, entry in self.manifest["layers"].items()}

    def summary(self, name: str) -> LayerSummary:
        """What a layer is, from its `layer.json`. Raises `CacheError` where it is absent, altered or another's."""
        entry = self.manifest["layers"].get(name)
        if entry is None:
            raise CacheError(f"{self.path} has no layer '{name}': {nearest(name, self.layer_names)}")
        path = self.path / entry["folder"] / schema.LAYER
        content = schema.read_sealed(path)
        if (
            schema.checksum(schema.canonical(content)) != entry["checksum"]
            or schema.fingerprint(content["recipe"]) != entry["fingerprint"]
        ):
            raise CacheError(f"{path} is not the one that {schema.MANIFEST} names; {schema.MEND}")
        return LayerSummary(
            name=name,
            folder=entry["folder"],
            reads=content["reads"],
            fingerprint=content["fingerprint"],
            recipe=content["recipe"],
            fields=tuple(Field(**field) for field in content["fields"]),
            shards=tuple(Shard(**shard) for shard in content["shards"]),
        )

    def layer(self, name: str) -> Layer:
        """A layer, opened for every sample (or caption) of this cache; once, however often it is asked for."""
        if name not in self._layers:
            summary = self.summary(name)
            self._layers[name] = Layer(self.path / summary.folder, summary, self.wanted(summary.reads))
        return self._layers[name]

    def wanted(self, reads: Reads) -> dict[str, str]:
        """Key to input digest of every row that a layer must have."""
        if reads not in self._wanted:
            self._wanted[reads] = wanted(reads, self.samples.values(), self.captions.values())
        return self._wanted[reads]


def wanted(reads: Reads, samples: Iterable[Sample], captions: Iterable[Caption]) -> dict[str, str]:
    """Key to input digest of every row that a layer must have: all sound samples, or all captions."""
    if reads == "caption":
        return {caption.id: caption.id for caption in captions}
    return {sample.key: sample.input(reads) for sample in samples if sample.status == "ok"}


def parse_safetensors(data: memoryview) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file held in memory, as views of it (the format: 8 bytes, a JSON header, data)."""
    header_bytes = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(bytes(data[8 : 8 + header_bytes]))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        if end == begin:
            tensors[name] = torch.empty(entry["shape"], dtype=dtype)
        else:
            flat = torch.frombuffer(
                data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=8 + header_bytes + begin
            )
            tensors[name] = flat.view(entry["shape"])
    return tensors


def usable(samples: Iterable[Sample], layers: Iterable[Layer], caption_layers: Iterable[Layer]) -> list[Sample]:
    """The samples that every layer has tensors for, in the order given: their captions encoded too."""
    sample_layers, caption_layers = list(layers), list(caption_layers)
    return [
        sample
        for sample in samples
        if sample.status == "ok"
        and all(sample.key in layer for layer in sample_layers)
        and all(caption in layer for layer in caption_layers for caption in sample.captions)
    ]


__all__ = ["SAFETENSORS", "Cache", "CacheError", "Caption", "Layer", "LayerSummary", "parse_safetensors", "usable"]
