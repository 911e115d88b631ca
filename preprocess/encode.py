"""How the rows of a layer are made: loaded by threads, encoded in batches, made into the bytes of their members."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save

from preprocess import geometry, images
from preprocess.images import ImageError
from shared.cache.reader import SAFETENSORS
from shared.cache.schema import Reads, Sample
from shared.errors import UserError
from shared.families.base import Encode, Tensors

Members = dict[str, bytes]
T = TypeVar("T")


class Item(Protocol):
    """What one row of a shard is made from."""

    @property
    def key(self) -> str:
        """Of the sample or caption."""

    def load(self) -> Any:
        """What the producer takes: pixels, uint8 (..., H, W, 3), or a text. Called by threads.

        Raises `ImageError` with the reason why there is nothing, `UserError` where the run cannot go on.
        """


@dataclass(frozen=True)
class Row:
    """What one row of a shard became: its members, or why it has none."""

    key: str
    members: Members | None
    error: str | None


Finish = Callable[[], Row]
"""The last step of a row, for threads: what came out of the encoder becomes bytes while the next batch is encoded."""

Draw = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""uint8 (B, H, W, 3) -> uint8 (B, R, H, W, 3)."""


@dataclass(frozen=True)
class Producer:
    """What makes the rows of a layer, loaded onto its device."""

    encode: Callable[[Sequence[Any]], Sequence[Any]]
    """A batch of what was loaded -> for each what `finish` takes. One call at a time."""
    finish: Callable[[str, Any], Row]
    """A key and what came of it -> its row. By any thread."""

    def batch(self, items: Sequence[Item], loaded: Sequence[Any]) -> list[Finish]:
        """Encode one batch: the last steps of its rows. Those that could not be loaded (`ImageError`) come first."""
        failed = [partial(Row, item.key, None, str(it)) for item, it in _pairs(items, loaded) if _lost(it)]
        sound = [(item.key, it) for item, it in _pairs(items, loaded) if not _lost(it)]
        encoded = self.encode([it for _, it in sound]) if sound else []
        return [*failed, *(partial(self.finish, key, one) for (key, _), one in zip(sound, encoded, strict=True))]


def _pairs(items: Sequence[Item], loaded: Sequence[Any]) -> Iterator[tuple[Item, Any]]:
    return zip(items, loaded, strict=True)


def _lost(loaded: Any) -> bool:
    return isinstance(loaded, ImageError)


def load(item: Item) -> Any:
    """What the item loads, or the `ImageError` that says why there is nothing: a row's reason, and no error."""
    try:
        return item.load()
    except ImageError as error:
        return error


def captions_producer(encode: Encode) -> Producer:
    """Captions -> embeddings."""
    return Producer(lambda texts: _rows_of(encode(list(texts)), len(texts)), tensors_row)


def images_producer(encode: Encode) -> Producer:
    """Placed images, or the drawings of each sample (all of one shape) -> latents."""
    return Producer(lambda pixels: _rows_of(encode(np.stack(pixels)), len(pixels)), tensors_row)


def drawings_producer(draw: Draw) -> Producer:
    """Placed images -> drawings as PNG, `0.png` to `R-1.png`: what the VAE is then given, and a person can look at."""
    return Producer(
        lambda pixels: list(draw(np.stack(pixels))),  # each (R, H, W, 3)
        lambda key, drawings: Row(key, _pngs(drawings), None),
    )


def _rows_of(tensors: Tensors, count: int) -> list[Tensors]:
    """A batch's tensors (B, ...) -> those of each row."""
    return [{name: tensor[i] for name, tensor in tensors.items()} for i in range(count)]


def tensors_row(key: str, tensors: Tensors) -> Row:
    """The row of a sample's tensors. A value that is not finite makes it an error."""
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        return Row(key, None, f"the encoder gave values that are not finite ({', '.join(bad)})")
    return Row(key, {SAFETENSORS: save({name: tensor.contiguous() for name, tensor in tensors.items()})}, None)


def _pngs(drawings: NDArray[np.uint8]) -> Members:
    members = {}
    for r, drawing in enumerate(drawings):
        grey = (drawing == drawing[..., :1]).all()
        buffer = io.BytesIO()
        Image.fromarray(drawing[..., 0] if grey else drawing).save(buffer, format="PNG", compress_level=6)
        members[f"{r}.png"] = buffer.getvalue()
    return members


def load_drawings(members: Sequence[bytes]) -> NDArray[np.uint8]:
    """The drawings of a sample, uint8 (R, H, W, 3), from their PNGs."""
    return np.stack([np.asarray(Image.open(io.BytesIO(member)).convert("RGB")) for member in members])


def load_placed(data: Path, sample: Sample, reads: Reads) -> NDArray[np.uint8]:
    """The pixels of a sample after its placement, uint8 (H, W, 3).

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
        content = (data / name).read_bytes()
    except OSError as error:
        raise UserError(
            f"{data / name} can no longer be read ({error.strerror}); run the same command again"
        ) from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{data / name} changed while it was being preprocessed; run the same command again")
    try:
        pixels = images.decode(content)
    except ImageError as error:
        raise ImageError(f"its conditioning image {name}: {error}" if conditioning else str(error)) from error
    return geometry.apply(pixels, geometry.Placement(**json.loads(sample.placement)))


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in pieces of `size`, the last one shorter."""
    for i in range(0, len(items), size):
        yield items[i : i + size]
