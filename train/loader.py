"""Cache -> batches of one shape, in an exact and repeatable order whose position is one number.

The order is an endless stream of batches, a function of (seed, samples, batch size) alone: every epoch is a fresh
permutation, every sample is seen exactly once in it. A step takes the next accumulation * processes batches of the
stream, so the same stream serves any number of processes, and resuming means: go on at this number.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from shared.cache.reader import Cache, Layer, usable
from shared.cache.schema import Caption, Sample, digest
from shared.errors import UserError, nearest
from shared.families.base import Batch, Family, LayerKind

EMPTY_CAPTION = Caption.of("").id


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
    prefetch: int = 4
    """Batches made ready ahead by a thread. Raise it where the reported data wait is not near zero."""

    def check(self) -> None:
        """Refuse impossible values."""
        for name in ("batch_size", "accumulation", "prefetch"):
            if getattr(self, name) < 1:
                raise UserError(f"loader.{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"loader.caption_dropout is a share from 0 to 1, not {self.caption_dropout}")


class CachedSamples:
    """The samples of one split of a cache, with every layer that one condition needs; random access."""

    def __init__(self, cache: Cache, family: Family, condition: str, split: str) -> None:
        """Raises `UserError` where the cache lacks the condition, a layer or any sound sample."""
        if condition not in cache.conditions:
            raise UserError(
                f"{cache.path} holds no condition '{condition}': {nearest(condition, cache.conditions)}. "
                f"Add it: make preprocess DATA=... CACHE={cache.path} CONDITION={condition}"
            )
        self.layers: dict[str, tuple[LayerKind, Layer]] = {
            kind.name: (kind, cache.layer(kind.name_in_cache(condition))) for kind in family.layers
        }
        by_rows: dict[str, list[Layer]] = {"samples": [], "captions": []}
        for kind, layer in self.layers.values():
            by_rows[kind.rows].append(layer)
        for layer in by_rows["captions"]:
            if EMPTY_CAPTION not in layer:
                raise UserError(
                    f"layer '{layer.summary.name}' of {cache.path} lacks the empty caption, which caption dropout "
                    f"needs ({layer.errors[EMPTY_CAPTION]}); preprocess again"
                )
        of_split = [sample for sample in cache.samples.values() if sample.split == split]
        self.samples: list[Sample] = usable(of_split, by_rows["samples"], by_rows["captions"])
        self.num_left_out = len(of_split) - len(self.samples)
        self.cache, self.condition, self.split = cache, condition, split

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def recipes(self) -> dict[str, Any]:
        """The recipe of each layer, under the family's name for it."""
        return {name: layer.summary.recipe for name, (_, layer) in self.layers.items()}

    @cached_property  # asked for with every sample of every batch
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """ "layer.field" -> shape of one sample's tensor, read from the first sample."""
        sample = self.samples[0]
        found: dict[str, tuple[int, ...]] = {}
        for name, (kind, layer) in self.layers.items():
            key = sample.key if kind.rows == "samples" else sample.captions[0]
            found |= {f"{name}.{field}": tuple(tensor.shape) for field, tensor in layer.tensors(key).items()}
        return found

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) in pixels of every bucket that has samples, sorted."""
        return sorted({(s.bucket_width, s.bucket_height) for s in self.samples if s.bucket_width and s.bucket_height})

    @property
    def num_drawings(self) -> int:
        """R: drawings of each sample's condition."""
        return self.shapes["condition_latents.mean"][0]

    @cached_property
    def digest(self) -> str:
        """Identity of this very set of samples and captions in this order: what an exact resume depends on."""
        return digest(
            [
                [sample.key, sample.input("image"), sample.input("conditioning_image"), list(sample.captions)]
                for sample in self.samples
            ]
        )

    def batch(self, indices: Sequence[int], captions: Sequence[str], drawings: Sequence[int]) -> Batch:
        """Stack samples of one shape: for each index the caption (id) and which of its drawings to take."""
        chosen = [self.samples[index] for index in indices]
        tensors = {}
        for name, (kind, layer) in self.layers.items():
            keys = [sample.key for sample in chosen] if kind.rows == "samples" else list(captions)
            read = [layer.tensors(key) for key in keys]
            for field in read[0]:
                column = [tensors_of[field] for tensors_of in read]
                if kind.reads == "condition":
                    column = [tensor[drawing] for tensor, drawing in zip(column, drawings, strict=True)]
                tensors[f"{name}.{field}"] = torch.stack(column)
        height, width = chosen[0].bucket_height, chosen[0].bucket_width
        assert height is not None
        assert width is not None
        return Batch(keys=[sample.key for sample in chosen], height=height, width=width, tensors=tensors)


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
            raise UserError(f"{samples.cache.path} has no sound sample in the split '{samples.split}'")
        self.samples, self.options, self.seed, self.device = samples, options, seed, device
        self.rank, self.num_ranks = rank, num_ranks
        self.step = 0
        """Optimizer steps that were handed out: the position, saved and restored."""
        self.waited_seconds = 0.0
        """How long the last step waited for its data."""
        sizes = [(sample.bucket_height, sample.bucket_width) for sample in samples.samples]
        self._buckets = {size: [i for i, other in enumerate(sizes) if other == size] for size in sorted(set(sizes))}
        self.batches_per_epoch = sum(-(-len(bucket) // options.batch_size) for bucket in self._buckets.values())
        self._epoch: tuple[int, list[list[int]]] | None = None

    @property
    def batches_per_step(self) -> int:
        """Batches of one optimizer step over all processes."""
        return self.options.accumulation * self.num_ranks

    def order(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch as sample indices: each sample once, each batch of one shape, in random order."""
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            batches = []
            for bucket in self._buckets.values():
                shuffled = [bucket[i] for i in random.permutation(len(bucket))]
                size = self.options.batch_size
                batches += [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
            self._epoch = epoch, [batches[i] for i in random.permutation(len(batches))]
        return self._epoch[1]

    def indices(self, position: int) -> list[int]:
        """The samples of batch number `position` of the endless stream."""
        epoch, place = divmod(position, self.batches_per_epoch)
        return self.order(epoch)[place]

    def make(self, position: int) -> Batch:
        """Batch number `position` on the host, its captions and drawings chosen by (seed, epoch, sample) alone."""
        epoch = position // self.batches_per_epoch
        indices = self.indices(position)
        captions, drawings = [], []
        for index in indices:
            random = np.random.default_rng([self.seed, epoch, index, 1])
            choice = self.samples.samples[index].captions
            dropped = random.random() < self.options.caption_dropout
            picked = choice[int(random.integers(len(choice)))]
            captions.append(EMPTY_CAPTION if dropped else picked)
            drawings.append(int(random.integers(self.samples.num_drawings)))
        batch = self.samples.batch(indices, captions, drawings)
        batch.position = position
        first = position - position % self.batches_per_step
        batch.step_samples = sum(len(self.indices(first + i)) for i in range(self.batches_per_step))
        if self.device.type == "cuda":
            batch.tensors = {name: tensor.pin_memory() for name, tensor in batch.tensors.items()}
        return batch

    def __iter__(self) -> Generator[list[Batch], None, None]:
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=self.options.prefetch)
        stopped = threading.Event()
        positions = itertools.count(self.step * self.batches_per_step + self.rank, self.num_ranks)

        def work() -> None:
            try:
                if self.device.index is not None and self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # a thread begins on GPU 0: pinning would take memory there
                for position in positions:
                    ready.put(self.make(position))
                    if stopped.is_set():
                        return
            except BaseException as error:  # handed to the training thread, which raises it
                ready.put(error)

        def take() -> Batch:
            item = ready.get()
            if isinstance(item, BaseException):  # the last thing that the thread says
                raise item
            return item

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            while True:
                began = time.perf_counter()
                taken = [take() for _ in range(self.options.accumulation)]
                self.waited_seconds = time.perf_counter() - began
                self.step += 1
                yield [to_device(batch, self.device) for batch in taken]
        finally:
            stopped.set()
            while thread.is_alive():  # it may wait for a place in the queue
                with suppress(queue.Empty):
                    ready.get(timeout=0.01)
            thread.join()

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "step": self.step,
            "batches_per_step": self.batches_per_step,
            "seed": self.seed,
            "batch_size": self.options.batch_size,
            "samples": self.samples.digest,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises `UserError` where the stream is not the one it was saved from."""
        for key, value in self.state().items():
            if key != "step" and state.get(key) != value:
                what = {
                    "samples": "the cache holds other samples than when this run began",
                    "batches_per_step": f"processes x loader.accumulation was {state.get(key)}, is {value}",
                }.get(key, f"{key} was {state.get(key)}, is {value}")
                raise UserError(f"cannot resume at the exact position: {what}; restore it, or start another NAME")
        self.step = int(state["step"])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device, copied without waiting where they are pinned."""
    batch.tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
    return batch
