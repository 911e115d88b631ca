"""Map a function over threads: in order, a bounded number of items ahead of whoever takes the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Ahead(Generic[T, R]):
    """`function` of each item, in order, by the threads of `pool`, begun at once: up to `ahead` results are waiting or
    in the making before anyone asks for the first, and while whoever takes them is busy with one.

    `items` is iterated in the caller's thread.
    """

    def __init__(self, function: Callable[[T], R], items: Iterable[T], pool: Executor, ahead: int) -> None:
        self._function, self._items, self._pool = function, iter(items), pool
        self._waiting: deque[Future[R]] = deque()
        for _ in range(ahead):
            self._begin_one()

    def _begin_one(self) -> None:
        for item in self._items:
            self._waiting.append(self._pool.submit(self._function, item))
            return

    def __iter__(self) -> Iterator[R]:
        return self

    def __next__(self) -> R:
        self._begin_one()
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft().result()

    def close(self) -> None:
        """What has not begun never does begin."""
        for future in self._waiting:
            future.cancel()


def mapped(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Iterator[R]:
    """`function` of each item, in order, by `workers` threads. Up to `ahead` results are waiting or in the making while
    the caller is busy with one: enough to keep it busy, and no more memory, whatever the number of items.

    `items` is iterated in the caller's thread. Where the caller stops (an error, Ctrl-C), what has not begun never does
    begin.
    """
    with ThreadPoolExecutor(workers) as pool, closing(Ahead(function, items, pool, ahead)) as results:
        yield from results
