"""A Hugging Face data set as `save_to_disk` leaves it: Arrow files, mapped; one folder, or one for each split.

The bytes of an image lie in the Arrow file as they are, so that they are read by their place in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from preprocess.sources import remote, tables
from preprocess.sources.base import Part, Source, SourceOptions, splits_of
from preprocess.sources.blobs import Blob, Range
from preprocess.sources.tables import Slice, TablePart, Unread
from shared.errors import UserError

_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Ends an Arrow stream."""


def open_source(data: str, options: SourceOptions) -> SavedToDisk:
    """The data set that was saved into the folder `data`.

    Raises `UserError` where there is none, and where it has no column of images.
    """
    if remote.is_remote(data):
        raise UserError(f"{data}: a data set that was saved to disk is read where it is on this machine; copy it here")
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the folder that save_to_disk wrote")
    return SavedToDisk(folder, _arrow_files(folder), options)


class SavedToDisk(Source):
    """The rows of a data set, file by file, split by split."""

    conditioning_advice = "a column 'conditioning_image' of images"

    def __init__(self, folder: Path, names: Sequence[str], options: SourceOptions) -> None:
        schema = _first_schema(folder, names)
        chosen = tables.choose(schema, str(folder), options)
        self.conditioned = chosen.conditioning is not None
        self._parts = [
            ArrowPart(str(folder / name), name, split, chosen, options)
            for name, split in zip(names, splits_of(names), strict=True)
        ]

    @property
    def parts(self) -> Sequence[Part]:
        """The Arrow files."""
        return self._parts


def _arrow_files(folder: Path) -> list[str]:
    """The Arrow files of a saved data set or of each of its splits, relative to it, in order."""
    splits = _json(folder / "dataset_dict.json").get("splits", [""])
    names: list[str] = []
    for split in splits:
        state = _json(folder / split / "state.json")
        if state.get("_indices_data_files"):
            raise UserError(
                f"{folder / split} was saved by an old version of datasets, with a list of rows beside them; save it "
                "again: load_from_disk(...).flatten_indices().save_to_disk(...)"
            )
        files = [entry["filename"] for entry in state.get("_data_files", [])]
        files = files or sorted(path.name for path in (folder / split).glob("*.arrow"))
        names += [f"{split}/{file}" if split else file for file in files]
    if not names:
        raise UserError(f"{folder} holds no .arrow files; give the folder that save_to_disk wrote")
    return names


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where it is not there."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        assert isinstance(content, dict)
    except (ValueError, AssertionError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); save the data set again") from error
    return content


def _first_schema(folder: Path, names: Sequence[str]) -> pa.Schema:
    """Of the first file that can be read."""
    problem = ""
    for name in names:
        try:
            return _open(pa.memory_map(str(folder / name)).read_buffer()).schema
        except tables.DAMAGED as error:
            problem = problem or f"{name}: {tables.line(error)}"
    raise UserError(f"none of the {len(names)} Arrow files of {folder} can be read ({problem})")


def _open(content: pa.Buffer) -> Any:
    """The stream of batches; its columns' names are sound."""
    stream = pa.ipc.open_stream(content)
    tables.check_names(stream.schema)
    return stream


class ArrowPart(TablePart):
    """One Arrow file."""

    def slices(self) -> Iterator[Slice | Unread]:
        """Batch by batch, as they were written. No image is touched."""
        try:
            content = pa.memory_map(self.path).read_buffer()
            stream = _open(content)
            if unfit := self.unfit(stream.schema):
                yield Unread("", unfit)
                return
            first = 0
            for whole in stream:
                batch = whole.select(list(dict.fromkeys(self._chosen)))
                batch.validate(full=True)  # mapped memory is not to be trusted: a wrong offset would end the process
                conditioning = self._chosen.conditioning
                yield Slice(
                    first=first,
                    batch=batch,
                    images=self._blobs(batch, self._chosen.image, content),
                    conditionings=None if conditioning is None else self._blobs(batch, conditioning, content),
                )
                first += len(batch)
            if content.slice(max(0, content.size - len(_END))).to_pybytes() != _END:
                yield Unread("", f"it has no end mark and may be cut off after row {first - 1}")
        except tables.DAMAGED as error:
            yield Unread("", f"it is damaged or cut off ({tables.line(error)})")

    def _blobs(self, batch: pa.RecordBatch, name: str, content: pa.Buffer) -> list[Blob | None]:
        column = tables.bytes_of(batch.schema, name)
        assert column is not None
        array = tables.values(batch, column)
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        _, ends, data = array.buffers()
        if data is None:  # not one of them has bytes
            return [None] * len(array)
        start = data.address - content.address
        if not 0 <= start <= content.size - data.size:
            raise OSError(0, f"column {column} is compressed; save the data set again", self.path)
        kind = np.int64 if pa.types.is_large_binary(array.type) else np.int32
        offsets = np.frombuffer(ends, kind)[array.offset : array.offset + len(array) + 1]
        return [
            Range(self.path, start + int(offsets[i]), int(offsets[i + 1] - offsets[i])) if valid[i] else None
            for i in range(len(array))
        ]
