"""Which samples come when: an endless stream of batches that is computed, not stored.

Batch number `position` of the stream is a function of (seed, samples, batch size) alone. A permutation of n things is
a small cipher (a Feistel network) over 0 .. n - 1, so that any place of it costs the same few operations whether n is
ten or a hundred million, nothing is kept, and a run goes on from any position.

There is the exact global shuffle, for caches on this machine, and the window shuffle, for caches that come over a
network shard by shard: samples whose numbers are neighbours lie in the same shards, so they are taken in chunks, and
a window of a few chunks is all that is needed at a time.
"""

from __future__ import annotations

import hashlib
import math
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_ROUNDS = 16
"""With 8, the permutations of six things are visibly uneven (chi-square ten times its mean); with 16 they are not."""
_FEW = 16
"""Up to so many places, Python's numbers are faster than numpy's arrays."""


def keys_of(*what: int | str) -> tuple[int, ...]:
    """Sixteen 64-bit keys that (seed, epoch, purpose, ...) draw, the same on every machine."""
    return struct.unpack(f"<{_ROUNDS}Q", hashlib.shake_256(repr(what).encode()).digest(8 * _ROUNDS))


def _mix(x: Any) -> Any:
    """Scatter 64 bits (the finalizer of splitmix64; Steele, Lea and Flood 2014). An int, or an array of uint64, which
    gives the same."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(count: int, numbers: NDArray[np.int64], *what: int | str) -> NDArray[np.float64]:
    """(count, N): for each of N numbers `count` draws from [0, 1), a function of the number and `what` alone."""
    keys = np.array(keys_of(*what), np.uint64)
    assert count <= len(keys) // 2
    first, second = keys[:count, None], keys[-count:, None]
    bits = _mix(_mix(numbers.astype(np.uint64) + first) ^ second)
    return (bits >> 11).astype(np.float64) * 2.0**-53


class Permutation:
    """A random order of 0 .. n - 1, drawn by `what`: place -> number, each number once. Nothing is stored.

    A generalized Feistel network over an a x b grid that just holds n (Black and Rogaway, Ciphers with Arbitrary
    Finite Domains, 2002); what falls outside of n is walked on until it falls inside, which takes few steps.
    """

    def __init__(self, n: int, *what: int | str) -> None:
        assert n > 0, "there is nothing to order"
        self.n, self._keys = n, keys_of(*what)
        self._rows = math.isqrt(n - 1) + 1
        self._columns = -(-n // self._rows)

    def __call__(self, place: int) -> int:
        """The number at one place."""
        assert 0 <= place < self.n, f"place {place} of {self.n}"
        place = self._walk(place)
        while place >= self.n:
            place = self._walk(place)
        return place

    def of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers at several places, as `__call__` gives each."""
        if len(places) <= _FEW:
            return np.array([self(place) for place in places.tolist()], np.int64)
        walked = self._walk(places.astype(np.uint64))
        while (outside := walked >= self.n).any():
            walked[outside] = self._walk(walked[outside])
        return walked.astype(np.int64)

    def _walk(self, x: Any) -> Any:
        rows, columns = self._rows, self._columns
        row, column = x // columns, x % columns
        for i in range(0, _ROUNDS, 2):
            row = (row + _mix((column + self._keys[i]) & _MASK) % rows) % rows
            column = (column + _mix((row + self._keys[i + 1]) & _MASK) % columns) % columns
        return row * columns + column


