"""A folder of images, each with its captions: named by a metadata file, or in `.txt` files beside the images.

`metadata.jsonl`, `metadata.csv` or `metadata.parquet` stands in the folder, or in each of its split folders, as in the
hub's imagefolder layout; fill50k is read as it comes. Images are named here and opened later, one by one.
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preprocess.sources import columns, listing, remote
from preprocess.sources.base import (
    SPLITS,
    Part,
    Record,
    Source,
    SourceOptions,
    captions_of,
    or_missing,
    refuse_lone_surrogates,
    splits_of,
)
from preprocess.sources.blobs import File
from preprocess.sources.columns import Columns
from shared.errors import UserError

Row = tuple[int, Mapping[str, Any]]
"""The number of its line, and its values by column."""


def open_source(data: str, options: SourceOptions) -> Folder:
    """The folder `data`.

    Raises `UserError`: no such folder, not a folder, no images, no captions at all, malformed metadata (with the line),
    a path that leaves the folder, text that is not UTF-8.
    """
    if remote.is_remote(data):
        raise UserError(f"{data}: a folder of images is read on this machine only; copy it, or put it into tars")
    folder = Path(data)
    if not folder.exists():
        raise UserError(f"no such folder: {folder}; give the folder that holds the images")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder that holds the images and their captions")
    return Folder(folder, options)


class Folder(Source, Part):
    """The samples of a folder, sorted by name; the same files give the same records.

    Hidden files and folders (`.name`) are no samples; links to folders are followed.
    """

    name = "."
    conditioning_advice = "each line of metadata.jsonl a 'conditioning_image'"

    def __init__(self, data: Path, options: SourceOptions) -> None:
        self._data, self._options = data, options
        self._metadata = _metadata_files(data, options.metadata)
        if self._metadata:
            stands: dict[str, tuple[str, int]] = {}
            records = [record for file in self._metadata for record in _from_metadata(data, file, options, stands)]
        else:
            records = list(_from_text_files(data, options))
        self._records = _with_splits(sorted(records, key=lambda record: record.name))
        self._check()
        self.num_images = len(self._records)
        self.conditioned = any(record.conditioning is not None for record in self._records)

    @property
    def parts(self) -> Sequence[Part]:
        """The folder is one part."""
        return [self]

    def __iter__(self) -> Iterator[Record]:
        return self.records()

    def records(self) -> Iterator[Record]:
        """Its samples, by name."""
        return iter(self._records)

    def remarks(self) -> list[str]:
        """Images that the metadata do not name."""
        if not self._metadata or not (unmentioned := self._num_unmentioned()):
            return []
        names = " and ".join(self._metadata[:2])
        return [f"{unmentioned} image file(s) in {self._data} are not named by its {names}: they are no samples"]

    def _num_unmentioned(self) -> int:
        mentioned = {record.name for record in self._records}
        mentioned |= {record.conditioning_name for record in self._records if record.conditioning_name is not None}
        return sum(_has_image_ending(name) and name not in mentioned for name in listing.walk(self._data))

    def _check(self) -> None:
        """Refuse a folder of which nothing can be used."""
        data, records, files = self._data, self._records, self._metadata
        if not records and files:
            raise UserError(f"{data / files[0]} names no images; give each image a line with 'file_name' and 'text'")
        if not records:
            endings = ", ".join(sorted(listing.IMAGE_ENDINGS))
            raise UserError(
                f"no images in {data}; put some there ({endings}), in subfolders too, or a {listing.METADATA[0]}"
            )
        if files and not any(os.path.isfile(record.image.where) for record in records):
            raise UserError(
                f"{data} holds none of the {len(records)} images that its {files[0]} names, as '{records[0].name}'; "
                "'file_name' is relative to the metadata's folder"
            )
        if not any(record.captions for record in records):
            raise UserError(
                f"none of the {len(records)} images in {data} has a caption; put NAME.txt beside each NAME.png, or "
                f"write {listing.METADATA[0]} with 'file_name' and 'text', or give all of them one by source.caption, "
                "or set source.missing_caption=empty"
            )


# --- metadata: one row for each image ---


def _metadata_files(data: Path, named: str | None) -> list[str]:
    """The metadata files of a folder, relative to it: its own, else those of folders in it."""
    wanted = listing.METADATA if named is None else (named,)
    found = [name for name in wanted if (data / name).is_file()]
    if not found:
        found = sorted(name for name in listing.walk(data) if posixpath.basename(name) in wanted)
    if not found and named is None:
        found = [name for name in listing.FILL50K if _begins_with_a_file(data, name)]
    by_folder: dict[str, list[str]] = {}
    for name in found:
        by_folder.setdefault(posixpath.dirname(name), []).append(name)
    for names in by_folder.values():
        if len(names) > 1:
            raise UserError(f"{data} has {' and '.join(names)}; keep one, or say which with source.metadata")
    if named is not None and not found:
        raise UserError(f"{data} has no {named} (source.metadata)")
    return found


def _begins_with_a_file(data: Path, name: str) -> bool:
    """Whether there is such a file, of JSON lines, and the first one names a file in `data`. Other things may be called
    so, too."""
    if not (data / name).is_file():
        return False
    try:
        with open(data / name, encoding="utf-8-sig") as file:
            first = json.loads(file.readline())
    except (ValueError, RecursionError):
        return False
    values = first.values() if isinstance(first, dict) else ()
    return any(isinstance(value, str) and "\0" not in value and (data / value).is_file() for value in values)


def _from_metadata(
    data: Path, file: str, options: SourceOptions, stands: dict[str, tuple[str, int]]
) -> Iterator[Record]:
    """The records of one metadata file. `stands`: where each name was met, in all files so far."""
    path = data / file
    # The rows are gone through twice: which columns there are, only all lines of a metadata.jsonl tell.
    there = list(dict.fromkeys(key for _, row in _rows(path) for key in row))
    if not there:
        return
    chosen = columns.choose(there, str(path), options)
    folders = posixpath.dirname(file)
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        record = _from_row(row, where, chosen, data, folders, options)
        before, line = stands.setdefault(record.name, (file, number))
        if (before, line) != (file, number):
            raise UserError(
                f"{where}: {chosen.image} '{record.name}' is already on line {line}"
                f"{f' of {before}' if before != file else ''}; give an image one line and its captions as a list in "
                f"'{chosen.caption or 'text'}'"
            )
        yield record


def _from_row(
    row: Mapping[str, Any], where: str, chosen: Columns, data: Path, folders: str, options: SourceOptions
) -> Record:
    if row.get(chosen.image) is None:
        raise UserError(f"{where} has no '{chosen.image}'; name the image, relative to {data / folders}")
    name = _inside(row[chosen.image], chosen.image, where, folders)
    text = None if chosen.caption is None else row.get(chosen.caption)
    key = chosen.caption or "text"
    captions, weights, problem = or_missing(captions_of(text, f"{where}: '{key}'"), f"no '{key}' in {where}", options)
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: 'split' is {split!r}; use one of {', '.join(SPLITS)}, or leave it out")
    conditioning_name: str | None = None
    if chosen.conditioning is not None and row.get(chosen.conditioning) is not None:
        conditioning_name = _inside(row[chosen.conditioning], chosen.conditioning, where, folders)
    if not (data / name).is_file():
        problem = f"no such file (named by {where})"
    return Record(
        name=name,
        image=File(str(data), name),
        captions=captions,
        weights=weights,
        conditioning_name=conditioning_name,
        conditioning=None if conditioning_name is None else File(str(data), conditioning_name),
        split=split,
        error=problem,
    )


def _inside(name: Any, key: str, where: str, folders: str) -> str:
    """The path `name` of `key`, normalized, or a `UserError` where it is none that stays in the folder."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: '{key}' must be a path, but is {json.dumps(name, default=str)[:80]}")
    refuse_lone_surrogates(name, f"{where}: '{key}'")
    normal = posixpath.normpath(posixpath.join(folders, name))
    if normal.startswith("/") or normal in (".", "..") or normal.startswith("../"):
        raise UserError(f"{where}: '{key}' is '{name}', which is outside the folder; use a path relative to it")
    return normal


