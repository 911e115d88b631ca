"""Mend a damaged cache as far as nothing has to be encoded: what is intact stays, what is not is dropped and named.

Who vouches for what: `cache.json` for itself, for the tables, the indexes and each `layer.json`; `layer.json` for each
shard's tar and index; a shard's index for each of its members. So the intact rows of a damaged tar are known and kept;
and where a shard's index is lost, a sound tar together with `index/LAYER.arrow` still says whose its members are. The
ordinary run then makes what was dropped and writes the lists anew.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shared.cache import index, schema, writer
from shared.cache.index import Places
from shared.cache.schema import CacheError, Shard
from shared.report import progress


@dataclass(frozen=True)
class Mended:
    """One damaged file, and what became of the rows that it held or listed."""

    file: str
    """Relative to the cache."""
    damage: str
    """What was wrong with it, in words."""
    num_kept: int = 0
    """Rows of its shard of which every byte is as it was written: they stay."""
    num_dropped: int = 0
    """Rows of its shard that the ordinary run makes again, where they are still wanted."""
    dropped: tuple[str, ...] = ()
    """Their keys, as far as anything still says them."""


@dataclass(frozen=True)
class _Row:
    key: str
    input: str
    members: Mapping[str, bytes]
    error: str | None = None


class _NothingLeftError(Exception):
    """No row of a shard is intact."""


def mend(cache: Path) -> list[Mended]:
    """Drop what is damaged in the shards of the cache at `cache`, and say what it was; nothing for a sound cache.

    Damaged lists are only named: the ordinary run writes them anew, and must follow in any case. A shard is rewritten
    under its own name and the old one stays until the new one is whole: stopped at any instant, at most one shard is
    lost, and made again. Raises `CacheError` where there is no cache or it is of another version, `UserError` on a full
    disk.
    """
    if not cache.is_dir():
        raise CacheError(f"no such cache: {cache}")
    try:
        manifest = schema.read_sealed(cache / schema.MANIFEST)
    except CacheError as error:
        mended, folders = [Mended(schema.MANIFEST, _reason(error))], _all_layers(cache)
        return mended + [each for folder in folders for each in _Layer(cache, folder, None).mend()]
    if (version := manifest.get("schema_version")) != schema.SCHEMA_VERSION:
        raise CacheError(
            f"{cache} has cache schema version {version}, this code reads {schema.SCHEMA_VERSION}; "
            "use the version of Underdrawing that made it, or preprocess again into another folder."
        )
    mended = [*_damaged_lists(cache, manifest), *_damaged_class_images(cache, manifest)]
    for entry in manifest["layers"].values():
        mended += _Layer(cache, cache / entry["folder"], manifest).mend()
    return mended


def _all_layers(cache: Path) -> list[Path]:
    return sorted({path.parent for end in ("tar", "parquet") for path in cache.glob(f"*/*.{end}")})


def _damaged_lists(cache: Path, manifest: Mapping[str, Any]) -> Iterator[Mended]:
    """The tables, indexes and lists of shards that are not as the manifest states."""
    stated = {index.name_of(name): entry["index_checksum"] for name, entry in manifest["layers"].items()}
    for name, table in (("samples", schema.SAMPLES), ("captions", schema.CAPTIONS)):
        stated[table] = manifest[name]["checksum"]
        stated[index.name_of(name)] = manifest[name]["index_checksum"]
    if (cache / schema.OPTIONS).exists() and (error := _broken(cache / schema.OPTIONS)) is not None:
        yield Mended(schema.OPTIONS, error)
    for file, checksum in sorted(stated.items()):
        if not (cache / file).is_file():
            yield Mended(file, "missing")
        elif schema.file_checksum(cache / file) != checksum:
            yield Mended(file, "altered")
    for entry in manifest["layers"].values():
        file = f"{entry['folder']}/{schema.LAYER}"
        try:
            if schema.read_sealed_and_checksum(cache / file)[1] != entry["checksum"]:
                yield Mended(file, f"not the one that {schema.MANIFEST} names")
        except CacheError as error:
            yield Mended(file, _reason(error))


def _damaged_class_images(cache: Path, manifest: Mapping[str, Any]) -> Iterator[Mended]:
    """Those that are not what was encoded: removed, for the ordinary run to paint again."""
    try:
        table = schema.read_table(cache / schema.SAMPLES, manifest["samples"]["checksum"])
    except CacheError:
        return  # of pictures that no table vouches for nothing is known
    if "prior" not in table.column_names:
        return
    rows = table.filter(table["prior"]).select(["source", "sha256"]).to_pylist()
    for source, sha256 in sorted({(row["source"], row["sha256"]) for row in rows}):
        file = cache / source
        if not file.is_file():
            yield Mended(source, "missing")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            file.unlink()
            yield Mended(source, "altered")


class _Layer:
    """The shards of one layer, each looked at in turn."""

    def __init__(self, cache: Path, folder: Path, manifest: Mapping[str, Any] | None) -> None:
        self.cache, self.folder, self.manifest = cache, folder, manifest
        self.listed: dict[str, Shard] = {}
        try:
            layer = schema.read_sealed(folder / schema.LAYER)
        except CacheError:
            return  # that is said where the lists are looked at; the shards' indexes vouch for themselves
        self.listed = {shard["name"]: Shard(**shard) for shard in layer["shards"]}

    def mend(self) -> Iterator[Mended]:
        """Look at every byte of every shard; rewrite the damaged ones."""
        names = sorted({path.stem for path in self.folder.glob("*.parquet")} | set(self.listed))
        for name in progress(names, title=f"check {self.folder.name}", unit="shard"):
            yield from self._mend_shard(name)

    def _mend_shard(self, name: str) -> Iterator[Mended]:
        tar, parquet = self.folder / f"{name}.tar", self.folder / f"{name}.parquet"
        listed = self.listed.get(name)
        try:
            table = schema.read_index(parquet, None if listed is None else listed.index_checksum)
        except CacheError as error:
            damage = _reason(error)
            if (own := _by_its_own_word(parquet)) is None:
                yield self._mend_without_index(name, damage)
                return
            table = own
            if _written_again(parquet, table):
                yield Mended(_name(parquet), damage, num_kept=_num_rows(table))
            elif listed is not None:  # newer than the list: whoever wrote it was stopped before writing that
                yield Mended(f"{self.folder.name}/{schema.LAYER}", f"lists an earlier {name}")
        if (tar_damage := _tar_damage(tar, *writer.stated_tar(table))) is not None:
            kept = self._rewrite(name, _intact_rows(table, tar) if tar.is_file() else ())
            dropped = [row for row in dict.fromkeys(_row_names(table)) if row not in kept]
            yield Mended(_name(tar), tar_damage, len(kept), len(dropped), tuple(key for key, _ in dropped))

    def _mend_without_index(self, name: str, damage: str) -> Mended:
        """A shard whose index is lost: what `index/LAYER.arrow` knows of a sound tar is kept."""
        tar, listed = self.folder / f"{name}.tar", self.listed.get(name)
        if listed is None:  # never finished, or nothing vouches for it
            (self.folder / f"{name}.parquet").unlink(missing_ok=True)
            return Mended(f"{self.folder.name}/{name}.parquet", damage)
        known: dict[int, tuple[str, str]] = {}
        sound = _tar_damage(tar, listed.tar_bytes, listed.tar_checksum) is None
        try:
            known = self._known_rows(int(name))
        except CacheError:
            sound = False  # said where the lists are looked at
        kept = self._rewrite(name, _known_members(tar, known) if sound else ())
        dropped = tuple(key for key, input_digest in known.values() if (key, input_digest) not in kept)
        return Mended(f"{self.folder.name}/{name}.parquet", damage, len(kept), listed.rows - len(kept), dropped)

    def _known_rows(self, shard: int) -> dict[int, tuple[str, str]]:
        """Where the first member of each wanted row of this shard begins in the tar, and its key and input. Raises
        `CacheError` where a list that says so is itself damaged."""
        if self.manifest is None:
            return {}
        reads = schema.read_sealed(self.folder / schema.LAYER)["reads"]
        name, entry = next(
            (name, entry) for name, entry in self.manifest["layers"].items() if entry["folder"] == self.folder.name
        )
        places = Places.of(index.open_mapped(self.cache / index.name_of(name), entry["index_checksum"]))
        samples = schema.read_samples(self.cache / schema.SAMPLES, self.manifest["samples"]["checksum"])
        captions = schema.read_captions(self.cache / schema.CAPTIONS, self.manifest["captions"]["checksum"])
        by_number = list(schema.wanted(reads, index.in_order(samples), captions).items())
        here = np.flatnonzero((places.shard == shard) & (places.length >= 0))
        return {int(places.offset[number]): by_number[number] for number in here}

    def _rewrite(self, name: str, rows: Iterable[_Row]) -> set[tuple[str, str]]:
        """Write a shard again with these rows alone, or remove it where there are none; their (key, input)."""
        kept = set()
        try:
            with writer.ShardWriter(self.folder, int(name), again=True) as shard:
                for row in rows:
                    if row.error is not None:
                        shard.add_error(row.key, row.input, row.error)
                    else:
                        shard.add(row.key, row.input, row.members)
                    kept.add((row.key, row.input))
                if not kept:
                    raise _NothingLeftError
        except _NothingLeftError:
            for end in (".parquet", ".tar"):  # in this order: a tar without an index is an unfinished shard
                (self.folder / f"{name}{end}").unlink(missing_ok=True)
        return kept


def _tar_damage(tar: Path, num_bytes: int, checksum: str) -> str | None:
    """What is wrong with a tar, in words; None where every byte is as stated."""
    if not tar.is_file():
        return "missing"
    if (size := tar.stat().st_size) != num_bytes:
        return f"{size} bytes instead of {num_bytes}"
    return None if schema.file_checksum(tar) == checksum else "altered"


def _intact_rows(table: pa.Table, tar: Path) -> Iterator[_Row]:
    """The rows of an index whose members all have their checksums, and those that never had members."""
    with open(tar, "rb") as file:
        for (key, input_digest), rows in groupby(table.to_pylist(), key=lambda row: (row["key"], row["input"])):
            members, intact, error = {}, True, None
            for row in rows:
                if row["status"] == "error":
                    error = row["error"]
                    continue
                file.seek(row["offset"])
                data = file.read(row["length"])
                intact = intact and schema.checksum(data) == row["checksum"]
                members[row["member"]] = data
            if intact:
                yield _Row(key, input_digest, members, error)


def _known_members(tar: Path, known: Mapping[int, tuple[str, str]]) -> Iterator[_Row]:
    """The rows of a sound tar that are `known` by where their first member begins."""
    with tarfile.open(tar, "r:") as archive:
        for key, group in groupby(archive, key=lambda info: info.name.split(".", 1)[0]):
            infos = list(group)
            found, input_digest = known.get(infos[0].offset_data, (None, ""))
            if found == key:
                yield _Row(key, input_digest, {info.name.split(".", 1)[1]: _content(archive, info) for info in infos})


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(info)
    assert file is not None
    return file.read()


def _by_its_own_word(parquet: Path) -> pa.Table | None:
    """An index whose rows have their own checksum, whatever the list says of the file."""
    try:
        return schema.read_index(parquet)
    except CacheError:
        return None


def _written_again(parquet: Path, table: pa.Table) -> bool:
    """Write an index as it would be written now; False where it is that already, and not damaged."""
    before = schema.file_checksum(parquet)
    return schema.write_table(parquet, table) != before


def _row_names(table: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(table["key"].to_pylist(), table["input"].to_pylist(), strict=True)


def _num_rows(table: pa.Table) -> int:
    return len(set(_row_names(table)))


def _broken(path: Path) -> str | None:
    """What is wrong with a JSON file that vouches for itself; None for a sound one."""
    try:
        schema.read_sealed(path)
    except CacheError as error:
        return _reason(error)
    return None


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _reason(error: CacheError) -> str:
    """The refusal's sentence without its advice."""
    return str(error).removesuffix(f"; {schema.MEND}")
