"""Where samples come from. The folder is the registry: a file with a `Source` in it is a kind of source.

A source is opened, which reads no image: what is broken about it as a whole stops the run at once. Then its records
are gone through, one for each image: what is broken about one image is that image's `Record.error` and stops nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preprocess.sources import containers, remote
from preprocess.sources.base import SPLITS, Part, Record, Source, SourceOptions, Split
from preprocess.sources.blobs import Blob, File
from shared.errors import UserError, nearest

__all__ = ["SPLITS", "Blob", "File", "Part", "Record", "Source", "SourceOptions", "Split", "open_source", "read"]

KINDS = ("folder", "huggingface", "parquet", "webdataset")


def open_source(data: str | Path, options: SourceOptions) -> Source:
    """The data set at `data`: a folder, or a file, pattern or URL of tars or Parquet files.

    Raises `UserError` where there is none, where it is not of the kind that `options` say, and where its columns are
    not told apart.
    """
    place = containers.local(str(data))
    kind = _kind_of(place) if options.kind == "auto" else options.kind
    if kind not in KINDS:
        raise UserError(f"source.kind is '{kind}': {nearest(kind, ('auto', *KINDS))}")
    module: Any = importlib.import_module(f"{__name__}.{kind}")
    source: Source = module.open_source(place, options)
    return source


def read(data: str | Path, options: SourceOptions) -> Iterator[Record]:
    """The records of the data set at `data`; raises `UserError` as `open_source`, in this very call."""
    return iter(open_source(data, options))


def _kind_of(data: str) -> str:
    """The kind of source at a path or URL, from its name and what lies in it. Nothing is opened."""
    if data.startswith("pipe:"):
        raise UserError(f"{data}: commands are not run; give the address of the files, as s3://... or https://...")
    if kind := containers.kind_of_name(data):
        return kind
    if remote.is_remote(data):
        return containers.kind_of_listing(data, remote.files_below(data))
    return containers.kind_of_folder(Path(data))