def _rows(path: Path) -> Iterator[Row]:
    """The rows of a metadata file, one at a time."""
    reader = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix.lower(), _json_rows)
    try:
        yield from reader(path)
    except OSError as error:
        listing.refuse_to_read(error)


def _json_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line = _decode(raw, where).strip()
            if not line:
                continue
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error}); write one JSON object per line") from error
            if not isinstance(content, dict):
                raise UserError(f"{where} is not an object; write one {{'file_name': ..., 'text': ...}} per line")
            yield number, content


def _csv_rows(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, line {reader.line_num} has not as many values as the first line has columns; put "
                        "quotes around texts with commas"
                    )
                yield reader.line_num, {name: value or None for name, value in row.items()}
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.reader.line_num} is not CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (after line {reader.reader.line_num}); save it as UTF-8") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(1024, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no sound Parquet file ({str(error).splitlines()[0]})") from error


# --- images with .txt beside them ---


def _from_text_files(data: Path, options: SourceOptions) -> Iterator[Record]:
    files = frozenset(listing.walk(data))
    for name in files:
        if not _has_image_ending(name):
            continue
        text = posixpath.splitext(name)[0] + ".txt"
        caption = _decode(_read_bytes(data / text), str(data / text)) if text in files else None
        why = f"no caption file {text}" if caption is None else f"its caption file {text} is blank"
        captions, weights, error = or_missing(captions_of(caption, str(data / text)), why, options)
        yield Record(name, File(str(data), name), captions, weights, None, None, None, error)


# --- what both ways share ---


def _with_splits(records: list[Record]) -> list[Record]:
    """The records with the split that their folders' names tell, where they do not say themselves."""
    splits = splits_of([posixpath.dirname(record.name) + "/" for record in records])
    return [
        record if split is None or record.split is not None else replace(record, split=split)
        for record, split in zip(records, splits, strict=True)
    ]


def _has_image_ending(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in listing.IMAGE_ENDINGS


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        listing.refuse_to_read(error)


def _decode(content: bytes, where: str) -> str:
    """UTF-8 with or without a byte order mark, which Windows editors put in front."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
