"""Parquet files with the images' bytes in a column, as the hub's data sets are: here or at a URL, one or many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from preprocess.sources import cells, containers, tables
from preprocess.sources.base import Part, Source, SourceOptions, Split, splits_of
from preprocess.sources.blobs import Blob, Cell, InHand, Missing
from preprocess.sources.columns import Columns
from preprocess.sources.containers import Container
from preprocess.sources.tables import Slice, TablePart, Unread
from shared.errors import UserError


def open_source(data: str, options: SourceOptions) -> ParquetFiles:
    """The Parquet files that `data` means. Raises `UserError` where there are none, and where none can be read."""
    return ParquetFiles(data, containers.find(data, "parquet"), options)


class ParquetFiles(Source):
    """The rows of Parquet files, file by file."""

    conditioning_advice = "a column 'conditioning_image' of images"

    def __init__(self, data: str, found: Sequence[Container], options: SourceOptions) -> None:
        schema = _first_schema(data, found)
        chosen = tables.choose(schema, found[0].path, options)
        self.conditioned = chosen.conditioning is not None
        splits = splits_of([container.name for container in found])
        self._parts = [
            ParquetPart(container, split, chosen, schema, options)
            for container, split in zip(found, splits, strict=True)
        ]

    @property
    def parts(self) -> Sequence[Part]:
        """The files."""
        return self._parts


def _first_schema(data: str, found: Sequence[Container]) -> pa.Schema:
    """Of the first file that can be read."""
    problem = ""
    for container in found:
        try:
            schema = cells.open_file(container.path).schema_arrow
            tables.check_names(schema)
            return schema
        except tables.DAMAGED as error:
            problem = problem or f"{container.path}: {tables.line(error)}"
    raise UserError(f"none of the {len(found)} Parquet files of {data} can be read ({problem})")


class ParquetPart(TablePart):
    """One Parquet file."""

    def __init__(
        self, container: Container, split: Split | None, chosen: Columns, schema: pa.Schema, options: SourceOptions
    ) -> None:
        super().__init__(container.path, container.name, split, chosen, options)
        self.version = container.version
        self._schema = schema

    def blob(self, place: list[Any]) -> Blob:
        """The cell at a place of this file."""
        return Cell(self.path, *place) if place else Missing(self.path, "it was missing before")

    def slices(self) -> Iterator[Slice | Unread]:
        """Row group by row group, some megabytes at a time: the bytes that pass by are in hand."""
        cells.forget(self.path)
        try:
            file = cells.open_file(self.path)
            tables.check_names(file.schema_arrow)
        except tables.DAMAGED as error:
            yield Unread("", f"it is no whole Parquet file ({tables.line(error)})")
            return
        if unfit := self.unfit(file.schema_arrow):
            yield Unread("", unfit)
            return
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            try:
                yield from self._group(file, group, first)
            except tables.DAMAGED as error:
                yield Unread(f"row group {group}", f"row group {group} is damaged ({tables.line(error)})")
            first += rows

    def _group(self, file: Any, group: int, first: int) -> Iterator[Slice]:
        names = list(dict.fromkeys(self._chosen))
        size = cells.slice_rows(file.metadata, group, names)
        at = 0
        for batch in file.iter_batches(size, row_groups=[group], columns=names, use_threads=False):
            conditioning = self._chosen.conditioning
            yield Slice(
                first=first + at,
                batch=batch,
                images=self._blobs(batch, self._chosen.image, group, at),
                conditionings=None if conditioning is None else self._blobs(batch, conditioning, group, at),
            )
            at += len(batch)

    def _blobs(self, batch: pa.RecordBatch, name: str, group: int, at: int) -> list[Blob | None]:
        column = tables.bytes_of(batch.schema, name)
        assert column is not None
        return [
            None if content is None else InHand(Cell(self.path, group, at + i, column), content)
            for i, content in enumerate(tables.values(batch, column).to_pylist())
        ]
