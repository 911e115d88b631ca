"""What there is to train on: the samples of a cache that every needed layer has something for, by index.

Nothing here grows with the number of samples but what the operating system maps, so that a cache of ten million opens
like one of ten.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shared.cache import schema
from shared.cache.reader import Cache, Layer
from shared.cache.storage import Listed
from shared.errors import UserError, nearest
from shared.families.base import Batch, Family, LayerKind
from train.rows import Buffers, Rows, Stacking, Taken

EMPTY_CAPTION = 0
"""The number of the empty caption in every cache."""
_LAST = float(np.nextafter(1, 0))


@dataclass(frozen=True)
class Size:
    """Samples of one shape: indices `start` to `stop` (not included)."""

    width: int
    """Pixels."""
    height: int
    start: int
    stop: int


@dataclass(frozen=True)
class Choice:
    """What goes into a batch, sample by sample; all of one shape."""

    indices: Sequence[int]
    captions: Sequence[int]
    """Numbers in the cache."""
    conditions: Sequence[int]
    """Places among `CachedSamples.conditions`."""
    drawings: Sequence[float]
    """Where among its drawings each sample's is: 0 is the first, just below 1 the last."""


@dataclass(frozen=True)
class Images:
    """Which samples are variants of one image."""

    ranges: list[range]
    """Of each shape its images, which are numbered from 0 on."""
    begins: NDArray[np.int64]
    """Where each image's variants begin in `variants`, and at the end where the last one's end."""
    variants: NDArray[np.int64]
    """The samples' indices, one image's after the other's."""

    def draw(self, images: NDArray[np.int64], shares: NDArray[np.float64]) -> NDArray[np.int64]:
        """The index of one variant of each image, by where it is among them: from 0 to 1."""
        begin, end = self.begins[images], self.begins[images + 1]
        return self.variants[begin + (shares * (end - begin)).astype(np.int64)]


def conditions_of(cache: Cache, chosen: Sequence[str], *, conditioned: bool) -> tuple[str, ...]:
    """The conditions to train on: those `chosen`, else the one that the cache was made with last; none where what is
    trained is not `conditioned`. Raises `UserError` where the cache has none to choose."""
    if not conditioned:
        return ()
    if not chosen and not cache.conditions:
        raise UserError(
            f"{cache.url} holds no condition, and a ControlNet follows one. Add it, nothing else is encoded again: "
            f"make preprocess DATA=... CACHE={cache.url} CONDITION=lineart; or train what reads none: --adapter lora, "
            "--adapter full"
        )
    return tuple(chosen) or (cache.manifest["condition"],)


