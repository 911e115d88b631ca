"""Read a cache: accepted for good when it is opened or refused in one sentence; then any sample, by key, in any order.

Tensors come straight out of the memory-mapped tar: a view of the file's pages, no copy, no parsing but of the
member's small header. Each member's checksum is verified the first time this process reads it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shared.cache import schema
from shared.cache.schema import CacheError, Caption, Field, Reads, Sample, Shard
from shared.errors import nearest

SAFETENSORS = "safetensors"
"""The member of a sample that holds its tensors."""

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
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
    """One layer of an opened cache. Holds its shards mapped; cheap to pass to threads, opened anew in processes."""

    def __init__(self, folder: Path, summary: LayerSummary, wanted: Mapping[str, str]) -> None:
        """`wanted` maps each key to the digest of its input; anything else in the shards is not looked at.

        Raises `CacheError` where a shard is missing or has another size, or a wanted sample is in no shard.
        """
        self.folder, self.summary = folder, summary
        self.errors: dict[str, str] = {}
        """Samples that have nothing in this layer, with the reason."""
        self._places: dict[str, dict[str, Place]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._verified: set[tuple[str, int]] = set()
        for shard in summary.shards:
            self._read_index(shard, wanted)
        absent = [key for key in wanted if key not in self._places and key not in self.errors]
        if absent:
            raise CacheError(
                f"layer '{summary.name}' has nothing for {len(absent)} of {len(wanted)} rows (first: {absent[0]}); "
                "run the same `make preprocess` again to complete it."
            )

    def _read_index(self, shard: Shard, wanted: Mapping[str, str]) -> None:
        index, tar = self.folder / f"{shard.name}.parquet", self.folder / f"{shard.name}.tar"
        if not index.is_file() or schema.file_checksum(index) != shard.index_checksum:
            raise CacheError(f"{index} is missing or was altered; run `make verify` for a list of what is damaged.")
        if not tar.is_file() or tar.stat().st_size != shard.tar_bytes:
            size = f"{tar.stat().st_size} bytes" if tar.is_file() else "missing"
            raise CacheError(
                f"{tar} is {size} but should have {shard.tar_bytes} bytes; remove it and run the same "
                "`make preprocess` again: only its samples are encoded again."
            )
        for row in schema.read_table(index).to_pylist():
            key = row["key"]
            if wanted.get(key) != row["input"]:
                continue  # a removed sample, or an earlier state of this one
            if row["status"] == "ok":
                place = Place(shard.name, row["offset"], row["length"], row["checksum"])
                self._places.setdefault(key, {})[row["member"]] = place
            else:
                self.errors[key] = row["error"]

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def members(self, key: str) -> Mapping[str, Place]:
        """Suffix to place of everything that is stored for this key."""
        return self._places[key]

    def read(self, key: str, member: str = SAFETENSORS) -> memoryview:
        """The bytes of a member, not copied. Raises `CacheError` if they are not the ones that were written."""
        place = self._places[key][member]
        view = memoryview(self._map(place.shard))[place.offset : place.offset + place.length]
        if (place.shard, place.offset) not in self._verified:
            if schema.checksum(view) != place.checksum:
                raise CacheError(
                    f"sample '{key}' of layer '{self.summary.name}' was altered on disk "
                    f"({self.folder / place.shard}.tar at byte {place.offset}); run `make verify` to see what else is, "
                    "remove the damaged shard, and run the same `make preprocess` again."
                )
            self._verified.add((place.shard, place.offset))
        return view

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors stored for this key, views of the mapped file: copy before writing to them."""
        return parse_safetensors(self.read(key))

    def _map(self, shard: str) -> mmap.mmap:
        if shard not in self._maps:
            with open(self.folder / f"{shard}.tar", "rb") as file:
                # Copy-on-write: torch wants writable memory; nothing that is written ever reaches the file.
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


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
        for name in (schema.SAMPLES, schema.CAPTIONS):
            stated = self.manifest[Path(name).stem]["checksum"]
            if not (path / name).is_file() or schema.file_checksum(path / name) != stated:
                raise CacheError(
                    f"{path / name} is missing or was altered; run the same `make preprocess` again to mend it."
                )
        self.samples = {sample.key: sample for sample in schema.read_samples(path / schema.SAMPLES)}
        self.captions = {caption.id: caption for caption in schema.read_captions(path / schema.CAPTIONS)}

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
            content["fingerprint"] != entry["fingerprint"]
            or schema.fingerprint(content["recipe"]) != entry["fingerprint"]
        ):
            raise CacheError(f"{path} is not the layer that {schema.MANIFEST} names; run `make preprocess` again.")
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
        """Open a layer for every sample (or caption) of this cache."""
        summary = self.summary(name)
        return Layer(self.path / summary.folder, summary, self.wanted(summary.reads))

    def wanted(self, reads: Reads) -> dict[str, str]:
        """Key to input digest of every row that a layer must have."""
        return wanted(reads, self.samples.values(), self.captions.values())


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
