"""Write a cache: shards of a layer, each whole or absent; then the layer's list; then the manifest, last.

A shard is never changed once written. What is new or has changed goes into new shards of the same layer, so a
reader looks up (key, input): the same sample with other pixels is another input.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shared import atomic
from shared.cache import schema
from shared.cache.schema import Caption, Field, Reads, Sample, Shard


class _Summed(io.RawIOBase):
    """A write-only file that keeps the checksum and the number of the bytes that went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum, self.count = file, xxhash.xxh3_128(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.sum.update(data)
        self.count += len(data)
        return len(data)

    def tell(self) -> int:
        return self.count


class ShardWriter:
    """One shard: a WebDataset tar and its Parquet index. Both appear when the `with` block ends well, or neither counts.

    The index is renamed last: a tar without an index is an unfinished shard, and the next run writes it again.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.name = folder, schema.shard_name(number)
        self._rows: list[dict[str, Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = _Summed(self._stack.enter_context(atomic.writing(self.folder / f"{self.name}.tar")))
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]
        return self

    def add(self, key: str, input_digest: str, members: Mapping[str, bytes]) -> None:
        """Append a sample's members, suffix to content: `{"safetensors": ...}` becomes `KEY.safetensors`."""
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
        if kind is None:
            self._tar.close()
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            table = pa.Table.from_pylist(self._rows, schema=schema.INDEX_TABLE).replace_schema_metadata(
                {"tar_bytes": str(self._file.count), "tar_checksum": self._file.sum.hexdigest()}
            )
            schema.write_table(self.folder / f"{self.name}.parquet", table)


def finished_shards(folder: Path) -> Iterator[tuple[Shard, pa.Table]]:
    """The finished shards of a layer's folder in order, each with its index: tar and index there, sizes agreeing.

    What does not agree is passed over: it will be written again. Checksums are `verify`'s business.
    """
    for index in sorted(folder.glob("*.parquet")):
        tar = index.with_suffix(".tar")
        try:
            table = pq.read_table(index)
        except (pa.ArrowException, OSError):
            continue  # a damaged index makes an unfinished shard: its samples are encoded again
        stated = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if not tar.is_file() or "tar_bytes" not in stated or tar.stat().st_size != int(stated["tar_bytes"]):
            continue
        errors = [status == "error" for status in table["status"].to_pylist()]
        yield (
            Shard(
                name=index.stem,
                rows=len(set(table["key"].to_pylist())),
                errors=sum(errors),
                tar_bytes=int(stated["tar_bytes"]),
                tar_checksum=stated["tar_checksum"],
                index_checksum=schema.file_checksum(index),
            ),
            table,
        )


def finished_rows(folder: Path) -> set[tuple[str, str]]:
    """Every (key, input) that the finished shards of this layer hold, errors included."""
    rows: set[tuple[str, str]] = set()
    for _, table in finished_shards(folder):
        rows.update(zip(table["key"].to_pylist(), table["input"].to_pylist(), strict=True))
    return rows


def unused_numbers(folder: Path) -> Iterator[int]:
    """Shard numbers that no finished shard has, ascending: the same work gets the same names after an interruption."""
    used = {shard.name for shard, _ in finished_shards(folder)}
    return (number for number in range(10**9) if schema.shard_name(number) not in used)


def publish_layer(
    folder: Path,
    *,
    name: str,
    reads: Reads,
    recipe: Mapping[str, Any],
    fields: Sequence[Field],
    made_with: Mapping[str, str],
) -> str:
    """Write `layer.json`: the layer is complete. Its checksum comes back."""
    content = schema.seal(
        {
            "name": name,
            "reads": reads,
            "fingerprint": schema.fingerprint(recipe),
            "recipe": dict(recipe),
            "fields": [asdict(field) for field in fields],
            "shards": [asdict(shard) for shard, _ in finished_shards(folder)],
            "made_with": dict(made_with),
        }
    )
    path = folder / schema.LAYER
    if not path.exists() or _without_versions(path) != {k: v for k, v in content.items() if k not in _VERSIONS}:
        atomic.write_json(path, content)
    return schema.read_sealed_checksum(path)


_VERSIONS = ("made_with", "checksum")


def _without_versions(path: Path) -> dict[str, Any] | None:
    try:
        return {key: value for key, value in schema.read_sealed(path).items() if key not in _VERSIONS}
    except schema.CacheError:
        return None  # damaged: to be written again


def publish_tables(cache: Path, samples: Sequence[Sample], captions: Sequence[Caption]) -> dict[str, Any]:
    """Write `samples.parquet` and `captions.parquet`; what the manifest says of them comes back."""
    return {
        "samples": {
            "rows": len(samples),
            "errors": sum(sample.status == "error" for sample in samples),
            "checksum": schema.write_table(cache / schema.SAMPLES, schema.samples_table(samples)),
        },
        "captions": {
            "rows": len(captions),
            "checksum": schema.write_table(cache / schema.CAPTIONS, schema.captions_table(captions)),
        },
    }


def publish_manifest(cache: Path, content: Mapping[str, Any]) -> None:
    """Write `cache.json`, the last act of preprocessing: from now on a reader sees the new cache."""
    atomic.write_json(
        cache / schema.MANIFEST,
        schema.seal({"format": schema.FORMAT, "schema_version": schema.SCHEMA_VERSION, **content}),
    )


def bytes_on_disk(folder: Path) -> int:
    """Size of all files below `folder`."""
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())
