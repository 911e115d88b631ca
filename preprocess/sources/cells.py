"""One value of a Parquet file's column at a time, though it is read by row groups: what was decoded is kept a while.

A row group may be as large as its file. So it is decoded in slices of some megabytes, forwards; whoever asks for its
rows in about their order has it decoded once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any, Final

from preprocess.sources import remote

SLICE_BYTES: Final = 16 << 20
"""About so much is decoded at a time."""
_NUM_SLICES: Final = 4
"""Of each row group so many slices are kept: threads ask a little out of order."""
_NUM_ROW_GROUPS: Final = 4


def open_file(path: str) -> Any:
    """The `ParquetFile` at a path or URL: mapped where it is local, in blocks where it is remote; checksums of pages
    are compared where it has them. Raises `OSError` or pyarrow's `ArrowException` where it is none, `UserError` where a
    store does not answer."""
    import pyarrow.parquet

    options: dict[str, Any] = {"pre_buffer": False, "page_checksum_verification": True}
    if remote.is_remote(path):
        options |= {"source": remote.RemoteFile(path), "buffer_size": remote.BLOCK_BYTES}
    else:
        options |= {"source": path, "memory_map": True}
    return pyarrow.parquet.ParquetFile(**options)


def slice_rows(metadata: Any, row_group: int, columns: list[str]) -> int:
    """How many rows of these columns take about `SLICE_BYTES`. `metadata`: of the `ParquetFile`."""
    group = metadata.row_group(row_group)
    names = {name.split(".")[0] for name in columns}
    total = 0
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema.split(".")[0] in names:
            total += column.total_uncompressed_size
    return max(1, min(1024, group.num_rows * SLICE_BYTES // max(1, total)))


class _RowGroup:
    """One column of one row group, decoded forwards."""

    def __init__(self, path: str, row_group: int, column: str) -> None:
        self._path, self._row_group, self._column = path, row_group, column
        self._slices: deque[tuple[int, Any]] = deque(maxlen=_NUM_SLICES)
        self._batches: Iterator[Any] = iter(())
        self._next_row = 0
        self._restart()

    def _restart(self) -> None:
        file = open_file(self._path)
        rows = slice_rows(file.metadata, self._row_group, [self._column])
        self._batches = file.iter_batches(rows, row_groups=[self._row_group], columns=[self._column], use_threads=False)
        self._next_row = 0
        self._slices.clear()

    def value(self, row: int) -> bytes:
        if row < self._next_row and not any(first <= row for first, _ in self._slices):
            self._restart()
        while row >= self._next_row:
            batch = next(self._batches, None)
            if batch is None:
                raise OSError(0, f"it has no row {row} in row group {self._row_group}", self._path)
            column = batch.column(0)
            for field in self._column.split(".")[1:]:
                column = column.field(field)
            self._slices.append((self._next_row, column))
            self._next_row += len(column)
        first, column = next((first, column) for first, column in reversed(self._slices) if first <= row)
        value = column[row - first].as_py()
        if value is None:
            raise OSError(0, f"row {row} of row group {self._row_group} is empty", self._path)
        return value


_lock = threading.Lock()
_row_groups: OrderedDict[tuple[str, int, str], _RowGroup] = OrderedDict()


def forget(path: str) -> None:
    """Drop what was kept of a file: it may be another one now."""
    with _lock:
        for key in [key for key in _row_groups if key[0] == path]:
            del _row_groups[key]


def read(path: str, row_group: int, row: int, column: str) -> bytes:
    """The bytes of one cell. Raises `OSError` where there are none, `UserError` where a store does not answer.

    Threads take turns: what one has decoded, the next one finds.
    """
    import pyarrow

    key = (path, row_group, column)
    with _lock:
        group = _row_groups.pop(key, None)
        try:
            group = group or _RowGroup(*key)
            value = group.value(row)
        except (OSError, pyarrow.ArrowException) as error:
            if isinstance(error, OSError) and error.strerror:
                raise
            raise OSError(0, f"not a sound Parquet file: {str(error).splitlines()[0]}", path) from error
        _row_groups[key] = group
        while len(_row_groups) > _NUM_ROW_GROUPS:
            _row_groups.popitem(last=False)
    return value
