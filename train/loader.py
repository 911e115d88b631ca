"""Cache -> batches of one shape, in an exact and repeatable order whose position is one number.

The order is an endless stream of batches, a function of (seed, samples, batch size) alone: every epoch is a fresh
permutation, every sample is seen exactly once in it. A step takes the next accumulation * processes batches of the
stream, so the same stream serves any number of processes, and resuming means: go on at this number. Threads make the
coming batches; which one makes which changes nothing.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from shared.cache import schema
from shared.cache.reader import Cache, Layer
from shared.cache.storage import Listed
from shared.errors import UserError, nearest
from shared.families.base import Batch, Family, LayerKind
from train.order import GlobalOrder, Order, WindowOrder, uniform
from train.rows import Buffers, Rows, Stacking, Taken

EMPTY_CAPTION = 0
"""The number of the empty caption in every cache."""
WINDOW_CHUNKS = 8
"""Chunks of neighbours that a window is made of."""


@dataclass(frozen=True)
class LoaderOptions:
    """How samples become batches."""

    batch_size: int = 1
    """Samples of one model call. Prefer a larger batch to accumulation while memory allows."""
    accumulation: int = 1
    """Batches whose gradients make one optimizer step, per process."""
    caption_dropout: float = 0.1
    """Share of samples that are trained with the empty caption, so that the condition must carry the picture."""
    condition_draw: bool = True
    """Draw the condition's latents from their posterior as diffusers' pipeline does; false: take their mean."""
    variants: Literal["all", "one"] = "all"
    """all: every crop and mirrored copy of an image is a sample of its own. one: an epoch sees each image once, in a
    variant that is drawn; take it where images have different numbers of variants, or an epoch shall be short."""
    order: Literal["auto", "global", "window"] = "auto"
    """global: any sample may come next. window: only those of a window that moves over the cache, so that few shards
    are needed at a time. auto: window where the cache comes over a network; a run that goes on keeps what it had."""
    window: int = 2048
    """Samples that are shuffled among each other where the order is window. More mix better and need more local disk:
    with FLUX at 512 px 10 GB, and as much again for what is fetched ahead."""
    workers: int = 2
    """Threads that make batches. One reads some GB per second; more help where a step is that fast."""
    prefetch: int = 4
    """Batches made ready ahead. Raise it where the reported data wait is not near zero."""
    lookahead: int = 64
    """Batches whose shards are fetched ahead where the cache comes over a network."""

    def check(self) -> None:
        """Refuse impossible values."""
        for name in ("batch_size", "accumulation", "window", "workers", "prefetch", "lookahead"):
            if getattr(self, name) < 1:
                raise UserError(f"loader.{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"loader.caption_dropout is a share from 0 to 1, not {self.caption_dropout}")


@dataclass(frozen=True)
class Size:
    """Samples of one shape: indices `start` to `stop` (not included)."""

    width: int
    """Pixels."""
    height: int
    start: int
    stop: int


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


class CachedSamples:
    """The samples of one split of a cache that every needed layer has something for, by index; random access.

    Indices run from 0 to the length, along the samples' numbers in the cache. Nothing is kept for each sample, but
    where some cannot be used: then the numbers of those that can.
    """

    def __init__(self, cache: Cache, family: Family, conditions: str | Sequence[str], split: str) -> None:
        """Raises `UserError` where the cache lacks a condition or a layer, or conditions cannot be mixed."""
        self.conditions = (conditions,) if isinstance(conditions, str) else tuple(conditions)
        self.cache, self.split = cache, split
        for condition in self.conditions:
            if condition not in cache.conditions:
                raise UserError(
                    f"{cache.url} holds no condition '{condition}': {nearest(condition, cache.conditions)}. "
                    f"Add it: make preprocess DATA=... CACHE={cache.url} CONDITION={condition}"
                )
        self.layers: dict[str, tuple[LayerKind, tuple[Layer, ...]]] = {
            kind.name: (kind, tuple(cache.layer(name) for name in self._names(kind))) for kind in family.layers
        }
        """By the family's name: the kind, and the layer of each condition; of what no condition is in, one layer."""
        self._rows = {
            name: tuple(Rows(layer, drawings=kind.reads == "condition") for layer in layers)
            for name, (kind, layers) in self.layers.items()
        }
        self.sizes_of, self._numbers = self._usable()
        self._refuse_mixtures()

    def _names(self, kind: LayerKind) -> list[str]:
        """The layers of this kind, as the cache names them."""
        return list(dict.fromkeys(kind.name_in_cache(condition) for condition in self.conditions))

    def _usable(self) -> tuple[list[Size], NDArray[np.int64] | None]:
        """The shapes in order, with the indices that they share out; each index's number, None where they are the
        numbers from the split's first on."""
        buckets = [bucket for bucket in self.cache.index.buckets if bucket.split == self.split]
        starts = [bucket.start for bucket in buckets]
        begin, end = (buckets[0].start, buckets[-1].stop) if buckets else (0, 0)
        sound = self._sound(begin, end)
        self._begin = begin
        if sound is None:
            return [Size(b.width, b.height, b.start - begin, b.stop - begin) for b in buckets], None
        numbers = begin + np.flatnonzero(sound)
        edges = [*np.searchsorted(numbers, starts).tolist(), len(numbers)]
        sizes = [
            Size(b.width, b.height, start, stop)
            for b, start, stop in zip(buckets, edges[:-1], edges[1:], strict=True)
            if stop > start
        ]
        return sizes, numbers

    def _sound(self, begin: int, end: int) -> NDArray[np.bool_] | None:
        """Which of these numbers every layer has something for, their captions too; None: all."""
        sound = np.ones(end - begin, np.bool_)
        for kind, layers in self.layers.values():
            for layer in layers:
                if not any(shard.errors for shard in layer.summary.shards):
                    continue
                there = layer.places.length >= 0
                if kind.rows == "samples":
                    sound &= there[begin:end]
                    continue
                if not there[EMPTY_CAPTION]:
                    raise UserError(
                        f"layer '{layer.summary.name}' of {self.cache.url} lacks the empty caption, which caption "
                        f"dropout needs ({layer.errors[schema.Caption.of('').id]}); preprocess again"
                    )
                starts, captions = self.cache.index.all_captions
                starts = starts[begin : end + 1]
                lost = np.concatenate([[0], np.cumsum(~there[captions[starts[0] : starts[-1]]])])
                at = starts - starts[0]
                sound &= lost[at[1:]] == lost[at[:-1]]
        return None if sound.all() else sound

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
                if differing:
                    raise UserError(
                        f"{self.cache.url}: '{first.summary.name}' and '{other.summary.name}' were made with different "
                        f"options ({', '.join(differing)}), so they cannot be trained on together; run `make "
                        f'preprocess` with CONDITION="{" ".join(self.conditions)}"'
                    )

    def __len__(self) -> int:
        return self.sizes_of[-1].stop if self.sizes_of else 0

    @cached_property
    def num_left_out(self) -> int:
        """Samples of this split that training does not see: unsound ones, and those that a layer has nothing for."""
        masked = sum(len(b) for b in self.cache.index.buckets if b.split == self.split) - len(self)
        stated = self.cache.manifest[_SAMPLES]
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
        """(width, height) in pixels of every bucket that has samples, sorted."""
        return sorted({(size.width, size.height) for size in self.sizes_of})

    @cached_property
    def digest(self) -> str:
        """Identity of this very set of samples and captions in this order: what an exact resume depends on.

        The table of samples stands for images, placements and captions, whatever shards hold what was made of them.
        """
        usable = None if self._numbers is None else schema.checksum(self._numbers.data.cast("B"))
        return schema.digest([self.cache.manifest[_SAMPLES]["checksum"], self.split, usable])

    def size_of(self, index: int) -> Size:
        """The shape of a sample, with all that have it."""
        return self.sizes_of[bisect_right(self.sizes_of, index, key=lambda size: size.start) - 1]

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

    def condition_of(self, index: int) -> int:
        """Which of the conditions a held-out sample is looked at with: they take turns."""
        return index % len(self.conditions)

    def images(self) -> Images:
        """The samples by the images that they are variants of. Variants of different shapes, which preprocessing does
        not make, count as different images."""
        of_index = self.cache.index.images
        ranges, begins, variants, count = [], [], [], 0
        for size in self.sizes_of:
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
        self,
        indices: Sequence[int] | NDArray[np.int64],
        captions: Sequence[int],
        conditions: Sequence[int],
        drawings: Sequence[float],
        buffers: Buffers,
    ) -> tuple[Batch, Stacking]:
        """A batch of samples of one shape without its tensors, which are to be read by what comes with it.

        Of each index the caption (number), the condition (place among `conditions`) and the drawing, by where it is
        among the sample's: 0 is the first, just below 1 the last.
        """
        numbers = [self.number(int(index)) for index in indices]
        taken = {}
        for name, (kind, _) in self.layers.items():
            taken[name] = self._taken(name, numbers, captions, conditions)
            if kind.reads == "condition":
                taken[name] = [
                    row._replace(drawing=drawing) for row, drawing in zip(taken[name], drawings, strict=True)
                ]
        size = self.size_of(int(indices[0]))
        keys = [self.cache.index.key(number) for number in numbers]
        return Batch(keys=keys, height=size.height, width=size.width, tensors={}), Stacking(taken, buffers)

    def batch(self, indices: Sequence[int], conditions: Sequence[int] | None = None) -> Batch:
        """Samples of one shape as held-out ones are looked at: first captions, last (finest) drawings; of several
        conditions the ones named (by place), or each sample's own."""
        batch, stacking = self.begin_batch(
            indices,
            [int(self.captions(index)[0]) for index in indices],
            [self.condition_of(index) for index in indices] if conditions is None else conditions,
            [_LAST] * len(indices),
            Buffers(pinned=False),
        )
        batch.tensors = stacking.finish()
        return batch

    def _taken(
        self, name: str, numbers: Sequence[int], captions: Sequence[int], conditions: Sequence[int]
    ) -> list[Taken]:
        """The rows of one kind of layer that go into a batch."""
        kind, rows = self.layers[name][0], self._rows[name]
        if kind.rows == "captions":
            return [Taken(rows[0], caption) for caption in captions]
        if kind.reads == "condition":
            return [Taken(rows[c], number) for number, c in zip(numbers, conditions, strict=True)]
        return [Taken(rows[0], number) for number in numbers]

    def shards(self, numbers: Sequence[int], captions: Sequence[int], conditions: Sequence[int]) -> dict[str, Listed]:
        """The shards that hold the rows of a batch, by name."""
        found = {}
        for name in self.layers:
            for rows, number, _ in self._taken(name, numbers, captions, conditions):
                tar = rows.layer.tar(int(rows.layer.places.shard[number]))
                found[tar.name] = tar
        return found


