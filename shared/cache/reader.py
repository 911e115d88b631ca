"""Read a cache: accepted for good when it is opened or refused in one sentence; then any sample, by key or by number.

Tensors come straight out of the memory-mapped tar: a view of the file's pages, no copy, no parsing but of the
member's small header. Each member's checksum is verified the first time this process reads it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from shared.cache import index, schema
from shared.cache.index import Place, Places, SampleIndex
from shared.cache.schema import CacheError, Caption, Field, Reads, Sample, Shard, Shards, wanted
from shared.cache.storage import Listed, RemoteOptions, Storage, open_storage
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


@dataclass(frozen=True)
class LayerSummary:
    """What `layer.json` says: enough to choose a layer without opening it."""

    name: str
    folder: str
    reads: Reads
    fingerprint: str
    recipe: Mapping[str, Any]
    fields: tuple[Field, ...]
    shards: Shards


_SIZES_ON_OPENING = 10_000
"""Of up to so many shards the sizes are compared when a layer is opened; of more, when each is first read: it would
take a second for each half million."""


class Layer:
    """One layer of an opened cache, its shards mapped when first read. Threads may share it; a process that is given
    one maps the shards anew."""

    def __init__(
        self, storage: Storage, summary: LayerSummary, places: Places, numbers: Callable[[], Mapping[str, int]]
    ) -> None:
        """`places` by number, `numbers` from key to number.

        Raises `CacheError` where a shard is missing or has another size (of a remote cache: when it is fetched), or a
        row is in no shard.
        """
        self.storage, self.folder = storage, storage.root / summary.folder
        self.summary, self.places, self._numbers = summary, places, numbers
        self._maps: dict[int, memoryview] = {}
        self._indexes: dict[int, dict[str, list[dict[str, Any]]]] = {}
        self._verified_drawings: set[tuple[int, str]] = set()
        self._lock = threading.Lock()
        self._drawings = any(field.name.endswith(".png") for field in summary.fields)
        if not storage.remote:
            self._check_tars()
        self.verified = np.zeros(len(places), np.bool_)
        """By number: whether this process has compared the row's first member with its checksum."""
        if places.num_absent:  # it is stated, since to look would bring every row into memory
            absent = int(np.flatnonzero(places.shard < 0)[0])
            first = next(key for key, number in numbers().items() if number == absent)
            raise CacheError(
                f"layer '{summary.name}' of {storage.url} has nothing for {places.num_absent} of {len(places)} rows "
                f"(first: {first}); {schema.MEND}"
            )

    def _check_tars(self) -> None:
        if not self.folder.is_dir():
            there: dict[str, int | None] = {}
        elif len(self.summary.shards) <= _SIZES_ON_OPENING:
            with os.scandir(self.folder) as entries:
                there = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".tar")}
        else:
            there = dict.fromkeys(os.listdir(self.folder))
        for tar, num_bytes in self.summary.shards.sizes:
            if tar not in there:
                raise CacheError(f"{self.folder / tar} is missing; {schema.MEND}")
            if there[tar] not in (num_bytes, None):
                raise _cut(self.folder / tar, there[tar], num_bytes)

    # By number: what training asks for with every sample

    def tar(self, shard: int) -> Listed:
        """The tar of a shard: its name in the cache, its size and checksum."""
        listed = self.summary.shards.numbered(shard)
        return Listed(f"{self.summary.folder}/{listed.name}.tar", listed.tar_bytes, listed.tar_checksum)

    def tar_path(self, shard: int) -> Path:
        """The tar of a shard on this machine; of a remote cache it is fetched unless it is here."""
        tar = self.tar(shard)
        return self.storage.fetch(tar.name, num_bytes=tar.num_bytes, checksum=tar.checksum)

    def read_row(self, number: int) -> memoryview:
        """The bytes of a row's first member, not copied. Raises `CacheError` if they are not the ones that were
        written, `KeyError` where the layer has nothing for the row."""
        if self.places.length[number] < 0:
            raise KeyError(number)
        place = self.places.place(number)
        view = self._map(int(self.places.shard[number]))[place.offset : place.offset + place.length]
        if not self.verified[number]:
            if schema.checksum(view) != place.checksum:
                raise self.altered(number)
            self.verified[number] = True
        return view

    def altered(self, number: int, place: Place | None = None) -> CacheError:
        """The refusal of a row whose bytes are not the ones that were written."""
        place = place or self.places.place(number)
        tar = f"{self.storage.url}/{self.summary.folder}/{place.shard}.tar"
        return _altered(tar, self.summary.name, self._key(number), place)

    def _key(self, number: int) -> str:
        return next(key for key, other in self._numbers().items() if other == number)

    @property
    def num_errors(self) -> int:
        """Rows that the layer has nothing for."""
        return int(np.count_nonzero(self.places.length < 0))

    # By key: for people, pictures and stage 1

    def __contains__(self, key: str) -> bool:
        number = self._numbers().get(key)
        return number is not None and bool(self.places.length[number] >= 0)

    @cached_property
    def errors(self) -> dict[str, str]:
        """Samples that have nothing in this layer, with the reason."""
        lost = set(np.flatnonzero(self.places.length < 0).tolist())
        keys = [key for key, number in self._numbers().items() if number in lost] if lost else []
        found = {}
        for key in keys:
            rows = self._index(int(self.places.shard[self._numbers()[key]])).get(key, [])
            found[key] = next((row["error"] for row in rows if row["status"] == "error"), "unknown")
        return found

    def members(self, key: str) -> dict[str, Place]:
        """Suffix to place of everything that is stored for this key. Raises `KeyError` where there is nothing."""
        number = self._numbers()[key]
        if self.places.length[number] < 0:
            raise KeyError(key)
        shard = int(self.places.shard[number])
        first = self.places.place(number)
        rows = [row for row in self._index(shard).get(key, []) if row["status"] == "ok"]
        # The key may be there with another input, an earlier state of the sample: its members lie elsewhere.
        begin = next(row["input"] for row in rows if row["offset"] == first.offset)
        name = schema.shard_name(shard)
        return {
            row["member"]: Place(name, row["offset"], row["length"], row["checksum"])
            for row in rows
            if row["input"] == begin
        }

    def read(self, key: str, member: str = SAFETENSORS) -> memoryview:
        """The bytes of a member, not copied. Raises `CacheError` if they are not the ones that were written."""
        number = self._numbers()[key]
        if member == SAFETENSORS and not self._drawings:
            return self.read_row(number)
        place = self.members(key)[member]
        view = self._map(int(self.places.shard[number]))[place.offset : place.offset + place.length]
        if (number, member) not in self._verified_drawings:
            if schema.checksum(view) != place.checksum:
                raise self.altered(number, place)
            self._verified_drawings.add((number, member))
        return view

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors stored for this key, views of the mapped file: copy before writing to them."""
        return parse_safetensors(self.read(key))

    def _index(self, shard: int) -> dict[str, list[dict[str, Any]]]:
        """Key to rows of a shard's Parquet index. One shard's is kept: keys are asked for in order."""
        with self._lock:
            if shard not in self._indexes:
                name = f"{self.summary.folder}/{schema.shard_name(shard)}.parquet"
                stated = self.summary.shards.numbered(shard).index_checksum
                by_key: dict[str, list[dict[str, Any]]] = {}
                for row in schema.read_table(self.storage.fetch(name, checksum=stated), stated).to_pylist():
                    by_key.setdefault(row["key"], []).append(row)
                self._indexes = {shard: by_key}
            return self._indexes[shard]

    def _map(self, shard: int) -> memoryview:
        found = self._maps.get(shard)
        tar = self.tar(shard)
        if found is None or not self.storage.holds(tar.name):
            for other in list(self._maps):  # a map keeps the space of a shard that was removed from the local disk
                if not self.storage.holds(self.tar(other).name):
                    self._maps.pop(other, None)
            with self.storage.using(tar) as path:
                if (num_bytes := path.stat().st_size) != tar.num_bytes:
                    raise _cut(path, num_bytes, tar.num_bytes)
                # torch's map and not Python's, which keeps a file open for each: thousands of shards would be too
                # many. Private: what were written to a tensor would not reach the file.
                mapped = torch.from_file(str(path), shared=False, size=tar.num_bytes, dtype=torch.uint8)
            self._maps[shard] = found = mapped.numpy().data
        return found

    def __getstate__(self) -> dict[str, Any]:
        numbers = dict(self._numbers())
        # Who maps the shards anew compares them anew: `make repair` may have written one again.
        unverified = {"verified": np.zeros_like(self.verified), "_verified_drawings": set()}
        return {**self.__dict__, **unverified, "_maps": {}, "_indexes": {}, "_lock": None, "_numbers": numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        numbers = state.pop("_numbers")
        self.__dict__.update(state, _lock=threading.Lock(), _numbers=lambda: numbers)


def _altered(tar: str, layer: str, key: str, place: Place) -> CacheError:
    return CacheError(
        f"sample '{key}' of layer '{layer}' was altered on disk ({tar} at byte {place.offset}); run `make verify` to "
        "see what else is, and `make repair` to encode again what is damaged."
    )


def read_member(storage: Storage, tar: Listed, layer: str, key: str, place: Place) -> bytes:
    """The bytes of one member of a shard's tar, whose place is known: for who has not opened the layer.

    Raises `CacheError` where they are not the ones that were written.
    """
    url = f"{storage.url}/{tar.name}"
    try:
        with storage.using(tar) as path, open(path, "rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
    except FileNotFoundError as error:
        raise CacheError(f"{url} is missing; {schema.MEND}") from error
    except OSError as error:
        raise CacheError(f"{url} cannot be read ({error.strerror}); {schema.MEND}") from error
    if schema.checksum(data) != place.checksum:
        raise _altered(url, layer, key, place)
    return data


def _cut(tar: Path, found: int | None, stated: int) -> CacheError:
    return CacheError(f"{tar} has {found} bytes instead of {stated}; {schema.MEND}")


def open_layer(
    storage: Storage, summary: LayerSummary, shards: Iterable[tuple[Shard, pa.Table]], wanted: Mapping[str, str]
) -> Layer:
    """A layer by its shards' own indexes, for rows `wanted` (key to input): what stage 1 reads before it publishes."""
    places = Places.find(((int(shard.name), table) for shard, table in shards), list(wanted), list(wanted.values()))
    numbers = {key: number for number, key in enumerate(wanted)}
    return Layer(storage, summary, places, lambda: numbers)


