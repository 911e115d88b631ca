"""Running the preprocessing stage in tests: what a run said and made, and what lies on disk afterwards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from preprocess.config import PreprocessConfig
from preprocess.encode import load_placed
from preprocess.pipeline import preprocess
from preprocess.sources import File
from shared.cache.reader import Cache
from shared.cache.schema import Sample


@dataclass(frozen=True)
class Ran:
    """One run: its exit code, rows that were made for each layer, and what it printed."""

    code: int
    made: dict[str, int]
    kept: dict[str, int]
    out: str
    err: str


def ran(options: PreprocessConfig, capsys: pytest.CaptureFixture[str]) -> Ran:
    """Preprocess, and read the report that a user sees."""
    capsys.readouterr()
    code = preprocess(options)
    printed = capsys.readouterr()
    rows = re.findall(r"^(\w+)-[0-9a-f]{8} +(\d+) +(\d+) +(\d+) ", printed.out, flags=re.MULTILINE)
    assert all(int(total) == int(made) + int(kept) for _, total, made, kept in rows)
    return Ran(
        code,
        {name: int(made) for name, _, made, _ in rows},
        {name: int(kept) for name, _, _, kept in rows},
        printed.out,
        printed.err,
    )


def placed_image(folder: Path, sample: Sample) -> NDArray[np.uint8]:
    """The pixels of a sample as they were encoded, from the images' folder."""
    return load_placed(File(str(folder), sample.source), sample, "image")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its name relative to it; without the note of the options, which names the data's
    folder."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    found.pop("options.json", None)
    return found


def shards(folder: Path) -> dict[str, bytes]:
    """The files of `contents` that are never changed once written."""
    return {name: data for name, data in contents(folder).items() if re.search(r"/\d{5}\.(tar|parquet)$", name)}


def rows(cache: Path) -> dict[tuple[str, str], dict[str, bytes]]:
    """(layer, key) to the members of every row of the cache as a reader sees it."""
    opened = Cache(cache)
    found = {}
    for name in opened.layer_names:
        layer = opened.layer(name)
        for key in opened.wanted(layer.summary.reads):
            if key in layer:
                found[name, key] = {member: bytes(layer.read(key, member)) for member in layer.members(key)}
    return found
