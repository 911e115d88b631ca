"""Where the bytes of an image are: a file, a range of a larger file, a cell of a Parquet file. Read when asked for.

A blob is small and can be sent to another process; it holds no bytes and nothing open.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

from preprocess.images import refuse_large_file
from preprocess.sources import cells, remote


class Blob(Protocol):
    """Bytes that can be read, any number of times, by any thread."""

    def read(self) -> bytes:
        """All bytes. Raises `OSError` where they are missing or cut off, `UserError` where a store does not answer."""

    @property
    def where(self) -> str:
        """For a sentence: where the bytes are."""

    @property
    def place(self) -> list[Any]:
        """Where they are within their part of the source, as JSON."""

    def at_rest(self) -> Blob:
        """This blob without bytes that it may have in hand."""


@dataclass(frozen=True, slots=True)
class File:
    """A whole file of this machine."""

    folder: str
    name: str
    """Relative to the folder. Apart, since many files share one folder, and a record has the same name."""

    @property
    def where(self) -> str:
        """Its path."""
        return os.path.join(self.folder, self.name)

    @property
    def place(self) -> list[Any]:
        """Its name."""
        return [self.name]

    def at_rest(self) -> File:
        """Itself."""
        return self

    def read(self) -> bytes:
        """The file's bytes. Raises `ImageError` where it is too large to be an image."""
        with open(self.where, "rb") as file:
            refuse_large_file(os.fstat(file.fileno()).st_size)
            return file.read()


@dataclass(frozen=True, slots=True)
class Range:
    """Some of the bytes of a file: a member of a tar, a value in an Arrow file. The file may be remote."""

    path: str
    offset: int
    length: int

    @property
    def where(self) -> str:
        """The file and where in it."""
        return f"{self.path} at byte {self.offset}"

    @property
    def place(self) -> list[Any]:
        """Offset and length."""
        return [self.offset, self.length]

    def at_rest(self) -> Range:
        """Itself."""
        return self

    def read(self) -> bytes:
        """The bytes of the range. Raises `ImageError` where they are too many to be an image."""
        refuse_large_file(self.length)
        if remote.is_remote(self.path):
            return remote.fetch(self.path, self.offset, self.length)
        with open(self.path, "rb") as file:
            content = os.pread(file.fileno(), self.length, self.offset)
            while len(content) < self.length:  # one call reads 2 GiB at most
                more = os.pread(file.fileno(), self.length - len(content), self.offset + len(content))
                if not more:
                    raise OSError(0, f"{self.path} ends at byte {self.offset + len(content)}, within it", self.path)
                content += more
        return content


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of a Parquet file's column. The file may be remote."""

    path: str
    row_group: int
    row: int
    """Within the row group."""
    column: str
    """With dots where it is a field of a struct: `image.bytes`."""

    @property
    def where(self) -> str:
        """The file and where in it."""
        return f"{self.path}, row {self.row} of row group {self.row_group}, column {self.column}"

    @property
    def place(self) -> list[Any]:
        """Row group, row and column."""
        return [self.row_group, self.row, self.column]

    def at_rest(self) -> Cell:
        """Itself."""
        return self

    def read(self) -> bytes:
        """The value."""
        return cells.read(self.path, self.row_group, self.row, self.column)


@dataclass(frozen=True, slots=True)
class InHand:
    """A blob whose bytes passed by while its part was read, so that they are not fetched twice. Dropped with them."""

    blob: Blob
    content: bytes

    @property
    def where(self) -> str:
        """Where they came from."""
        return self.blob.where

    @property
    def place(self) -> list[Any]:
        """Of the blob."""
        return self.blob.place

    def at_rest(self) -> Blob:
        """The blob that reads them again."""
        return self.blob

    def read(self) -> bytes:
        """The bytes in hand."""
        return self.content


@dataclass(frozen=True, slots=True)
class Missing:
    """Where bytes should be and are not."""

    where: str
    reason: str

    @property
    def place(self) -> list[Any]:
        """Nowhere."""
        return []

    def at_rest(self) -> Missing:
        """Itself."""
        return self

    def read(self) -> bytes:
        """Raises `OSError` with the reason."""
        raise OSError(0, self.reason, self.where)
