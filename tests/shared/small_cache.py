"""A cache in milliseconds: the writer's own steps over made-up samples, captions and tensors, without any model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save

from shared.cache import schema, writer
from shared.cache.reader import Cache, Layer, wanted
from shared.cache.schema import Caption, Field, Reads, Sample

LATENTS = (Field("mean", "bfloat16", "2 h w", "made up"), Field("std", "float32", "2 h w", "made up"))
EMBEDS = (Field("embeds", "float32", "L 3", "made up"),)
DRAWING = (Field("R.png", "uint8", "H W", "made up"),)

LAYERS: dict[str, tuple[Reads, tuple[Field, ...]]] = {
    "latents": ("image", LATENTS),
    "edges": ("image", DRAWING),
    "text": ("caption", EMBEDS),
}

BROKEN = "made up to fail"
"""A sample from this source has nothing in any layer."""


def sample(
    name: str, *captions: str, content: str = "", source: str = "", split: Literal["train", "validation"] = "train"
) -> Sample:
    """A sound sample of 16 x 16 pixels; another `content` is another image under the same key."""
    return Sample(
        key=name, source=source or f"{name}.png", sha256=hashlib.sha256(f"{name} {content}".encode()).hexdigest(),
        conditioning_source=None, conditioning_sha256=None, width=20, height=16, variant=0, placement='{"left": 2}',
        bucket_width=16, bucket_height=16, split=split, captions=tuple(Caption.of(text).id for text in captions),
        status="ok", error=None,
    )  # fmt: skip


SAMPLES = [sample(f"s{i}", f"number {i}", "a box") for i in range(5)]
CAPTIONS = [Caption.of(text) for text in ("", "a box", *(f"number {i}" for i in range(5)))]


def recipe(name: str) -> dict[str, object]:
    return {"layer": name, "encoder": "made up", "strength": 0.1}


def folder_of(cache: Path, name: str) -> Path:
    return cache / schema.layer_folder(name, schema.fingerprint(recipe(name)))


def tensors(name: str, key: str, input_digest: str) -> dict[str, torch.Tensor]:
    """What a layer holds for a row: a function of the layer, the row and its input alone."""
    seed = int(hashlib.sha256(f"{name} {key} {input_digest}".encode()).hexdigest()[:8], 16)
    random = torch.Generator().manual_seed(seed)
    if name == "text":
        return {"embeds": torch.randn(4, 3, generator=random)}
    return {
        "mean": torch.randn(2, 2, 2, generator=random).bfloat16(),
        "std": torch.rand(2, 2, 2, generator=random),
    }


def members(name: str, key: str, input_digest: str) -> dict[str, bytes]:
    if name == "edges":
        return {f"{r}.png": f"drawing {r} of {key} {input_digest}".encode() for r in range(2)}
    return {"safetensors": save(tensors(name, key, input_digest))}


def write_layer(
    cache: Path, name: str, samples: Sequence[Sample], captions: Sequence[Caption], shard_rows: int = 2
) -> None:
    """Make the rows that the layer lacks, as the preprocessing stage does."""
    folder, reads = folder_of(cache, name), LAYERS[name][0]
    inputs = wanted(reads, samples, captions)
    done = writer.finished_rows(folder)
    missing = [key for key, input_digest in inputs.items() if (key, input_digest) not in done]
    broken = {s.key for s in samples if s.source == BROKEN}
    numbers = writer.unused_numbers(folder)
    for i in range(0, len(missing), shard_rows):
        with writer.ShardWriter(folder, next(numbers)) as shard:
            for key in missing[i : i + shard_rows]:
                if key in broken:
                    shard.add_error(key, inputs[key], BROKEN)
                else:
                    shard.add(key, inputs[key], members(name, key, inputs[key]))


def publish(
    cache: Path,
    samples: Sequence[Sample] = SAMPLES,
    captions: Sequence[Caption] = CAPTIONS,
    layers: Sequence[str] = tuple(LAYERS),
    made_with: str = "1",
) -> None:
    entries = {
        name: writer.publish_layer(
            folder_of(cache, name), name=name, reads=LAYERS[name][0], recipe=recipe(name), fields=LAYERS[name][1],
            made_with={"made up": made_with},
        )
        for name in layers
    }  # fmt: skip
    writer.publish(
        cache, samples=samples, captions=captions, layers=entries, family="made up",
        model={"name": "made up", "revision": None}, condition="edges", conditions=["edges"],
    )  # fmt: skip


def make(
    cache: Path,
    samples: Sequence[Sample] = SAMPLES,
    captions: Sequence[Caption] = CAPTIONS,
    layers: Sequence[str] = tuple(LAYERS),
    shard_rows: int = 2,
) -> Path:
    """Make a cache, or bring one up to date."""
    for name in layers:
        write_layer(cache, name, samples, captions, shard_rows)
    publish(cache, samples, captions, layers)
    return cache


def content(cache: Path) -> dict[str, object]:
    """All that a reader finds in a cache: samples, captions, every member of every layer. Raises `CacheError`."""
    opened = Cache(cache)
    found: dict[str, object] = {"samples": opened.samples, "captions": opened.captions}
    for name in opened.layer_names:
        layer = opened.layer(name)
        for key in opened.wanted(layer.summary.reads):
            found[f"{name}/{key}"] = layer.errors.get(key) or everything_of(layer, key)
    return found


def everything_of(layer: Layer, key: str) -> dict[str, bytes]:
    return {member: bytes(layer.read(key, member)) for member in layer.members(key)}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file; the same call flips it back."""
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def flipped_everywhere(path: Path, step: int = 1) -> Iterator[int]:
    """Flip one bit at every `step`-th byte, one at a time, another bit each time; the file is mended between."""
    for number, position in enumerate(range(0, os.path.getsize(path), step)):
        flip(path, position, number % 8)
        yield position
        flip(path, position, number % 8)
