"""Run one producer over one shard's worth of rows: images or captions in, members of the shard out, in batches."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save

from preprocess import geometry, images
from preprocess.images import ImageError
from preprocess.lookahead import mapped
from preprocess.sources import Blob
from shared.cache.reader import SAFETENSORS, Layer
from shared.cache.schema import Caption, Reads, Sample
from shared.errors import UserError
from shared.families.base import Encode, Tensors

Members = dict[str, bytes]


@dataclass(frozen=True)
class Row:
    """What one row of a shard became: its members, or why it has none."""

    key: str
    members: Members | None
    error: str | None


Produce = Callable[[Sequence[str]], Iterator[Row]]
"""Keys of one shard -> a row for each; the same keys in the same order give the same rows in the same order."""

Load = Callable[[str], NDArray[np.uint8]]
"""Key -> its pixels, uint8 (..., H, W, 3), or `ImageError` with the reason why there are none. Called by threads."""

Draw = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""uint8 (B, H, W, 3) -> uint8 (B, R, H, W, 3)."""


Keep = Callable[[str, Tensors], Tensors]
"""A key and what the encoder gave for it -> what of it is kept."""


def tensors_rows(keys: Sequence[str], tensors: Tensors, keep: Keep | None = None) -> Iterator[Row]:
    """Rows of a batch's tensors (B, ...). A row with a value that is not finite becomes an error."""
    for i, key in enumerate(keys):
        row = {name: tensor[i].contiguous() for name, tensor in tensors.items()}
        row = row if keep is None else keep(key, row)
        bad = [name for name, tensor in row.items() if not torch.isfinite(tensor).all()]
        if bad:
            yield Row(key, None, f"the encoder gave values that are not finite ({', '.join(bad)})")
        else:
            yield Row(key, {SAFETENSORS: save(row)}, None)


def captions_producer(captions: dict[str, Caption], encode: Encode, batch_size: int) -> Produce:
    """Captions -> embeddings."""

    def produce(keys: Sequence[str]) -> Iterator[Row]:
        for batch in batched(keys, batch_size):
            yield from tensors_rows(batch, encode([captions[key].text for key in batch]))

    return produce


def images_producer(load: Load, encode: Encode, batch_size: int, workers: int, keep: Keep | None = None) -> Produce:
    """Placed images (all of one shape) -> latents."""

    def produce(keys: Sequence[str]) -> Iterator[Row]:
        for loaded in _load_batches(load, keys, batch_size, workers):
            yield from loaded.failed
            if loaded.keys:
                yield from tensors_rows(loaded.keys, encode(np.stack(loaded.pixels)), keep)

    return produce


def drawings_producer(load: Load, draw: Draw, batch_size: int, workers: int) -> Produce:
    """Placed images -> drawings as PNG, `0.png` to `R-1.png`: what the VAE is then given, and a person can look at."""

    def drawn(keys: Sequence[str]) -> Iterator[Row | tuple[str, NDArray[np.uint8] | ImageError]]:
        for loaded in _load_batches(load, keys, batch_size, workers):
            yield from loaded.failed
            if loaded.keys:
                yield from zip(loaded.keys, draw_each(draw, np.stack(loaded.pixels)), strict=True)

    def finish(item: Row | tuple[str, NDArray[np.uint8] | ImageError]) -> Row:
        if isinstance(item, Row):
            return item
        key, drawings = item
        if isinstance(drawings, ImageError):
            return Row(key, None, str(drawings))
        return Row(key, _pngs(drawings), None)

    def produce(keys: Sequence[str]) -> Iterator[Row]:
        # While one batch is drawn, the PNGs of the one before are made.
        return mapped(finish, drawn(keys), workers, ahead=batch_size)

    return produce


def draw_each(draw: Draw, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8] | ImageError]:
    """Of each image (H, W, 3) of a batch its drawings (R, H, W, 3), or why it has none: one image's fault is not that
    of the others."""
    try:
        return list(draw(pixels))
    except ImageError as error:
        if len(pixels) == 1:
            return [error]
        return [drawings for image in pixels for drawings in draw_each(draw, image[None])]


@dataclass(frozen=True)
class _Loaded:
    """One batch after its images were read: those that could be, and a row for each that could not."""

    keys: list[str]
    pixels: list[NDArray[np.uint8]]
    failed: list[Row]


def _load_batches(load: Load, keys: Sequence[str], batch_size: int, workers: int) -> Iterator[_Loaded]:
    """Batches of `keys` in order. While the caller works on one, the next is read."""

    def attempt(key: str) -> NDArray[np.uint8] | Row:
        try:
            return load(key)
        except ImageError as error:
            return Row(key, None, str(error))

    results = mapped(attempt, keys, workers, ahead=batch_size + workers)
    for batch in batched(keys, batch_size):
        loaded = _Loaded([], [], [])
        for key, result in zip(batch, results, strict=False):  # `results` goes on in the next batch
            if isinstance(result, Row):
                loaded.failed.append(result)
            else:
                loaded.keys.append(key)
                loaded.pixels.append(result)
        yield loaded


def _pngs(drawings: NDArray[np.uint8]) -> Members:
    members = {}
    for r, drawing in enumerate(drawings):
        grey = (drawing == drawing[..., :1]).all()
        buffer = io.BytesIO()
        Image.fromarray(drawing[..., 0] if grey else drawing).save(buffer, format="PNG", compress_level=6)
        members[f"{r}.png"] = buffer.getvalue()
    return members


def load_drawings(drawings: Layer, key: str) -> NDArray[np.uint8]:
    """The drawings of a sample, uint8 (R, H, W, 3), in their order. Raises `ImageError` where there are none."""
    if key in drawings.errors:
        raise ImageError(drawings.errors[key])
    members = sorted(drawings.members(key), key=lambda member: int(member.split(".")[0]))
    pages = [Image.open(io.BytesIO(drawings.read(key, member))).convert("RGB") for member in members]
    return np.stack([np.asarray(page) for page in pages])


def load_placed(blobs: Mapping[str, Blob], sample: Sample, reads: Reads) -> NDArray[np.uint8]:
    """The pixels of a sample after its placement, uint8 (H, W, 3). `blobs`: where each source's bytes are.

    Raises `ImageError` where they cannot be had, `UserError` where the file has changed since it was planned: its cache
    entry would bear another image's hash.
    """
    conditioning = reads == "conditioning_image"
    name = sample.conditioning_source if conditioning else sample.source
    expected = sample.conditioning_sha256 if conditioning else sample.sha256
    if name is None:
        raise ImageError("it has no conditioning_image")
    if expected is None:
        raise ImageError(f"its conditioning image {name} cannot be read")
    assert sample.placement is not None
    try:
        content = blobs[name].read()
    except OSError as error:
        raise UserError(
            f"{blobs[name].where} can no longer be read ({error.strerror}); run the same command again"
        ) from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{blobs[name].where} changed while it was being preprocessed; run the same command again")
    try:
        with images.decoded(content) as pixels:
            return geometry.apply(pixels, geometry.Placement(**json.loads(sample.placement)))
    except ImageError as error:
        raise ImageError(f"its conditioning image {name}: {error}" if conditioning else str(error)) from error


def batched(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """`keys` in pieces of `size`, the last one shorter."""
    for i in range(0, len(keys), size):
        yield keys[i : i + size]