class Order(Protocol):
    """An endless stream of batches of places, which are numbers from 0 on that the buckets share out."""

    batches_per_epoch: int

    def places(self, position: int) -> NDArray[np.int64]:
        """The places of batch number `position`, all of one bucket. Each place comes once in every epoch."""
        ...

    def sizes(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many places each of these batches has: the batch size, but for the last one of a bucket."""
        ...

    def state(self) -> dict[str, int | str]:
        """What else than seed, samples and batch size this order depends on."""
        ...


class Turns:
    """Class images beside the batches of an order: each comes as often as the others, in a fresh order every time
    round. What belongs to a batch is a function of its position alone."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed

    def numbers(self, position: int, count: int) -> NDArray[np.int64]:
        """The numbers, from 0 to n - 1, of the `count` class images beside batch number `position`. A batch that is
        not full passes over the turns of those that it lacks."""
        assert count <= self.batch_size
        rounds, places = np.divmod(position * self.batch_size + np.arange(count), self.n)
        return np.array(
            [
                Permutation(self.n, self.seed, round_, "prior")(place)
                for round_, place in zip(rounds.tolist(), places.tolist(), strict=True)
            ],
            np.int64,
        )


class GlobalOrder:
    """The exact shuffle: every epoch a fresh permutation of each bucket, cut into batches, and one of all batches."""

    def __init__(self, buckets: Sequence[range], batch_size: int, seed: int) -> None:
        assert all(len(bucket) for bucket in buckets)
        self.buckets, self.batch_size, self.seed = list(buckets), batch_size, seed
        counts = [-(-len(bucket) // batch_size) for bucket in buckets]
        self._firsts = np.cumsum([0, *counts[:-1]])
        self._lengths = np.array([len(bucket) for bucket in buckets])
        self.batches_per_epoch = sum(counts)

    def places(self, position: int) -> NDArray[np.int64]:
        epoch, place = divmod(position, self.batches_per_epoch)
        number = self._batches(epoch)(place)
        k = bisect_right(self._firsts, number) - 1
        bucket, start = self.buckets[k], (number - int(self._firsts[k])) * self.batch_size
        within = np.arange(start, min(start + self.batch_size, len(bucket)))
        return bucket.start + Permutation(len(bucket), self.seed, epoch, "samples", k).of(within)

    def sizes(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, places = np.divmod(positions, self.batches_per_epoch)
        sizes = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers = self._batches(int(epoch)).of(places[here])
            k = np.searchsorted(self._firsts, numbers, side="right") - 1
            sizes[here] = np.minimum(self.batch_size, self._lengths[k] - (numbers - self._firsts[k]) * self.batch_size)
        return sizes

    def _batches(self, epoch: int) -> Permutation:
        return Permutation(self.batches_per_epoch, self.seed, epoch, "batches")

    def state(self) -> dict[str, int | str]:
        return {"kind": "global"}


@dataclass(frozen=True)
class _Windows:
    """The windows of one epoch, in the order in which they come."""

    buckets: NDArray[np.int64]
    """Of each the bucket."""
    numbers: NDArray[np.int64]
    """Of each its number in the bucket's own sequence."""
    firsts: NDArray[np.int64]
    """Of each its first batch."""


class WindowOrder:
    """The shuffle for shards that have to be fetched: windows of a few chunks of neighbours, one after the other.

    Every epoch the chunks of a bucket are dealt anew into windows, the windows of all buckets come in a fresh order,
    and within a window samples and batches are shuffled. What is left at a bucket's end after whole chunks belongs to
    its last window. Memory and the cost of an epoch's first batch grow with the number of windows, no other with
    anything.
    """

    def __init__(self, buckets: Sequence[range], batch_size: int, seed: int, *, window: int, chunks: int) -> None:
        """`window`: places that are shuffled among each other, in `chunks` chunks; rounded up so that a window's
        batches are full."""
        assert all(len(bucket) for bucket in buckets)
        self.buckets, self.batch_size, self.seed = list(buckets), batch_size, seed
        self.chunk = -(-window // (chunks * batch_size)) * batch_size
        self.chunks, self.window = chunks, self.chunk * chunks
        self.batches_per_epoch = sum(-(-len(bucket) // batch_size) for bucket in buckets)
        lengths = np.array([len(bucket) for bucket in buckets])
        counts = -(-lengths // self.window)
        self._lengths = lengths
        self._window_buckets = np.repeat(np.arange(len(buckets)), counts)
        self._window_numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._laid_out = lru_cache(maxsize=2)(self._lay_out)  # the end of an epoch is made beside the next one's start

    def _lay_out(self, epoch: int) -> _Windows:
        order = Permutation(len(self._window_buckets), self.seed, epoch, "windows")
        order_of = order.of(np.arange(order.n))
        buckets, numbers = self._window_buckets[order_of], self._window_numbers[order_of]
        counts = -(-self._window_lengths(buckets, numbers) // self.batch_size)
        return _Windows(buckets, numbers, np.cumsum(counts) - counts)

    def _window_lengths(self, buckets: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.minimum(self.window, self._lengths[buckets] - numbers * self.window)

    def places(self, position: int) -> NDArray[np.int64]:
        epoch, place = divmod(position, self.batches_per_epoch)
        windows = self._laid_out(epoch)
        i = bisect_right(windows.firsts, place) - 1
        k, number = int(windows.buckets[i]), int(windows.numbers[i])
        bucket, begin = self.buckets[k], number * self.window
        length = min(self.window, len(bucket) - begin)
        batches = Permutation(-(-length // self.batch_size), self.seed, epoch, "batches", k, number)
        start = batches(place - int(windows.firsts[i])) * self.batch_size
        within = np.arange(start, min(start + self.batch_size, length))
        dealt = begin + Permutation(length, self.seed, epoch, "samples", k, number).of(within)
        chunk, offset = np.divmod(dealt, self.chunk)
        whole = len(bucket) // self.chunk
        if whole:
            moved = chunk < whole  # the rest at the bucket's end stays there
            chunk[moved] = Permutation(whole, self.seed, epoch, "chunks", k).of(chunk[moved])
        return bucket.start + chunk * self.chunk + offset

    def sizes(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, places = np.divmod(positions, self.batches_per_epoch)
        sizes = np.empty(len(positions), np.int64)
        for j, (epoch, place) in enumerate(zip(epochs.tolist(), places.tolist(), strict=True)):
            windows = self._laid_out(epoch)
            i = bisect_right(windows.firsts, place) - 1
            k, number = int(windows.buckets[i]), int(windows.numbers[i])
            length = min(self.window, len(self.buckets[k]) - number * self.window)
            batches = Permutation(-(-length // self.batch_size), self.seed, epoch, "batches", k, number)
            sizes[j] = min(self.batch_size, length - batches(place - int(windows.firsts[i])) * self.batch_size)
        return sizes

    def state(self) -> dict[str, int | str]:
        return {"kind": "window", "window": self.window, "chunks": self.chunks}
