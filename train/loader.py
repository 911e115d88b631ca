"""Cache -> batches of one shape, in an exact and repeatable order whose position is one number.

The order is an endless stream of batches, a function of (seed, samples, batch size) alone: every epoch is a fresh
permutation, every sample is seen exactly once in it. A step takes the next accumulation * processes batches of the
stream, so the same stream serves any number of processes, and resuming means: go on at this number. Threads make the
coming batches; which one makes which changes nothing.

Where the cache has class images, each batch is followed in the stream by one of as many of them, of their own shape: a
*place* of the order is then two positions of the stream.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Collection, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cache.storage import Listed
from shared.errors import UserError
from shared.families.base import Batch, Tensors
from train.order import GlobalOrder, Order, Turns, WindowOrder, uniform
from train.rows import Buffers, Stacking
from train.samples import EMPTY_CAPTION, CachedSamples, Choice
from train.transfer import Coming, Transfer

WINDOW_CHUNKS = 8
"""Chunks of neighbours that a window is made of."""


@dataclass(frozen=True)
class LoaderOptions:
    """How samples become batches."""

    batch_size: int = 1
    """Samples of one model call. Prefer a larger batch to accumulation while memory allows."""
    accumulation: int = 1
    """Batches whose gradients make one optimizer step, per process."""
    global_batch: int | None = None
    """Samples of one optimizer step over all processes. Batch size, accumulation and how much is recomputed are then
    chosen together, for speed within the memory there is; a run that goes on keeps what it had."""
    caption_dropout: float = 0.1
    """Share of samples that are trained with the empty caption, so that the condition must carry the picture."""
    condition_draw: bool = True
    """Draw the condition's latents from their posterior as diffusers' pipeline does; false: take their mean."""
    prior_weight: float = 1.0
    """Prior preservation, where the cache has class images (`preprocess --prior.prompt`): as many of them as pictures
    join each step, and their mean loss counts so many times. 0: they are left out, which halves the time of a step."""
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

    def in_windows(self, *, remote: bool) -> bool:
        """Whether the order of a new run is that of windows, with a cache that comes over a network or not."""
        return self.order == "window" or (self.order == "auto" and remote)

    def unused(self, *, remote: bool, prior: bool = True) -> list[str]:
        """Options that differ from their default but have no effect, with a cache that comes over a network or not, and
        has class images or not."""
        uses = (("window", self.in_windows(remote=remote)), ("lookahead", remote), ("prior_weight", prior))
        idle = {name for name, used in uses if not used}
        return [
            field.name for field in fields(self) if field.name in idle and getattr(self, field.name) != field.default
        ]

    def check(self) -> None:
        """Refuse impossible values."""
        for name in ("batch_size", "accumulation", "window", "workers", "prefetch", "lookahead"):
            if getattr(self, name) < 1:
                raise UserError(f"loader.{name} must be 1 or more, not {getattr(self, name)}")
        if self.global_batch is not None:
            if self.global_batch < 1:
                raise UserError(f"loader.global_batch must be 1 or more, not {self.global_batch}")
            if (self.batch_size, self.accumulation) != (1, 1):
                raise UserError(
                    "loader.global_batch chooses loader.batch_size and loader.accumulation: leave those out, or it"
                )
        if not 0 <= self.prior_weight < math.inf:
            raise UserError(f"loader.prior_weight must be 0 or more, not {self.prior_weight}")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"loader.caption_dropout is a share from 0 to 1, not {self.caption_dropout}")


class Loader:
    """Batches for one process, from any position on. Iterating yields lists: the batches of one optimizer step."""

    prior: Turns | None = None
    """Of the class images that follow each batch. None: there are none, or they are left out."""

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
            [range(size.start, size.stop) for size in samples.by_size] if self._images is None else self._images.ranges
        )
        in_windows = options.in_windows(remote=samples.cache.storage.remote)
        self.order = self._windows(options.window, WINDOW_CHUNKS) if in_windows else self._global()
        if samples.trains_prior(options.prior_weight):
            self.prior = Turns(samples.num_prior, options.batch_size, seed)

    def _global(self) -> Order:
        return GlobalOrder(self._buckets, self.options.batch_size, self.seed)

    def _windows(self, window: int, chunks: int) -> Order:
        return WindowOrder(self._buckets, self.options.batch_size, self.seed, window=window, chunks=chunks)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every sample (of `variants: one`, every image) comes once."""
        return self.order.batches_per_epoch

    @property
    def batches_per_step(self) -> int:
        """Batches of one optimizer step over all processes, those of class images not counted."""
        return self.options.accumulation * self.num_ranks

    @property
    def batches_of_a_place(self) -> int:
        """Positions of the stream that belong to one place of the order: 2 with class images."""
        return 1 if self.prior is None else 2

    def own(self, position: int) -> int:
        """Which of this process's batches, counted from 0, number `position` of the stream is."""
        place, beside = divmod(position, self.batches_of_a_place)
        number, rank = divmod(place, self.num_ranks)
        assert rank == self.rank, f"batch {position} is another process's"
        return number * self.batches_of_a_place + beside

    def position(self, own: int) -> int:
        """The inverse of `own`."""
        number, beside = divmod(own, self.batches_of_a_place)
        return (number * self.num_ranks + self.rank) * self.batches_of_a_place + beside

    def choose(self, position: int) -> Choice:
        """What goes into batch number `position`: drawn for each sample by the seed, the epoch and its number alone;
        for class images, of which an epoch may need each several times, by the seed, the position and the number."""
        place, beside = divmod(position, self.batches_of_a_place)
        epoch, indices = place // self.batches_per_epoch, self.order.places(place)
        if beside:
            assert self.prior is not None
            assert self.samples.prior is not None
            indices = self.samples.prior.start + self.prior.numbers(place, len(indices))
            return self._choice(indices, position, "prior")
        if self._images is not None:
            indices = self._images.draw(indices, uniform(1, indices, self.seed, epoch, "variant")[0])
        return self._choice(indices, epoch, "choice")

    def _choice(self, indices: NDArray[np.int64], when: int, what: str) -> Choice:
        samples = self.samples
        numbers = samples.numbers(indices)
        dropped, captions, conditions, drawings = uniform(4, numbers, self.seed, when, what).tolist()
        return Choice(
            indices=indices.tolist(),
            captions=[
                EMPTY_CAPTION if drop < self.options.caption_dropout else samples.caption_at(number, share)
                for number, drop, share in zip(numbers.tolist(), dropped, captions, strict=True)
            ],
            conditions=[int(share * len(samples.conditions)) for share in conditions],
            drawings=drawings,
        )

    def make(self, position: int, making: _Making | None = None) -> Batch:
        """Batch number `position` on the host."""
        batch, stacking = self.samples.begin_batch(self.choose(position), self._buffers)
        if making is not None:
            making.begin(stacking)
        batch.position, batch.step_samples = position, len(batch)
        place, beside = divmod(position, self.batches_of_a_place)
        if beside:
            batch.prior_weight = self.options.prior_weight
        if self.batches_per_step > 1:
            first = place - place % self.batches_per_step
            batch.step_samples = int(self.order.sizes(np.arange(first, first + self.batches_per_step)).sum())
        batch.tensors = stacking.finish()
        return batch

    def peek(self, positions: Iterable[int], layers: Collection[str]) -> list[Tensors]:
        """Of each of these batches, "layer.field" -> (B, ...) on the host, of these layers alone: what comes can be
        known before it comes. Threads may call it. Raises `CacheError` as iterating does."""
        buffers = Buffers(pinned=False)
        return [self.samples.begin_batch(self.choose(at), buffers, layers)[1].finish() for at in positions]

    def __iter__(self) -> Generator[list[Batch], None, None]:
        def begin() -> None:
            if self.device.index is not None and self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a thread begins on GPU 0: pinning would take memory there

        ahead, transfer = _Ahead(self), Transfer(self.device)
        ready: deque[_Making] = deque()
        of_a_step = self.options.accumulation * self.batches_of_a_place
        following = self.step * of_a_step
        threads = ThreadPoolExecutor(self.options.workers, thread_name_prefix="loader", initializer=begin)
        try:
            while True:
                taken: list[Coming] = []
                self.waited_seconds = 0.0
                while len(taken) < of_a_step:
                    if ready:
                        began = time.perf_counter()
                        taken.append(ready.popleft().take(transfer))
                        self.waited_seconds += time.perf_counter() - began
                    # Not before one is taken: threads that begin another compete for the interpreter meanwhile.
                    ahead.announce(following - len(ready))
                    while len(ready) < self.options.prefetch:
                        ready.append(_Making(threads, self, self.position(following)))
                        following += 1
                if transfer.ahead:  # the next step's batches arrive during this one, no more: they take memory
                    for making in islice(ready, of_a_step):
                        making.send(transfer)
                self.step += 1
                yield [coming.take() for coming in taken]
        finally:
            threads.shutdown(cancel_futures=True)
            transfer.close()
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
        if self.options.order == "auto":
            self.order = self._windows(had["window"], had["chunks"]) if had.get("kind") == "window" else self._global()
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
        self._coming: Coming | None = None
        # Not through `self`: in a circle of references the batch's memory would wait for the garbage collector.
        self._batch.add_done_callback(lambda _: begun.set())

    def begin(self, stacking: Stacking) -> None:
        """Its rows can be read from now on."""
        self._stacking = stacking
        self._begun.set()

    def send(self, transfer: Transfer) -> None:
        """If it is made, begin to copy it to the device."""
        if self._coming is None and self._batch.done() and self._batch.exception() is None:
            self._stacking, self._coming = None, transfer.begin(self._batch.result())

    def take(self, transfer: Transfer) -> Coming:
        """The batch on its way to the device, when it is made. Whoever waits for it helps to read it."""
        if self._coming is not None:
            return self._coming
        self._begun.wait()
        if self._stacking is not None:
            self._stacking.help()
        return transfer.begin(self._batch.result())


class _Ahead:
    """Tells a remote cache's storage which shards the coming batches of this process need, in their order."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self._storage = loader, loader.samples.cache.storage
        self._coming: deque[dict[str, Listed]] = deque()
        """Of each batch of this process, from the last announced one on, its shards."""
        self._first = 0
        self._announced: list[Listed] = []

    def announce(self, own: int) -> None:
        """From now on this process's batches from number `own` on are needed."""
        if not self._storage.remote:
            return
        while self._coming and self._first < own:
            self._coming.popleft()
            self._first += 1
        if not self._coming:
            self._first = own
        while len(self._coming) < self._loader.options.lookahead:
            choice = self._loader.choose(self._loader.position(self._first + len(self._coming)))
            self._coming.append(self._loader.samples.shards(choice))
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