class CachedSamples:
    """The samples of one split of a cache that every needed layer has something for, by index; random access.

    Indices run from 0 to the length, along the samples' numbers in the cache, and those of class images from there on.
    Nothing is kept for each sample, but where some cannot be used, or are class images: then the numbers of all.
    """

    def __init__(
        self, cache: Cache, family: Family, conditions: str | Sequence[str], split: str, *, tokens: bool = False
    ) -> None:
        """`conditions`: none where what is trained reads none, whatever the cache has. `tokens`: read those of the
        captions in the place of what the text encoders that can be trained said of them. Raises `UserError` where the
        cache lacks a condition or a layer, or conditions cannot be mixed."""
        self.conditions = (conditions,) if isinstance(conditions, str) else tuple(conditions)
        self.cache, self.split = cache, split
        for condition in self.conditions:
            if condition not in cache.conditions:
                raise UserError(
                    f"{cache.url} holds no condition '{condition}': {nearest(condition, cache.conditions)}. "
                    f"Add it: make preprocess DATA=... CACHE={cache.url} CONDITION={condition}"
                )
        kinds = family.layers_read(tokens=tokens)
        if absent := [kind.name for kind in kinds if kind not in family.layers and kind.name not in cache.layer_names]:
            raise UserError(
                f"{cache.url} holds no tokens of its captions ({absent[0]}), which training the text encoder reads. "
                f"Add them, nothing else is encoded again: make preprocess DATA=... CACHE={cache.url} "
                'ARGS="--text-tokens True"'
            )
        self.layers: dict[str, tuple[LayerKind, tuple[Layer, ...]]] = {
            kind.name: (kind, tuple(cache.layer(name) for name in self._names(kind)))
            for kind in kinds
            if self.conditions or kind.reads != "condition"
        }
        """By the family's name: the kind, and the layer of each condition; of what no condition is in, one layer."""
        self._rows = {
            name: tuple(Rows(layer, drawings=kind.reads == "condition") for layer in layers)
            for name, (kind, layers) in self.layers.items()
        }
        self._refuse_mixtures()
        self.prior: Size | None = None
        """The class images, which are no part of the length: of one shape. None where there are none."""
        self.by_size, self._numbers = self._usable()

    def _names(self, kind: LayerKind) -> list[str]:
        """The layers of this kind, as the cache names them."""
        return list(dict.fromkeys(kind.name_in_cache(condition) for condition in self.conditions or ("",)))

    def _usable(self) -> tuple[list[Size], NDArray[np.int64] | None]:
        """The shapes in order, with the indices that they share out; each index's number, None where they are the
        numbers from the split's first on."""
        buckets = [bucket for bucket in self.cache.index.buckets if bucket.split == self.split]
        starts = [bucket.start for bucket in buckets]
        begin, end = (buckets[0].start, buckets[-1].stop) if buckets else (0, 0)
        sound = self._sound(begin, end)
        self._begin = begin
        marked = self.cache.index.prior
        prior = None if marked is None or not marked[begin:end].any() else marked[begin:end].astype(np.bool_)
        if sound is None and prior is None:
            return [Size(b.width, b.height, b.start - begin, b.stop - begin) for b in buckets], None

        def among(chosen: NDArray[np.bool_]) -> tuple[list[Size], NDArray[np.int64]]:
            numbers = begin + np.flatnonzero(chosen)
            edges = [*np.searchsorted(numbers, starts).tolist(), len(numbers)]
            shapes = zip(buckets, edges[:-1], edges[1:], strict=True)
            return [Size(b.width, b.height, start, stop) for b, start, stop in shapes if stop > start], numbers

        if sound is None:
            sound = np.ones(end - begin, np.bool_)
        if prior is None:
            return among(sound)
        sizes, numbers = among(sound & ~prior)
        prior_sizes, prior_numbers = among(sound & prior)
        if len(prior_sizes) > 1:
            raise UserError(f"{self.cache.url} has class images of several shapes; preprocess again")
        for size in prior_sizes:
            self.prior = Size(size.width, size.height, len(numbers), len(numbers) + size.stop)
        return sizes, np.concatenate([numbers, prior_numbers])

    def _sound(self, begin: int, end: int) -> NDArray[np.bool_] | None:
        """Which of these numbers every layer has something for, their captions too; None: all."""
        sound: NDArray[np.bool_] | None = None
        for kind, layers in self.layers.values():
            for layer in layers:
                if not layer.summary.shards.errors:
                    continue
                there = layer.places.length >= 0
                there = self._captioned(layer, there, begin, end) if kind.rows == "captions" else there[begin:end]
                sound = there if sound is None else sound & there
        return None if sound is None or sound.all() else sound

    def _captioned(self, layer: Layer, there: NDArray[np.bool_], begin: int, end: int) -> NDArray[np.bool_]:
        """Which of these samples have no caption that a layer lacks."""
        if not there[EMPTY_CAPTION]:
            raise UserError(
                f"layer '{layer.summary.name}' of {self.cache.url} lacks the empty caption, which caption dropout "
                f"needs ({layer.errors[schema.Caption.of('').id]}); preprocess again"
            )
        starts, captions = self.cache.index.all_captions
        starts = starts[begin : end + 1]
        lacking = np.concatenate([[0], np.cumsum(~there[captions[starts[0] : starts[-1]]])])[starts - starts[0]]
        return lacking[1:] == lacking[:-1]

    def _refuse_mixtures(self) -> None:
        """Several conditions are drawn into one batch, so their layers must be of one kind."""
        for _, layers in self.layers.values():
            first, *others = layers
            for other in others:
                differing = [
                    key
                    for key in sorted({*first.summary.recipe, *other.summary.recipe} - {"layer", "drawings"})
                    if first.summary.recipe.get(key) != other.summary.recipe.get(key)
                ]
                if differing == ["channels"]:  # which no option changes
                    raise UserError(
                        f"{self.cache.url}: of '{first.summary.name}' and '{other.summary.name}' one is grey and one "
                        "has colours, so they cannot be trained on together; train on each by itself"
                    )
                if differing:
                    raise UserError(
                        f"{self.cache.url}: '{first.summary.name}' and '{other.summary.name}' were made with different "
                        f"options ({', '.join(differing)}), so they cannot be trained on together; run `make "
                        f'preprocess` with CONDITION="{" ".join(self.conditions)}"'
                    )

    def __len__(self) -> int:
        return self.by_size[-1].stop if self.by_size else 0

    @property
    def num_prior(self) -> int:
        """Class images that can be trained on beside the samples."""
        return 0 if self.prior is None else self.prior.stop - self.prior.start

    def trains_prior(self, weight: float) -> bool:
        """Whether class images join each step, with this `loader.prior_weight`."""
        return self.num_prior > 0 and weight > 0

    @cached_property
    def num_left_out(self) -> int:
        """Samples of this split that training does not see: unsound ones, and those that a layer has nothing for."""
        masked = sum(len(b) for b in self.cache.index.buckets if b.split == self.split) - len(self) - self.num_prior
        stated = self.cache.manifest["samples"]
        if not stated["errors"]:
            return masked
        path = self.cache.storage.fetch(schema.SAMPLES, checksum=stated["checksum"])
        rows = pq.ParquetFile(path, pre_buffer=False).read(columns=["split", "status"], use_threads=False)
        unsound = pc.and_(pc.equal(rows["split"], self.split), pc.equal(rows["status"], "error"))
        return masked + int(pc.sum(unsound).as_py() or 0)

    @property
    def recipes(self) -> dict[str, Any]:
        """The recipe of each layer, under the family's name for it; of several conditions, the first one's."""
        return {name: layers[0].summary.recipe for name, (_, layers) in self.layers.items()}

    @property
    def text_length(self) -> int | None:
        """Tokens that captions were encoded with; None where no layer says."""
        return next((recipe["text_length"] for recipe in self.recipes.values() if "text_length" in recipe), None)

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each layer, under its name in the cache."""
        return {layer.summary.name: layer.summary.fingerprint for _, layers in self.layers.values() for layer in layers}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """ "layer.field" -> shape of one sample's tensor, read from the first sample."""
        found: dict[str, tuple[int, ...]] = {}
        for name, (kind, _) in self.layers.items():
            number = self.number(0) if kind.rows == "samples" else self.captions(0)[0]
            stored = self._rows[name][0].form(int(number)).stored
            found |= {f"{name}.{field}": shape for field, _, shape in stored}
        return found

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) in pixels of every bucket that has samples or class images, sorted."""
        every = self.by_size if self.prior is None else [*self.by_size, self.prior]
        return sorted({(size.width, size.height) for size in every})

    @cached_property
    def digest(self) -> str:
        """Identity of this very set of samples and captions in this order: what an exact resume depends on.

        The table of samples stands for images, placements and captions, whatever shards hold what was made of them.
        """
        usable = None if self._numbers is None else schema.checksum(self._numbers.data.cast("B"))
        return schema.digest([self.cache.manifest["samples"]["checksum"], self.split, usable])

    def size_of(self, index: int) -> Size:
        """The shape of a sample, with all that have it."""
        if self.prior is not None and index >= self.prior.start:
            return self.prior
        return self.by_size[bisect_right(self.by_size, index, key=lambda size: size.start) - 1]

    def number(self, index: int) -> int:
        """The number in the cache of a sample."""
        return self._begin + index if self._numbers is None else int(self._numbers[index])

    def numbers(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers in the cache of several samples."""
        return self._begin + indices if self._numbers is None else self._numbers[indices]

    def key(self, index: int) -> str:
        """The key of a sample."""
        return self.cache.index.key(self.number(index))

    def captions(self, index: int) -> NDArray[np.int32]:
        """The numbers of a sample's captions."""
        return self.cache.index.captions(self.number(index))

    def caption_texts(self, indices: Sequence[int]) -> list[str]:
        """The first caption of each of these samples."""
        return self.cache.caption_texts([int(self.captions(index)[0]) for index in indices])

    def caption_at(self, number: int, share: float) -> int:
        """Of the captions of the sample with this number the one at `share`, from 0 to 1, of their weights."""
        index = self.cache.index
        captions = index.captions(number)
        if not index.weighted:
            return int(captions[int(share * len(captions))])
        heights = np.cumsum(index.caption_weights(number), dtype=np.float64)
        at = int(np.searchsorted(heights, share * heights[-1], side="right"))
        return int(captions[min(at, len(captions) - 1)])  # rounding may bring the product up to the sum itself

    def condition_of(self, index: int) -> int:
        """Which of the conditions a held-out sample is looked at with: they take turns."""
        return index % max(1, len(self.conditions))

    def images(self) -> Images:
        """The samples by the images that they are variants of. Variants of different shapes, which preprocessing does
        not make, count as different images."""
        of_index = self.cache.index.images
        ranges, begins, variants, count = [], [], [], 0
        for size in self.by_size:
            indices = np.arange(size.start, size.stop)
            images = of_index[self.numbers(indices)]
            order = np.argsort(images, kind="stable")
            first = np.flatnonzero(np.diff(images[order], prepend=-1))
            begins.append(size.start + first)
            variants.append(indices[order])
            ranges.append(range(count, count + len(first)))
            count += len(first)
        return Images(ranges, np.concatenate([*begins, [len(self)]]), np.concatenate(variants))

    def begin_batch(
        self, choice: Choice, buffers: Buffers, layers: Collection[str] | None = None
    ) -> tuple[Batch, Stacking]:
        """A batch without its tensors, which are to be read by what comes with it: of these layers, by default all."""
        size = self.size_of(choice.indices[0])
        keys = [self.key(index) for index in choice.indices]
        taken = {name: self._taken(name, choice) for name in (self.layers if layers is None else layers)}
        return Batch(keys=keys, height=size.height, width=size.width, tensors={}), Stacking(taken, buffers)

    def batch(
        self,
        indices: Sequence[int],
        conditions: Sequence[int] | None = None,
        layers: Collection[str] | None = None,
    ) -> Batch:
        """Samples of one shape as held-out ones are looked at: first captions, last (finest) drawings; of several
        conditions the ones named (by place), or each sample's own. Of all layers, or of these alone."""
        choice = Choice(
            indices=indices,
            captions=[int(self.captions(index)[0]) for index in indices],
            conditions=conditions or [self.condition_of(index) for index in indices],
            drawings=[_LAST] * len(indices),
        )
        batch, stacking = self.begin_batch(choice, Buffers(pinned=False), layers)
        batch.tensors = stacking.finish()
        return batch

    def shards(self, choice: Choice) -> dict[str, Listed]:
        """The shards that hold the rows of a batch, by name."""
        found = {}
        for name in self.layers:
            for rows, number, _ in self._taken(name, choice):
                tar = rows.layer.tar(int(rows.layer.places.shard[number]))
                found[tar.name] = tar
        return found

    def _taken(self, name: str, choice: Choice) -> list[Taken]:
        """The rows of one kind of layer that go into a batch."""
        kind, rows = self.layers[name][0], self._rows[name]
        if kind.rows == "captions":
            return [Taken(rows[0], caption) for caption in choice.captions]
        numbers = [self.number(index) for index in choice.indices]
        if kind.reads != "condition":
            return [Taken(rows[0], number) for number in numbers]
        return [
            Taken(rows[condition], number, drawing)
            for number, condition, drawing in zip(numbers, choice.conditions, choice.drawings, strict=True)
        ]