class Cache:
    """An opened cache: what it is, its samples and captions, and its layers."""

    def __init__(self, path: Path | str, remote: RemoteOptions | None = None) -> None:
        """Open the cache in a folder or at a URL, and check all that training looks things up in. Raises `CacheError`,
        one sentence, if it is unfit."""
        self.storage = open_storage(path, remote)
        self.path = self.storage.root
        """Of a remote cache: where its lists are mirrored."""
        self.url = self.storage.url
        """The cache as messages name it."""
        if not self.storage.remote and not self.path.is_dir():
            raise CacheError(f"no such cache: {path}. Make one: make preprocess DATA=... CACHE={path}")
        if self.storage.size(schema.MANIFEST) is None:
            raise CacheError(
                f"{path} is not a finished cache: it has no {schema.MANIFEST}. "
                f"Run (again) make preprocess DATA=... CACHE={path}; what is finished is kept."
            )
        self.manifest = schema.read_sealed(self.storage.fetch(schema.MANIFEST))
        if self.manifest.get("format") != schema.FORMAT:
            raise CacheError(f"{self.url}/{schema.MANIFEST} is not the manifest of an {schema.FORMAT}.")
        if (version := self.manifest.get("schema_version")) != schema.SCHEMA_VERSION:
            raise CacheError(
                f"{path} has cache schema version {version}, this code reads {schema.SCHEMA_VERSION}; "
                "use the version of Underdrawing that made it, or preprocess again into another folder."
            )
        self.index = SampleIndex(
            *(self._mapped(name, self.manifest[name]["index_checksum"]) for name in ("samples", "captions"))
        )
        """The samples and captions by number."""
        self._layers: dict[str, Layer] = {}
        self._wanted: dict[Reads, dict[str, str]] = {}

    def _mapped(self, what: str, checksum: str) -> pa.Table:
        return index.open_mapped(self.storage.fetch(index.name_of(what), checksum=checksum), checksum)

    @cached_property
    def samples(self) -> dict[str, Sample]:
        """Key to sample, those that could not be used too. Read when first asked for: an object for each."""
        stated = self.manifest["samples"]["checksum"]
        return {sample.key: sample for sample in schema.read_samples(self._list(schema.SAMPLES, stated), stated)}

    @property
    def class_images(self) -> list[Sample]:
        """The samples of class images; their source is a file of the cache itself."""
        return [] if self.index.prior is None else [sample for sample in self.samples.values() if sample.prior]

    @cached_property
    def captions(self) -> dict[str, Caption]:
        """Id to caption. Read when first asked for: an object for each."""
        stated = self.manifest["captions"]["checksum"]
        return {caption.id: caption for caption in schema.read_captions(self._list(schema.CAPTIONS, stated), stated)}

    def caption_texts(self, numbers: Sequence[int]) -> list[str]:
        """The captions with these numbers, read without making an object of every caption that there is."""
        ids = [self.index.caption_id(number) for number in numbers]
        path = self._list(schema.CAPTIONS, self.manifest["captions"]["checksum"])
        rows = pq.read_table(path, columns=["id", "text"], filters=pc.field("id").isin(ids)).to_pylist()
        texts = {row["id"]: row["text"] for row in rows}
        return [texts[id_] for id_ in ids]

    def _list(self, name: str, checksum: str) -> Path:
        return self.storage.fetch(name, checksum=checksum)

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
            raise CacheError(f"{self.url} has no layer '{name}': {nearest(name, self.layer_names)}")
        path = self.storage.fetch(f"{entry['folder']}/{schema.LAYER}")
        content, stated = schema.read_sealed_and_checksum(path)
        if stated != entry["checksum"] or schema.fingerprint(content["recipe"]) != entry["fingerprint"]:
            raise CacheError(f"{path} is not the one that {schema.MANIFEST} names; {schema.MEND}")
        return LayerSummary(
            name=name,
            folder=entry["folder"],
            reads=content["reads"],
            fingerprint=content["fingerprint"],
            recipe=content["recipe"],
            fields=tuple(Field(**field) for field in content["fields"]),
            shards=Shards(content["shards"]),
        )

    def layer(self, name: str) -> Layer:
        """A layer, opened for every sample (or caption) of this cache; once, however often it is asked for."""
        if name not in self._layers:
            summary = self.summary(name)
            places = Places.of(self._mapped(name, self.manifest["layers"][name]["index_checksum"]))
            numbers = self.index
            self._layers[name] = Layer(self.storage, summary, places, lambda: numbers.numbers(summary.reads))
        return self._layers[name]

    def wanted(self, reads: Reads) -> dict[str, str]:
        """Key to input digest of every row that a layer must have."""
        if reads not in self._wanted:
            self._wanted[reads] = wanted(reads, self.samples.values(), self.captions.values())
        return self._wanted[reads]


class Extent(NamedTuple):
    """Where a tensor is in a safetensors file: bytes `begin` to `end` (not included), counted from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def safetensors_layout(data: memoryview) -> dict[str, Extent]:
    """The tensors of a safetensors file held in memory (the format: 8 bytes, a JSON header, the tensors' bytes)."""
    header_bytes = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(bytes(data[8 : 8 + header_bytes]))
    start = 8 + header_bytes
    return {
        name: Extent(_DTYPES[entry["dtype"]], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def parse_safetensors(data: memoryview) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file held in memory, as views of it."""
    tensors = {}
    for name, (dtype, shape, begin, end) in safetensors_layout(data).items():
        if end == begin:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            flat = torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin)
            tensors[name] = flat.view(shape)
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


__all__ = [
    "SAFETENSORS", "Cache", "CacheError", "Caption", "Layer", "LayerSummary", "Place", "Places", "SampleIndex",
    "open_layer", "parse_safetensors", "read_member", "safetensors_layout", "usable", "wanted",
]  # fmt: skip