_SAMPLES = "samples"
_LAST = float(np.nextafter(1, 0))


@dataclass(frozen=True)
class _Choice:
    """What goes into a batch: a function of the seed, the epoch and each sample's number alone."""

    indices: NDArray[np.int64]
    numbers: list[int]
    captions: list[int]
    conditions: list[int]
    drawings: list[float]
    """Where in its drawings each sample's is, from 0 to 1."""


class Loader:
    """Batches for one process, from any position on. Iterating yields lists: the batches of one optimizer step."""

    def __init__(
        self,
        samples: CachedSamples,
        options: LoaderOptions,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if not len(samples):
            raise UserError(f"{samples.cache.url} has no sound sample in the split '{samples.split}'")
        self.samples, self.options, self.seed, self.device = samples, options, seed, device
        self.rank, self.num_ranks = rank, num_ranks
        self.step = 0
        """Optimizer steps that were handed out: the position, saved and restored."""
        self.waited_seconds = 0.0
        """How long the last step waited for its data."""
        self._buffers = Buffers(pinned=device.type == "cuda")
        self._images = samples.images() if options.variants == "one" else None
        self._buckets = (
            [range(size.start, size.stop) for size in samples.sizes_of] if self._images is None else self._images.ranges
        )
        remote = samples.cache.storage.remote
        kind = options.order if options.order != "auto" else "window" if remote else "global"
        self.order = self._order(kind, options.window, WINDOW_CHUNKS)

    def _order(self, kind: str, window: int, chunks: int) -> Order:
        if kind == "window":
            return WindowOrder(self._buckets, self.options.batch_size, self.seed, window=window, chunks=chunks)
        return GlobalOrder(self._buckets, self.options.batch_size, self.seed)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every sample (of `variants: one`, every image) comes once."""
        return self.order.batches_per_epoch

    @property
    def batches_per_step(self) -> int:
        """Batches of one optimizer step over all processes."""
        return self.options.accumulation * self.num_ranks

    def _choose(self, position: int) -> _Choice:
        epoch = position // self.batches_per_epoch
        indices = self.order.places(position)
        if self._images is not None:
            indices = self._images.draw(indices, uniform(1, indices, self.seed, epoch, "variant")[0])
        numbers = self.samples.numbers(indices)
        drops, caption_shares, condition_shares, drawings = uniform(4, numbers, self.seed, epoch, "choice")
        index = self.samples.cache.index
        captions = []
        for number, drop, share in zip(numbers.tolist(), drops.tolist(), caption_shares.tolist(), strict=True):
            if drop < self.options.caption_dropout:
                captions.append(EMPTY_CAPTION)
                continue
            choice = index.captions(number)
            if index.weighted:
                heights = np.cumsum(index.caption_weights(number), dtype=np.float64)
                at = min(int(np.searchsorted(heights, share * heights[-1], side="right")), len(choice) - 1)
            else:
                at = int(share * len(choice))
            captions.append(int(choice[at]))
        conditions = (condition_shares * len(self.samples.conditions)).astype(np.int64)
        return _Choice(indices, numbers.tolist(), captions, conditions.tolist(), drawings.tolist())

    def make(self, position: int, making: _Making | None = None) -> Batch:
        """Batch number `position` on the host."""
        choice = self._choose(position)
        batch, stacking = self.samples.begin_batch(
            choice.indices, choice.captions, choice.conditions, choice.drawings, self._buffers
        )
        if making is not None:
            making.begin(stacking)
        batch.position, batch.step_samples = position, len(batch)
        if self.batches_per_step > 1:
            first = position - position % self.batches_per_step
            batch.step_samples = int(self.order.sizes(np.arange(first, first + self.batches_per_step)).sum())
        batch.tensors = stacking.finish()
        return batch

    def __iter__(self) -> Generator[list[Batch], None, None]:
        def begin() -> None:
            if self.device.index is not None and self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a thread begins on GPU 0: pinning would take memory there

        ahead = _Ahead(self)
        ready: deque[_Making] = deque()
        following = self.step * self.batches_per_step + self.rank
        threads = ThreadPoolExecutor(self.options.workers, thread_name_prefix="loader", initializer=begin)
        try:
            while True:
                began = time.perf_counter()
                taken = []
                for _ in range(self.options.accumulation):
                    ahead.announce(following - len(ready) * self.num_ranks)
                    while len(ready) <= self.options.prefetch:  # the one that is taken now, and those ahead of it
                        ready.append(_Making(threads, self, following))
                        following += self.num_ranks
                    taken.append(ready.popleft().take())
                self.waited_seconds = time.perf_counter() - began
                self.step += 1
                yield [to_device(batch, self.device) for batch in taken]
        finally:
            threads.shutdown(cancel_futures=True)
            ahead.close()

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "step": self.step,
            "batches_per_step": self.batches_per_step,
            "seed": self.seed,
            "batch_size": self.options.batch_size,
            "variants": self.options.variants,
            "order": self.order.state(),
            "samples": self.samples.digest,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises `UserError` where the stream is not the one it was saved from."""
        had = state.get("order", {})
        if self.options.order == "auto" and had.get("kind") == "window":
            self.order = self._order("window", had["window"], had["chunks"])
        elif self.options.order == "auto":
            self.order = self._order("global", 0, 0)
        for key, value in self.state().items():
            if key != "step" and state.get(key) != value:
                what = {
                    "samples": "the cache holds other samples than when this run began",
                    "batches_per_step": f"processes x loader.accumulation was {state.get(key)}, is {value}",
                    "order": f"loader.order was {_in_words(had)}, is {_in_words(self.order.state())}",
                    "seed": f"seed was {state.get(key)}, is {value}",
                }.get(key, f"loader.{key} was {state.get(key)}, is {value}")
                raise UserError(f"cannot resume at the exact position: {what}; restore it, or start another NAME")
        self.step = int(state["step"])


def _in_words(order: dict[str, Any]) -> str:
    window = f" of {order['window']} samples" if "window" in order else ""
    return f"{order.get('kind', 'another')}{window}"


class _Making:
    """A batch that a thread makes, or will."""

    def __init__(self, threads: ThreadPoolExecutor, loader: Loader, position: int) -> None:
        self._stacking: Stacking | None = None
        self._begun = begun = threading.Event()
        self._batch = threads.submit(loader.make, position, self)
        # Not through `self`: in a circle of references the batch's memory would wait for the garbage collector.
        self._batch.add_done_callback(lambda _: begun.set())

    def begin(self, stacking: Stacking) -> None:
        """Its rows can be read from now on."""
        self._stacking = stacking
        self._begun.set()

    def take(self) -> Batch:
        """The batch, when it is made. Whoever waits for it helps to read it."""
        self._begun.wait()
        if self._stacking is not None:
            self._stacking.help()
        return self._batch.result()


class _Ahead:
    """Tells a remote cache's storage which shards the coming batches of this process need, in their order."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self._storage = loader, loader.samples.cache.storage
        self._coming: deque[dict[str, Listed]] = deque()
        """Of each position from the last announced one on, its shards."""
        self._first = 0
        self._announced: list[Listed] = []

    def announce(self, position: int) -> None:
        """From now on the batches from `position` on are needed."""
        if not self._storage.remote:
            return
        stride = self._loader.num_ranks
        while self._coming and self._first < position:
            self._coming.popleft()
            self._first += stride
        if not self._coming:
            self._first = position
        while len(self._coming) < self._loader.options.lookahead:
            choice = self._loader._choose(self._first + len(self._coming) * stride)
            self._coming.append(self._loader.samples.shards(choice.numbers, choice.captions, choice.conditions))
        files = list({name: file for shards in self._coming for name, file in shards.items()}.values())
        if files != self._announced:
            self._announced = files
            self._storage.fetch_ahead(files)

    def close(self) -> None:
        """Nothing more is needed."""
        if self._announced:
            self._storage.fetch_ahead(())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device, copied without waiting where they are pinned."""
    batch.tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
    return batch
