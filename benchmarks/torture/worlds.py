"""What is tortured: small data sets with the options of their runs, and what an undisturbed run makes of each.

A world is made from a seed alone. It has a data set, a later state of it (a picture changed, one added, one removed, a
caption edited), the finished cache of each, and the cache of the later state that was made out of the earlier one.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.geometry import GeometryOptions
from shared import families
from shared.cache import schema
from shared.cache.reader import Cache, Layer
from shared.errors import UserError
from train.samples import CachedSamples

T = TypeVar("T")

SIZES = ((64, 64), (96, 48), (48, 96), (80, 64))
"""Width and height of the pictures, in pixels: they fall into several buckets."""
BLACK = "black.png"
"""A picture of nothing, which never changes."""
BATCHES = "batches of"
COLOURS = ("red", "green", "blue", "grey")

Rows = Mapping[tuple[str, str, str], str]
"""(layer, key, member) -> checksum of the member's bytes."""


@dataclass(frozen=True)
class Reference:
    """A cache that nothing disturbed."""

    path: Path
    files: Mapping[str, str]
    """Name relative to the cache -> checksum."""
    rows: Rows


@dataclass(frozen=True)
class World:
    """One journey that is disturbed: from the cache `start` (or from nothing) to the cache `end`."""

    name: str
    options: PreprocessConfig
    """Of the run; its `cache` is a new folder each time."""
    start: Reference | None
    end: Reference
    seconds: float
    """What the run takes undisturbed."""
    num_operations: int
    """The changes to the cache's files that it makes."""
    code: int
    """Its exit code: 3 where the data set has samples that cannot be used."""

    def begin(self, cache: Path) -> PreprocessConfig:
        """Lay the start out at `cache`, and give the options of the run there."""
        if self.start is not None:
            shutil.copytree(self.start.path, cache)
        return replace(self.options, cache=str(cache))


def options_of(data: Path, model: Path, dice: random.Random) -> PreprocessConfig:
    """Options of a small run: some shards for each layer, often two conditions."""
    return PreprocessConfig(
        data=str(data), cache="", model=str(model), condition=dice.choice([("canny",), ("canny", "precomputed")]),
        text_length=dice.choice([8, 24]), precision=dice.choice(["fp32", "bf16"]), device="cpu",
        validation_fraction=0.25,
        geometry=GeometryOptions(resolution=dice.choice([32, 64]), flip=dice.random() < 0.3),
        encode=EncodeOptions(image_batch=dice.randint(1, 4), text_batch=dice.randint(1, 4), workers=dice.randint(1, 3),
                             shard_rows=dice.randint(2, 5)),
    )  # fmt: skip


def write_data(folder: Path, dice: random.Random) -> None:
    """A few pictures of a box on a dark ground and a black one, drawings of most, a file that is no picture, and
    metadata.jsonl: one caption is shared by all."""
    folder.mkdir(parents=True)
    lines = [_write_picture(folder, f"{i:03d}", dice) for i in range(dice.randint(5, 8))]
    Image.new("RGB", SIZES[0]).save(folder / BLACK)
    lines.append({"file_name": BLACK, "text": "nothing"})  # and no drawing, which `precomputed` notes in its row
    if dice.random() < 0.5:
        (folder / "broken.png").write_bytes(b"no picture")
        lines.append({"file_name": "broken.png", "text": "broken"})
    _write_metadata(folder, lines)


