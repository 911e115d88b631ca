"""Tables with the images' bytes in a column: what Parquet files and Arrow files have in common."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as types

from preprocess.sources import columns
from preprocess.sources.base import Part, Record, SourceOptions, Split, captions_of, or_missing
from preprocess.sources.blobs import Blob, File, Missing
from preprocess.sources.columns import Columns
from shared.errors import UserError

DAMAGED = (OSError, pa.ArrowException, UnicodeDecodeError)
"""What pyarrow raises where a file is not sound."""


@dataclass(frozen=True)
class Slice:
    """Some rows of a table."""

    first: int
    """The number of the first row within its file."""
    batch: pa.RecordBatch
    """With the columns that were chosen."""
    images: Sequence[Blob | None]
    """Where each row has bytes."""
    conditionings: Sequence[Blob | None] | None
    """None: there is no such column."""


@dataclass(frozen=True)
class Unread:
    """What of a table cannot be read."""

    what: str
    """Within the file: empty, or `row group 3`."""
    reason: str


class TablePart(Part):
    """One file of a table."""

    def __init__(self, path: str, name: str, split: Split | None, chosen: Columns, options: SourceOptions) -> None:
        self.path, self.name = path, name
        self._split, self._chosen, self._options = split, chosen, options

    @abstractmethod
    def slices(self) -> Iterator[Slice | Unread]:
        """The rows, in order."""

    def records(self) -> Iterator[Record]:
        """A record for each row, and one for each piece that cannot be read."""
        for piece in self.slices():
            if isinstance(piece, Slice):
                yield from self._records_of(piece)
            else:
                name, reason = f"{self.name} {piece.what}".rstrip(), f"{piece.reason}: rows are lost"
                yield Record(name, Missing(self.path, reason), (), (), None, None, self._split, reason)

    def unfit(self, schema: pa.Schema) -> str | None:
        """Why a file with this schema cannot be read as the others are; None where it can."""
        if missing := [name for name in self._chosen if name not in schema.names]:
            return f"it has no column '{missing[0]}', but {', '.join(schema.names)}"
        for name in (self._chosen.image, self._chosen.conditioning):
            if name is not None and bytes_of(schema, name) is None:
                return f"its column '{name}' is {schema.field(name).type}, not images' bytes"
        return None

    def _records_of(self, piece: Slice) -> Iterator[Record]:
        chosen, batch = self._chosen, piece.batch
        texts = [None] * len(batch) if chosen.caption is None else batch.column(chosen.caption).to_pylist()
        for i, text in enumerate(texts):
            name = f"{self.name}/{piece.first + i:08d}"
            captions: tuple[str, ...] = ()
            weights: tuple[float, ...] = ()
            try:
                found = captions_of(text, f"'{chosen.caption}'")
                none = (
                    "there is no column of captions" if chosen.caption is None else f"its '{chosen.caption}' is empty"
                )
                captions, weights, error = or_missing(found, none, self._options)
            except UserError as problem:
                error = str(problem)
            image = piece.images[i] or _elsewhere(batch, chosen.image, i, self.path)
            if isinstance(image, Missing):
                error = image.reason
            conditioning: Blob | None = None
            if piece.conditionings is not None and chosen.conditioning is not None:
                conditioning = piece.conditionings[i] or _elsewhere(batch, chosen.conditioning, i, self.path)
                if isinstance(conditioning, Missing):
                    conditioning = None
            yield Record(
                name=name,
                image=image,
                captions=captions,
                weights=weights,
                conditioning_name=None if conditioning is None else f"{name}.{chosen.conditioning}",
                conditioning=conditioning,
                split=self._split,
                error=error,
            )


def _elsewhere(batch: pa.RecordBatch, column: str, i: int, path: str) -> Blob:
    """The image of a row without bytes: a file of this machine, where the row names one."""
    value = batch.column(column)[i].as_py()
    named = value.get("path") if isinstance(value, dict) else None
    if named is None:
        return Missing(path, f"its '{column}' is empty")
    file = os.path.join(os.path.dirname(path), named)
    if not os.path.isfile(file):
        return Missing(path, f"its '{column}' holds no bytes, only the path {named}, which is not on this machine")
    return File(*os.path.split(file))


def choose(schema: pa.Schema, where: str, options: SourceOptions) -> Columns:
    """The columns of a table that are read. Raises `UserError` where images are in none of them."""
    held = [field.name for field in schema if bytes_of(schema, field.name) is not None]
    if not held:
        listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f"{where} has no column that holds images (binary, or a struct with bytes): {listed}")
    chosen = columns.choose(schema.names, where, options, held)
    for name in (chosen.image, chosen.conditioning):
        if name is not None and name not in held:
            raise UserError(f"{where}: column '{name}' is {schema.field(name).type}, not images' bytes; {held[0]} is")
    return chosen


def bytes_of(schema: pa.Schema, name: str) -> str | None:
    """The column of bytes itself: `image`, or `image.bytes` where the column is a struct; None where it holds none."""
    kind = schema.field(name).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{name}.bytes" if _is_bytes(kind.field("bytes").type) else None
    return name if _is_bytes(kind) else None


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def check_names(schema: pa.Schema) -> None:
    """Raises `UnicodeDecodeError` where a column's name is damaged, which pyarrow finds when it is asked for it."""
    for field in schema:
        assert isinstance(field.name, str)


def line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def values(batch: pa.RecordBatch, column: str) -> pa.Array:
    """The array of bytes of a column, dotted or not."""
    name, _, field = column.partition(".")
    array = batch.column(name)
    return array.field(field) if field else array
