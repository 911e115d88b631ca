"""Every place once per epoch, at random, the same for the same seed, and nothing stored for any of it."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from train.order import GlobalOrder, Order, Permutation, WindowOrder, uniform

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 97, 100, 101, 1009]


def buckets_of(*lengths: int) -> list[range]:
    """Ranges one after the other."""
    stops = np.cumsum(lengths).tolist()
    return [range(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]


def orders(buckets: list[range], batch_size: int, seed: int = 0) -> list[Order]:
    return [
        GlobalOrder(buckets, batch_size, seed),
        WindowOrder(buckets, batch_size, seed, window=12, chunks=3),
        WindowOrder(buckets, batch_size, seed, window=1, chunks=1),
        WindowOrder(buckets, batch_size, seed, window=4096, chunks=8),
    ]


def epoch(order: Order, number: int = 0) -> list[list[int]]:
    first = number * order.batches_per_epoch
    return [order.places(first + i).tolist() for i in range(order.batches_per_epoch)]


# --- permutations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_a_permutation_has_every_number_once(n: int) -> None:
    for seed in range(20):
        permutation = Permutation(n, seed)
        assert sorted(permutation.of(np.arange(n)).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [*SIZES, 10**6 + 3, 10**8, 2**40])
def test_one_place_and_many_at_once_give_the_same_numbers(n: int) -> None:
    permutation = Permutation(n, 5, "purpose")
    places = np.unique(np.linspace(0, n - 1, 300).astype(np.int64))
    many = permutation.of(places).tolist()
    assert many == [permutation(place) for place in places.tolist()]
    assert len(set(many)) == len(many)
    assert 0 <= min(many) <= max(many) < n


def test_what_it_is_for_makes_another_permutation() -> None:
    drawn = {tuple(Permutation(50, *what).of(np.arange(50)).tolist()) for what in itertools.product(range(3), range(3))}
    drawn |= {tuple(Permutation(50, 0, 0, purpose).of(np.arange(50)).tolist()) for purpose in ("a", "b")}
    assert len(drawn) == 11


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_things_are_equally_likely(n: int) -> None:
    draws, orders = 100 * math.factorial(n), math.factorial(n)
    counts = Counter(tuple(Permutation(n, seed, "few")(i) for i in range(n)) for seed in range(draws))
    assert len(counts) == orders
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    freedom = orders - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations


def test_where_a_number_comes_and_what_it_comes_after_is_even() -> None:
    n = 64
    places, neighbours = np.zeros((n, n)), np.zeros(n)
    for seed in range(1500):
        order = Permutation(n, seed).of(np.arange(n))
        places[np.arange(n), order] += 1
        neighbours += np.bincount(np.diff(order) % n, minlength=n)
    expected = 1500 / n
    assert np.abs(places - expected).max() < 6 * math.sqrt(expected)
    step = neighbours[1:]  # by how much the next number is larger
    assert np.abs(step - step.mean()).max() < 6 * math.sqrt(step.mean())


def test_a_permutation_keeps_nothing_for_each_number() -> None:
    permutation = Permutation(10**12, 0)
    assert sum(sys.getsizeof(value) for value in vars(permutation).values()) < 1000


def test_draws_are_even_and_those_of_one_number_independent_of_the_others_asked_for() -> None:
    numbers = np.arange(20_000)
    draws = uniform(3, numbers, 7, 1, "choice")
    assert draws.shape == (3, 20_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    for row in draws:
        counts = np.histogram(row, bins=50, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 49 + 5 * math.sqrt(98)
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.04
    assert np.array_equal(uniform(3, numbers[[5, 17]], 7, 1, "choice"), draws[:, [5, 17]])
    assert not np.array_equal(uniform(3, numbers, 8, 1, "choice"), draws)


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [(1,), (2,), (3,), (7,), (13,), (1, 1, 1), (5, 1, 13), (29, 2, 40, 97)])
def test_every_place_comes_once_in_every_epoch_and_a_batch_is_of_one_bucket(
    lengths: tuple[int, ...], batch_size: int
) -> None:
    buckets = buckets_of(*lengths)
    for order in orders(buckets, batch_size):
        assert order.batches_per_epoch == sum(-(-length // batch_size) for length in lengths)
        for number in range(3):
            batches = epoch(order, number)
            assert sorted(itertools.chain(*batches)) == list(range(sum(lengths)))
            for batch in batches:
                assert 1 <= len(batch) <= batch_size
                assert sum(any(place in bucket for place in batch) for bucket in buckets) == 1
            full = sum(len(batch) == batch_size for batch in batches)
            assert full == sum(length // batch_size for length in lengths)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_size_of_a_batch_is_known_without_its_places(batch_size: int) -> None:
    for order in orders(buckets_of(29, 2, 40, 97), batch_size):
        positions = np.arange(5, 2 * order.batches_per_epoch + 5)
        assert order.sizes(positions).tolist() == [len(order.places(position)) for position in positions.tolist()]


def test_a_seed_is_an_order_and_epochs_differ() -> None:
    buckets = buckets_of(29, 40)
    for one, again, other in zip(orders(buckets, 3, 1), orders(buckets, 3, 1), orders(buckets, 3, 2), strict=True):
        assert epoch(one) == epoch(again)
        assert epoch(one) != epoch(other)
        assert epoch(one, 0) != epoch(one, 1)


def test_a_position_gives_the_same_whatever_was_asked_before() -> None:
    buckets = buckets_of(29, 40)
    for order, fresh in zip(orders(buckets, 3), orders(buckets, 3), strict=True):
        [epoch(order, number) for number in (0, 5, 2)]
        position = 3 * order.batches_per_epoch + 4
        assert order.places(position).tolist() == fresh.places(position).tolist()


def test_who_shares_a_batch_changes_from_epoch_to_epoch() -> None:
    order = GlobalOrder(buckets_of(96), 4, 0)
    batches = [sorted(batch) for number in range(20) for batch in epoch(order, number)]
    pairs = Counter(pair for batch in batches for pair in itertools.combinations(batch, 2))
    assert max(pairs.values()) <= 6  # 0.6 times on average


# --- windows --------------------------------------------------------------------------------------------------------


def chunks_of(order: WindowOrder, batches: list[list[int]]) -> set[tuple[int, int]]:
    """(bucket, chunk) that the batches touch."""
    return {
        (k, (place - bucket.start) // order.chunk)
        for batch in batches
        for place in batch
        for k, bucket in enumerate(order.buckets)
        if place in bucket
    }


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_run_of_batches_touches_few_chunks_and_goes_on_to_others(batch_size: int) -> None:
    order = WindowOrder(buckets_of(1000, 37, 600), batch_size, 0, window=96, chunks=4)
    batches, run = epoch(order), order.window // batch_size
    everywhere = chunks_of(order, batches)
    for i in range(0, len(batches) - run):
        # The run may begin in one window and end in the next; one more is a short one at a bucket's end.
        assert len(chunks_of(order, batches[i : i + run])) <= 3 * order.chunks
    assert len(everywhere) > 12 * order.chunks


def test_a_window_is_shuffled_as_a_whole() -> None:
    order = WindowOrder(buckets_of(10_000), 4, 0, window=64, chunks=4)
    batches = epoch(order)
    first = batches[: order.window // 4]
    assert len(chunks_of(order, first)) == 4
    apart = [len(chunks_of(order, [batch])) for batch in first]
    assert np.mean(apart) > 2.3  # four draws from four chunks touch 2.7 on average


def test_chunks_meet_others_in_every_epoch() -> None:
    order = WindowOrder(buckets_of(640), 4, 0, window=64, chunks=4)
    run = order.window // 4

    def windows(number: int) -> set[frozenset[Any]]:
        batches = epoch(order, number)
        return {frozenset(chunks_of(order, batches[i : i + run])) for i in range(0, len(batches), run)}

    assert all(len(window) == 4 for window in windows(0))
    assert len(windows(0) & windows(1)) <= 1


def test_windows_come_in_another_order_in_every_epoch_those_of_all_buckets_mixed() -> None:
    order = WindowOrder(buckets_of(320, 320), 4, 0, window=32, chunks=4)
    turns = [tuple(batch[0] < 320 for batch in epoch(order, number)[::8]) for number in range(6)]
    assert len(set(turns)) == 6
    assert all(sum(turn) == 10 for turn in turns)


def test_a_window_is_rounded_up_to_full_batches_and_says_so_in_its_state() -> None:
    order = WindowOrder(buckets_of(100), 8, 0, window=20, chunks=4)
    assert (order.chunk, order.window) == (8, 32)
    assert order.state() == {"kind": "window", "window": 32, "chunks": 4}
    again = WindowOrder(buckets_of(100), 8, 0, window=32, chunks=4)
    assert epoch(again) == epoch(order)


@pytest.mark.parametrize("n", [10**3, 10**8])
def test_what_a_batch_costs_does_not_depend_on_the_number_of_places(n: int) -> None:
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for order in (GlobalOrder([range(n)], 8, 0), WindowOrder([range(n)], 8, 0, window=512, chunks=8)):
        order.places(0)  # lays out the windows of the epoch
        sys.setprofile(count)
        try:
            for position in range(20):
                order.places(position)
        finally:
            sys.setprofile(None)
    assert calls < 40 * 800  # as with a thousand: some hundred for each batch
