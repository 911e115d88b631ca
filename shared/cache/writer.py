"""Write a cache: shards of a layer, each whole or absent; then the layer's list; then the manifest, last.

A shard is never changed once written. What is new or has changed goes into new shards of the same layer, so a
reader looks up (key, input): the same sample with other pixels is another input.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from shared import atomic
from shared.cache import index, schema
from shared.cache.schema import Caption, Field, Reads, Sample, Shard
from shared.cache.storage import LocalStorage, Storage


class _Summed(io.RawIOBase):
    """A write-only file that keeps the checksum and the number of the bytes that went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum, self.count = file, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.sum.update(data)
        self.count += len(data)
        return len(data)

    def tell(self) -> int:
        return self.count


class ShardWriter:
    """One shard: a WebDataset tar and its Parquet index. Both appear when the `with` block ends well, or neither
    counts.

    The index is renamed last: a tar without an index is an unfinished shard, and the next run writes it again. A full
    disk raises `UserError`.
    """

    def __init__(self, folder: Path, number: int, storage: Storage | None = None, *, again: bool = False) -> None:
        """`folder` is the layer's in the root of `storage`, which uploads what is finished where the cache is
        elsewhere; without one the folder is the place. `again`: in the place of a shard that is there, which stays
        until the new one is whole; only `repair` does so, where rows of it are damaged."""
        self.folder, self.name, self.again = folder, schema.shard_name(number), again
        self._storage = storage or LocalStorage(folder.parent)
        self._rows: list[dict[str, Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> ShardWriter:
        atomic.make_directory(self.folder)
        index = self.folder / f"{self.name}.parquet"
        if not self.again:
            finished = _finished(index, self._storage)
            assert finished is None, f"{index} is finished, and a finished shard is never changed"
            index.unlink(missing_ok=True)  # of a tar that is lost or cut off
        self._index = self._stack.enter_context(atomic.writing(index))  # entered first, so it is renamed last
        self._file = _Summed(self._stack.enter_context(atomic.writing(self.folder / f"{self.name}.tar")))
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, input_digest: str, members: Mapping[str, bytes]) -> None:
        """Append a sample's members, suffix to content: `{"safetensors": ...}` becomes `KEY.safetensors`."""
        assert members, f"{key} has nothing to store: a row with a reason belongs in its place"
        assert "." not in key, f"{key}: for WebDataset a key ends at the first dot"
        assert "/" not in key, f"{key}: for tar it would be a folder"
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")  # no time, owner or mode of this machine: same data, same bytes
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            self._row(key, input_digest, suffix, self._tar.offset - padded, len(data), schema.checksum(data))

    def add_error(self, key: str, input_digest: str, reason: str) -> None:
        """Record that this sample has nothing in this layer, and why."""
        self._row(key, input_digest, None, None, None, None, reason)

    def _row(
        self,
        key: str,
        input_digest: str,
        member: str | None,
        offset: int | None,
        length: int | None,
        check: str | None,
        error: str | None = None,
    ) -> None:
        self._rows.append(
            {
                "key": key,
                "input": input_digest,
                "member": member,
                "offset": offset,
                "length": length,
                "checksum": check,
                "status": "ok" if error is None else "error",
                "error": error,
            }
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._tar.close()
            table = pa.Table.from_pylist(self._rows, schema=schema.INDEX_TABLE).replace_schema_metadata(
                {_TAR_BYTES: str(self._file.count), _TAR_CHECKSUM: self._file.sum.hexdigest()}
            )
            self._index.write(schema.table_bytes(table))
            # Both are on the disk, which may be full by now, before the old index goes: beside the new tar it could
            # pass for that one's.
            for file in (self._file.file, self._index):
                file.flush()
                os.fsync(file.fileno())
            (self.folder / f"{self.name}.parquet").unlink(missing_ok=True)
        for ending in ("tar", "parquet"):
            self._storage.finished(f"{self.folder.name}/{self.name}.{ending}")


_TAR_BYTES, _TAR_CHECKSUM = "tar_bytes", "tar_checksum"


def stated_tar(index: pa.Table) -> tuple[int, str]:
    """What a shard's index says of its tar: bytes and checksum."""
    stated = {key.decode(): value.decode() for key, value in index.schema.metadata.items()}
    return int(stated[_TAR_BYTES]), stated[_TAR_CHECKSUM]


def finished_shards(folder: Path, storage: Storage | None = None) -> Iterator[tuple[Shard, pa.Table]]:
    """The finished shards of a layer's folder in order, each with its index: sound index, tar of the size it states.

    What is not so is passed over: it will be written again. What is in the tars is `verify`'s business. `storage` as
    for `ShardWriter`.
    """
    storage = storage or LocalStorage(folder.parent)
    for path in sorted(folder.glob("*.parquet")):
        if (finished := _finished(path, storage)) is not None:
            yield finished


def _finished(index: Path, storage: Storage) -> tuple[Shard, pa.Table] | None:
    try:
        table = schema.read_index(index)
    except schema.CacheError:
        return None  # a lost or damaged index makes an unfinished shard: its samples are encoded again
    tar_bytes, tar_checksum = stated_tar(table)
    if storage.size(f"{index.parent.name}/{index.stem}.tar") != tar_bytes:
        return None
    shard = Shard(
        name=index.stem,
        rows=len(set(table["key"].to_pylist())),
        errors=table["status"].to_pylist().count("error"),
        tar_bytes=tar_bytes,
        tar_checksum=tar_checksum,
        index_checksum=schema.file_checksum(index),
    )
    return shard, table


def finished_rows(folder: Path, storage: Storage | None = None, *, errors: bool = True) -> set[tuple[str, str]]:
    """Every (key, input) that the finished shards of this layer hold; with or without those that have an error."""
    rows: set[tuple[str, str]] = set()
    for _, table in finished_shards(folder, storage):
        rows.update(rows_of(table, errors=errors))
    return rows


def rows_of(table: pa.Table, *, errors: bool = True) -> Iterator[tuple[str, str]]:
    """Every (key, input) of a shard's index; with or without those that have an error."""
    columns = (table[name].to_pylist() for name in ("key", "input", "status"))
    return ((key, input_) for key, input_, status in zip(*columns, strict=True) if errors or status == "ok")


def is_finished(folder: Path, number: int, rows: Iterable[tuple[str, str]], storage: Storage | None = None) -> bool:
    """Whether this shard is finished and holds exactly these rows (key, input)."""
    finished = _finished(folder / f"{schema.shard_name(number)}.parquet", storage or LocalStorage(folder.parent))
    if finished is None:
        return False
    _, table = finished
    return set(zip(table["key"].to_pylist(), table["input"].to_pylist(), strict=True)) == set(rows)


def unused_numbers(folder: Path, storage: Storage | None = None) -> Iterator[int]:
    """Shard numbers that no finished shard has, ascending: the same work gets the same names after an interruption."""
    used = {shard.name for shard, _ in finished_shards(folder, storage)}
    return (number for number in range(10**9) if schema.shard_name(number) not in used)


def publish_layer(
    folder: Path,
    *,
    name: str,
    reads: Reads,
    recipe: Mapping[str, Any],
    fields: Sequence[Field],
    made_with: Mapping[str, str],
    storage: Storage | None = None,
    without: Container[str] = (),
) -> dict[str, Any]:
    """Write `layer.json`, the list of the folder's finished shards but for those named in `without`; what the manifest
    says of the layer comes back.

    Where the list is what it was, the file stays as it is: `made_with` are the versions that made its newest shard.
    """
    content = {
        "name": name,
        "reads": reads,
        "fingerprint": schema.fingerprint(recipe),
        "recipe": dict(recipe),
        "fields": [asdict(field) for field in fields],
        "shards": [asdict(shard) for shard, _ in finished_shards(folder, storage) if shard.name not in without],
    }
    path = folder / schema.LAYER
    if _listed(path) != schema.canonical(content):
        atomic.write_json(path, schema.seal({**content, "made_with": dict(made_with)}))
        if storage is not None:
            storage.finished(f"{folder.name}/{schema.LAYER}")
    return _entry(folder)


def publish_layer_again(folder: Path, storage: Storage | None = None, without: Container[str] = ()) -> dict[str, Any]:
    """Bring the list of shards of a published layer up to date, all else as it is. Raises `CacheError` where its
    `layer.json` is missing or damaged."""
    was = schema.read_sealed(folder / schema.LAYER)
    return publish_layer(
        folder, name=was["name"], reads=was["reads"], recipe=was["recipe"],
        fields=[Field(**field) for field in was["fields"]], made_with=was["made_with"], storage=storage,
        without=without,
    )  # fmt: skip


def _listed(path: Path) -> bytes | None:
    """What a `layer.json` says, but for the versions; None where there is none that is sound."""
    try:
        content = schema.read_sealed(path)
    except schema.CacheError:
        return None  # to be written again
    del content["made_with"]
    return schema.canonical(content)


def _entry(folder: Path) -> dict[str, Any]:
    content, checksum = schema.read_sealed_and_checksum(folder / schema.LAYER)
    return {"folder": folder.name, "fingerprint": content["fingerprint"], "checksum": checksum}


def publish(
    cache: Path,
    *,
    samples: Sequence[Sample],
    captions: Sequence[Caption],
    layers: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any] | None = None,
    storage: Storage | None = None,
    **facts: Any,
) -> None:
    """Write `options.json`, the tables, the indexes and last, in one rename, `cache.json`: from now on a reader sees
    the new cache. `captions` begin with the empty one. `layers` maps names to what `publish_layer` gave; `options` are
    what makes this cache again; `facts` go into the manifest as they are."""
    storage = storage or LocalStorage(cache)
    atomic.make_directory(cache / index.FOLDER)
    if options is not None:
        atomic.write_json(cache / schema.OPTIONS, schema.seal(options))
        storage.finished(schema.OPTIONS)

    def table(name: str, rows: pa.Table) -> str:
        checksum = schema.write_table(cache / name, rows)
        storage.finished(name)
        return checksum

    def mapped(what: str, rows: pa.Table) -> str:
        checksum = index.write(cache / index.name_of(what), rows)
        storage.finished(index.name_of(what))
        return checksum

    ordered = index.in_order(samples)
    tables = {
        "samples": {
            "rows": len(samples),
            "errors": sum(sample.status == "error" for sample in samples),
            "checksum": table(schema.SAMPLES, schema.samples_table(samples)),
            "index_checksum": mapped("samples", index.samples_table(ordered, captions)),
        },
        "captions": {
            "rows": len(captions),
            "checksum": table(schema.CAPTIONS, schema.captions_table(captions)),
            "index_checksum": mapped("captions", index.captions_table(captions)),
        },
    }
    entries = {}
    for name, entry in layers.items():
        places = _places(cache / entry["folder"], storage, ordered, captions)
        entries[name] = {**entry, "index_checksum": mapped(name, places.table())}
    head = {"format": schema.FORMAT, "schema_version": schema.SCHEMA_VERSION}
    storage.flush()
    atomic.write_json(cache / schema.MANIFEST, schema.seal({**head, **facts, "layers": entries, **tables}))
    storage.finished(schema.MANIFEST)
    storage.flush()
    listed = {index.name_of(name) for name in (*tables, *entries)}
    for name in storage.listing(f"{index.FOLDER}/"):
        if name not in listed:
            storage.remove(name)  # of a layer that the manifest no longer names: made again where it returns


def publish_layers_again(cache: Path, without: Mapping[str, Container[str]], storage: Storage | None = None) -> None:
    """Write the lists of these layers without some of their shards (layer to shard names), in which no row is wanted,
    and the manifest: nobody looks at those shards any more, and their files can go. Rows that are wanted are found
    where they were. Raises `CacheError` where the manifest or a list is damaged."""
    storage = storage or LocalStorage(cache)
    manifest = schema.read_sealed(cache / schema.MANIFEST)
    for name, shards in without.items():
        entry = manifest["layers"][name]
        entry |= publish_layer_again(cache / entry["folder"], storage, shards)
    atomic.write_json(cache / schema.MANIFEST, schema.seal(manifest))
    storage.finished(schema.MANIFEST)
    storage.flush()


def _places(folder: Path, storage: Storage, ordered: Sequence[Sample], captions: Sequence[Caption]) -> index.Places:
    """Where each row of a layer is."""
    rows = schema.wanted(schema.read_sealed(folder / schema.LAYER)["reads"], ordered, captions)
    shards = ((int(shard.name), table) for shard, table in finished_shards(folder, storage))
    return index.Places.find(shards, list(rows), list(rows.values()))


def bytes_on_disk(folder: Path) -> int:
    """Size of all files below `folder`."""
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())