def change_data(folder: Path, dice: random.Random) -> None:
    """What people do to a data set: a picture is drawn anew, one goes, one comes, a caption is edited."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    changed, removed, edited = dice.sample([i for i, line in enumerate(lines) if "conditioning_image" in line], 3)
    lines[changed] = {**_write_picture(folder, f"{changed:03d}", dice), "text": lines[changed]["text"]}
    lines[edited]["text"] = [f"edited {edited}", *lines[edited]["text"][1:]]
    (folder / lines[removed]["file_name"]).unlink()
    lines[removed] = _write_picture(folder, f"{len(lines):03d}", dice)
    _write_metadata(folder, lines)


def _write_picture(folder: Path, name: str, dice: random.Random) -> dict[str, Any]:
    width, height = dice.choice(SIZES)
    colours = np.random.default_rng(dice.getrandbits(32))
    picture = np.full((height, width, 3), colours.integers(0, 90, 3), np.uint8)
    left, top = dice.randint(4, width // 2), dice.randint(4, height // 2)
    box = np.s_[top : top + height // 3, left : left + width // 3]
    picture[box] = colours.integers(160, 255, 3)
    drawing = np.zeros((height, width), np.uint8)
    drawing[box] = 255
    Image.fromarray(picture).save(folder / f"{name}.png")
    (folder / "drawings").mkdir(exist_ok=True)
    Image.fromarray(drawing).save(folder / "drawings" / f"{name}.png")
    texts = [f"box {name} in {dice.choice(COLOURS)}", "a box"]
    return {"file_name": f"{name}.png", "conditioning_image": f"drawings/{name}.png", "text": texts}


def _write_metadata(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def files(folder: Path) -> dict[str, str]:
    """Every file below `folder`, by its name relative to it, with its checksum."""
    return {
        path.relative_to(folder).as_posix(): schema.file_checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(path: Path) -> tuple[dict[tuple[str, str, str], str], list[str]]:
    """What is found in a cache (tables, all layers by key and by number, training's batches of one), and the sentences
    in which the rest is refused. Whatever does come out has to be right."""
    found: dict[tuple[str, str, str], str] = {}
    refused: list[str] = []

    def attempt(reading: Callable[[], T]) -> T | None:
        try:
            return reading()
        except UserError as error:
            refused.append(str(error))
            return None

    def read_layer(layer: Layer, name: str, key: str, number: int) -> None:
        if (reason := attempt(lambda: layer.errors.get(key))) is not None:
            found[name, key, "error"] = reason
        if layer.places.length[number] < 0:
            return
        if (data := attempt(lambda: layer.read_row(number))) is not None:
            found[name, key, "by number"] = schema.checksum(data)
        for member in attempt(lambda: layer.members(key)) or ():
            if (data := attempt(lambda member=member: layer.read(key, member))) is not None:  # type: ignore[misc]
                found[name, key, member] = schema.checksum(data)

    def read_batches(samples: CachedSamples, condition: str) -> None:
        for i in range(len(samples)):
            if (batch := attempt(lambda i=i: samples.batch([i]))) is not None:  # type: ignore[misc]
                data = b"".join(tensor.numpy().tobytes() for tensor in _as_bytes(batch.tensors))
                found[f"{BATCHES} {condition}", batch.keys[0], samples.split] = schema.checksum(data)

    if (cache := attempt(lambda: Cache(path))) is None:
        return found, refused
    for sample in (attempt(lambda: cache.samples) or {}).values():
        found["samples", sample.key, ""] = repr(sample)
    for caption in (attempt(lambda: cache.captions) or {}).values():
        found["captions", caption.id, ""] = repr(caption)
    for name in cache.layer_names:
        if (layer := attempt(lambda name=name: cache.layer(name))) is not None:  # type: ignore[misc]
            for key, number in cache.index.numbers(layer.summary.reads).items():
                read_layer(layer, name, key, number)
    if cache.family not in families.names():
        return found, refused
    anew = Cache(path)  # so that training compares every row itself
    for condition, split in itertools.product(anew.conditions, ("train", "validation")):
        family = families.get(anew.family)
        if (samples := attempt(partial(CachedSamples, anew, family, condition, split))) is not None:
            read_batches(samples, condition)
    return found, refused


def _as_bytes(tensors: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    return (tensors[name].contiguous().view(torch.uint8) for name in sorted(tensors))


def reference(path: Path) -> Reference:
    """A cache as it must be; asserts that it is sound."""
    found, refused = read(path)
    assert not refused, refused
    return Reference(path, files(path), found)
