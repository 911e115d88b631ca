"""How the rows of a layer are made: loaded by threads, encoded in batches, made into the bytes of their members."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save

from preprocess import geometry, images
from preprocess.images import ImageError
from preprocess.sources import Blob
from shared.cache.reader import SAFETENSORS
from shared.cache.schema import Reads, Sample
from shared.cache.storage import Storage
from shared.errors import UserError
from shared.families.base import Encode, Tensors

Members = dict[str, bytes]
T = TypeVar("T")


class Item(Protocol):
    """What one row of a shard is made from."""

    @property
    def key(self) -> str:
        """Of the sample or caption."""

    @property
    def input(self) -> str:
        """Digest of what the row is made from."""

    def load(self, storage: Storage) -> Any:
        """What the producer takes: pixels, uint8 (..., H, W, 3), or a text. `storage`: the cache's. Called by threads.

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
    finish: Callable[[Item, Any], Row]
    """An item and what came of it -> its row. By any thread."""

    def batch(self, items: Sequence[Item], loaded: Sequence[Any], size: int) -> list[Finish]:
        """Encode one batch: the last steps of its rows. Those that could not be loaded (`ImageError`) come first.

        Where there are fewer than `size`, the last one fills it up: kernels round by the shape of a batch, and so a
        row's bytes do not depend on how many others were missing with it. What is repaired or added later is the row
        that a first run would have made.
        """
        pairs = list(zip(items, loaded, strict=True))
        sound = [(item, found) for item, found in pairs if not isinstance(found, ImageError)]
        lost = [partial(Row, item.key, None, str(found)) for item, found in pairs if isinstance(found, ImageError)]
        filled = [found for _, found in sound] + [found for _, found in sound[-1:]] * (size - len(sound))
        encoded = self.encode(filled)[: len(sound)] if sound else []
        return [*lost, *(partial(self.finish, item, one) for (item, _), one in zip(sound, encoded, strict=True))]


def load(storage: Storage, item: Item) -> Any:
    """What the item loads, or the `ImageError` that says why there is nothing: a row's reason, and no error."""
    try:
        return item.load(storage)
    except ImageError as error:
        return error


def captions_producer(encode: Encode) -> Producer:
    """Captions -> embeddings."""
    return Producer(lambda texts: _by_row(encode(list(texts)), len(texts)), tensors_row)


Keep = Callable[[Item, Tensors], Tensors]
"""What the encoder gave for an item -> what of it is kept."""


def images_producer(encode: Encode, keep: Keep | None = None) -> Producer:
    """Placed images, or the drawings of each sample (all of one shape) -> latents."""

    def finish(item: Item, tensors: Tensors) -> Row:
        return tensors_row(item, tensors if keep is None else keep(item, tensors))

    return Producer(lambda pixels: _by_row(encode(np.stack(pixels)), len(pixels)), finish)


def pixels_producer(field: str, channels: int) -> Producer:
    """The drawings of each sample, uint8 (R, H, W, 3), all of one shape -> one tensor, uint8 (R, C, H, W)."""

    def encode(drawings: Sequence[NDArray[np.uint8]]) -> list[Tensors]:
        pixels = np.stack(drawings)  # (B, R, H, W, 3)
        assert channels == 3 or (pixels == pixels[..., :1]).all(), "a condition that is grey has drawn colours"
        return _by_row({field: torch.from_numpy(pixels[..., :channels]).movedim(-1, 2)}, len(drawings))

    return Producer(encode, tensors_row)


def drawings_producer(draw: Draw) -> Producer:
    """Placed images -> drawings as PNG, `0.png` to `R-1.png`: what the VAE is then given, and a person can look at."""
    return Producer(lambda pixels: draw_each(draw, np.stack(pixels)), drawings_row)


def draw_each(draw: Draw, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8] | ImageError]:
    """Of each image (H, W, 3) of a batch its drawings (R, H, W, 3), or why it has none: one image's fault is not that
    of the others."""
    try:
        return list(draw(pixels))
    except ImageError as error:
        if len(pixels) == 1:
            return [error]
        return [drawings for image in pixels for drawings in draw_each(draw, image[None])]


def _by_row(tensors: Tensors, count: int) -> list[Tensors]:
    """A batch's tensors (B, ...) -> those of each row."""
    return [{name: tensor[i] for name, tensor in tensors.items()} for i in range(count)]


def tensors_row(item: Item, tensors: Tensors) -> Row:
    """The row of an item's tensors. A value that is not finite makes it an error."""
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        return Row(item.key, None, f"the encoder gave values that are not finite ({', '.join(bad)})")
    return Row(item.key, {SAFETENSORS: save({name: tensor.contiguous() for name, tensor in tensors.items()})}, None)


def drawings_row(item: Item, drawings: NDArray[np.uint8] | ImageError) -> Row:
    """The row of a sample's drawings (R, H, W, 3): a PNG of each, grey where it is grey."""
    if isinstance(drawings, ImageError):
        return Row(item.key, None, str(drawings))
    members = {}
    for r, drawing in enumerate(drawings):
        grey = (drawing == drawing[..., :1]).all()
        buffer = io.BytesIO()
        Image.fromarray(drawing[..., 0] if grey else drawing).save(buffer, format="PNG", compress_level=6)
        members[f"{r}.png"] = buffer.getvalue()
    return Row(item.key, members, None)


def load_drawings(members: Sequence[bytes]) -> NDArray[np.uint8]:
    """The drawings of a sample, uint8 (R, H, W, 3), from their PNGs."""
    return np.stack([np.asarray(Image.open(io.BytesIO(member)).convert("RGB")) for member in members])


def load_placed(blob: Blob | None, sample: Sample, reads: Reads) -> NDArray[np.uint8]:
    """The pixels of a sample after its placement, uint8 (H, W, 3). `blob`: where the bytes of what is read are.

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
    assert blob is not None, f"{name} was read when it was planned"
    try:
        content = blob.read()
    except OSError as error:
        raise UserError(f"{blob.where} can no longer be read ({error.strerror}); run the same command again") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{blob.where} changed while it was being preprocessed; run the same command again")
    try:
        with images.decoded(content) as pixels:
            return geometry.apply(pixels, geometry.Placement(**json.loads(sample.placement)))
    except ImageError as error:
        raise ImageError(f"its conditioning image {name}: {error}" if conditioning else str(error)) from error


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in pieces of `size`, the last one shorter."""
    for i in range(0, len(items), size):
        yield items[i : i + size]
