"""Run one producer over one shard's worth of rows: images or captions in, members of the shard out, in batches."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save

from preprocess import geometry, images
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
"""Keys of one shard -> their rows in the same order."""


def tensors_rows(keys: Sequence[str], tensors: Tensors) -> Iterator[Row]:
    """Rows of a batch's tensors (B, ...). A row with a value that is not finite becomes an error."""
    for i, key in enumerate(keys):
        row = {name: tensor[i].contiguous() for name, tensor in tensors.items()}
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


def images_producer(load: Callable[[str], NDArray[np.uint8]], encode: Encode, batch_size: int, workers: int) -> Produce:
    """Placed images (all of one shape) -> latents. `load` gives the pixels of a key, uint8 (..., H, W, 3)."""

    def produce(keys: Sequence[str]) -> Iterator[Row]:
        with ThreadPoolExecutor(workers) as pool:
            pixels = pool.map(load, keys)
            for batch in batched(keys, batch_size):
                yield from tensors_rows(batch, encode(np.stack([next(pixels) for _ in batch])))

    return produce


def drawings_producer(
    load: Callable[[str], NDArray[np.uint8]],
    draw: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    batch_size: int,
    workers: int,
) -> Produce:
    """Placed images -> drawings as PNG, `0.png` to `R-1.png`: what the VAE is then given, and a person can look at."""

    def produce(keys: Sequence[str]) -> Iterator[Row]:
        with ThreadPoolExecutor(workers) as pool:
            pixels = pool.map(load, keys)
            for batch in batched(keys, batch_size):
                drawn = draw(np.stack([next(pixels) for _ in batch]))  # (B, R, H, W, 3)
                for key, drawings in zip(batch, pool.map(_pngs, drawn), strict=True):
                    yield Row(key, drawings, None)

    return produce


def _pngs(drawings: NDArray[np.uint8]) -> Members:
    members = {}
    for r, drawing in enumerate(drawings):
        grey = (drawing == drawing[..., :1]).all()
        buffer = io.BytesIO()
        Image.fromarray(drawing[..., 0] if grey else drawing).save(buffer, format="PNG", compress_level=6)
        members[f"{r}.png"] = buffer.getvalue()
    return members


def load_drawings(drawings: Layer, key: str) -> NDArray[np.uint8]:
    """The drawings of a sample, uint8 (R, H, W, 3), finest last."""
    members = sorted(drawings.members(key), key=lambda member: int(member.split(".")[0]))
    pages = [Image.open(io.BytesIO(drawings.read(key, member))).convert("RGB") for member in members]
    return np.stack([np.asarray(page) for page in pages])


def load_placed(data: Path, sample: Sample, reads: Reads) -> NDArray[np.uint8]:
    """The pixels of a sample after its placement, uint8 (H, W, 3). Raises `UserError` where the file has changed since
    it was planned: its cache entry would bear another image's hash."""
    conditioning = reads == "conditioning_image"
    name = sample.conditioning_source if conditioning else sample.source
    expected = sample.conditioning_sha256 if conditioning else sample.sha256
    assert name is not None
    assert sample.placement is not None
    try:
        content = (data / name).read_bytes()
    except OSError as error:
        raise UserError(
            f"{data / name} can no longer be read ({error.strerror}); run the same command again"
        ) from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{data / name} changed while it was being preprocessed; run the same command again")
    return geometry.apply(images.decode(content), geometry.Placement(**json.loads(sample.placement)))


def batched(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """`keys` in pieces of `size`, the last one shorter."""
    for i in range(0, len(keys), size):
        yield keys[i : i + size]
