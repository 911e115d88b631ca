"""Training ends when looks no longer improve by more than they scatter, and not before."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from shared.errors import UserError
from train.early_stop import EarlyStop, EarlyStopOptions, better

GRID = "4 samples x 4 times"


def stop(**changes: Any) -> EarlyStop:
    options = EarlyStopOptions(**{"patience": 3, **changes})
    options.check()
    return EarlyStop(options)


def scattered(mean: float, seed: int, *, count: int = 16, own: float = 0.3, look: float = 0.001) -> list[float]:
    """Losses as looks give them: samples differ by far more than one sample does between looks."""
    samples, noise = random.Random(0), random.Random(seed)
    return [mean + samples.gauss(0, own) + noise.gauss(0, look) for _ in range(count)]


def looks(made: EarlyStop, means: list[float], **of: Any) -> list[int]:
    """The steps (10, 20, ...) of looks that were the best; it ends where the run would."""
    best = []
    for i, mean in enumerate(means, 1):
        if made.look(10 * i, scattered(mean, i, **of), GRID):
            best.append(10 * i)
        if made.asks:
            break
    return best


def test_it_ends_after_as_many_looks_without_improvement_as_it_has_patience() -> None:
    made = stop()
    assert looks(made, [0.9, 0.8, 0.7, *[0.7] * 20], look=0.0) == [10, 20, 30]
    assert (made.best_step, made.looks_since, made.asks) == (30, 3, True)
    assert "no better in the last 3 looks than after step 30" in made.words()


def test_a_difference_far_below_the_scatter_of_samples_counts_where_it_is_the_same_in_each() -> None:
    assert better(scattered(0.500, 1), scattered(0.502, 2), 1.0)
    assert not better(scattered(0.500, 1, look=0.3), scattered(0.502, 2, look=0.3), 1.0)


def test_an_improvement_within_the_error_of_the_paired_difference_is_none() -> None:
    best, errors = [1.0, 1.0, 1.0, 1.0], (0.1, 0.3, -0.1, 0.1)  # mean 0.1, standard error 0.0816
    found = [old - by for old, by in zip(best, errors, strict=True)]
    assert better(found, best, 1.2)
    assert not better(found, best, 1.25)
    assert not better(best, found, 0.0)


def test_no_difference_is_no_improvement_and_one_sample_has_no_error() -> None:
    assert not better([1.0, 2.0], [1.0, 2.0], 0.0)
    assert better([0.9], [1.0], 2.0)
    assert not better([1.0], [1.0], 0.0)


def test_improvements_too_small_to_be_seen_from_look_to_look_add_up() -> None:
    made = stop(errors=2.0, patience=10)
    falling = [0.7 - 0.0002 * i for i in range(60)]  # per look less than the error of 0.00035
    best = looks(made, falling)
    assert best[-1] > 500
    assert not made.asks


def test_noise_alone_ends_the_run() -> None:
    made = stop(patience=4, errors=2.0)
    looks(made, [0.7] * 60)
    assert made.asks


def test_nothing_counts_against_a_run_before_the_first_step_that_may() -> None:
    made = stop(first_step=100)
    looks(made, [0.7] * 9, look=0.0)
    assert (made.looks_since, made.asks) == (0, False)
    looks_before = made.best_step
    for step in (100, 110, 120):
        assert not made.asks
        made.look(step, scattered(0.7, 0, look=0.0), GRID)
    assert made.asks
    assert made.best_step == looks_before == 10


def test_without_patience_the_best_is_known_but_nothing_ends() -> None:
    made = stop(patience=0)
    looks(made, [0.9] + [0.95] * 50)
    assert made.best_step == 10
    assert not made.asks


def test_a_resumed_run_ends_where_an_undisturbed_one_would() -> None:
    means = [0.9, 0.8, 0.801, 0.799, 0.802, 0.8, 0.8]
    undisturbed = stop()
    looks(undisturbed, means)
    first = stop()
    looks(first, means[:4])
    resumed = stop()
    resumed.load_state(json.loads(json.dumps(first.state())))
    for i, mean in enumerate(means[4:], 5):
        resumed.look(10 * i, scattered(mean, i), GRID)
        if resumed.asks:
            break
    assert resumed.state() == undisturbed.state()
    assert resumed.asks


def test_looks_on_another_grid_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    made = stop()
    made.look(10, [0.1, 0.1], "2 samples x 4 times")
    assert made.look(20, [0.9, 0.9], "2 samples x 8 times")
    assert made.best_step == 20
    assert "looked for from here on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patience": -1}, "early_stop.patience must be 0 or more"),
        ({"first_step": -1}, "early_stop.first_step must be 0 or more"),
        ({"errors": -0.5}, "early_stop.errors must be 0 or more"),
        ({"errors": float("nan")}, "early_stop.errors must be 0 or more"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        stop(**changes)


def test_options_without_effect_are_named() -> None:
    assert EarlyStopOptions(errors=2.0, first_step=5).unused() == ["errors", "first_step"]
    assert EarlyStopOptions(patience=2, errors=2.0).unused() == []
