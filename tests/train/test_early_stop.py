"""Training ends when looks no longer improve by more than they scatter, and not before."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UserError
from tests.train.conftest import losses, metrics, train_options
from train import checkpoints
from train.config import TrainConfig
from train.early_stop import EarlyStop, EarlyStopOptions, better
from train.optimizer import OptimizerOptions
from train.trainer import train

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


# --- in training ----------------------------------------------------------------------------------------------------


def resting(cache: Path, runs: Path, **early_stop: Any) -> TrainConfig:
    """A run of up to 9 steps that learns nothing: no look is better than the first after a step."""
    return train_options(
        cache, runs, steps=9, optimizer={"learning_rate": 1e-12}, checkpoint={"every": 3, "keep": 1},
        validation={"every": 1, "samples": 3, "timesteps": 1}, early_stop={"patience": 3, **early_stop},
    )  # fmt: skip


@pytest.fixture(scope="module")
def ended(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run, ended early."""
    runs = tmp_path_factory.mktemp("runs")
    assert train(resting(tiny_cache, runs)) == 0
    return runs / "run"


def last_start(run: Path) -> dict[str, Any]:
    stated: dict[str, Any] = json.loads((run / "run.json").read_text())["starts"][-1]
    return stated


def test_a_run_that_no_longer_learns_ends_and_says_why(ended: Path) -> None:
    assert last_start(ended)["ended"] == {"step": 4, "why": "early_stop"}
    assert len(losses(ended)) == 4
    assert [checkpoints.step_of(path) for path in checkpoints.all_newest_first(ended)] == [4, 1]


def test_the_best_look_s_checkpoint_is_saved_and_stays_and_is_linked(ended: Path) -> None:
    """No other save is due after the first step, and only the newest is kept besides."""
    assert checkpoints.best(ended) == checkpoints.path_of(ended, 1)
    assert (ended / "best" / "controlnet" / "config.json").is_file()
    assert checkpoints.state(ended / "best")["trainer"]["early_stop"]["best_step"] == 1


def copied(ended: Path, tmp_path: Path) -> Path:
    shutil.copytree(ended, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_the_same_command_again_does_not_train_on_and_more_patience_does(
    ended: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(ended, tmp_path)
    assert train(resting(tiny_cache, tmp_path)) == 0
    said = "has ended at step 4. early_stop: the held-out loss was no better in the last 3 looks"
    assert said in capsys.readouterr().out
    assert len(losses(run)) == 4
    assert train(resting(tiny_cache, tmp_path, patience=5)) == 0
    assert last_start(run)["ended"] == {"step": 6, "why": "early_stop"}
    assert checkpoints.best(run) == checkpoints.path_of(run, 1)


def test_a_kill_before_the_best_was_marked_does_no_harm(ended: Path, tiny_cache: Path, tmp_path: Path) -> None:
    run = copied(ended, tmp_path)
    (run / "best").unlink()
    assert train(resting(tiny_cache, tmp_path)) == 0
    assert checkpoints.best(run) == checkpoints.path_of(run, 1)


def test_a_run_that_was_stopped_ends_early_where_an_undisturbed_one_does(
    ended: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    options = resting(tiny_cache, tmp_path)
    assert train(dataclasses.replace(options, steps=2)) == 0
    assert train(options) == 0
    run = tmp_path / "run"
    assert last_start(run)["ended"] == {"step": 4, "why": "early_stop"}
    assert metrics(run) == metrics(ended)
    one, other = (checkpoints.state(checkpoints.path_of(each, 4))["trainer"] for each in (run, ended))
    assert one == other


def test_a_run_that_learns_is_not_ended(tiny_cache: Path, tmp_path: Path) -> None:
    options = resting(tiny_cache, tmp_path, patience=1)
    assert train(dataclasses.replace(options, steps=4, optimizer=OptimizerOptions(learning_rate=3e-3))) == 0
    assert last_start(tmp_path / "run")["ended"] == {"step": 4, "why": "trained"}
    best = checkpoints.best(tmp_path / "run")
    assert best is not None
    assert checkpoints.step_of(best) > 1


def test_a_run_without_looks_cannot_end_early(tiny_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set validation.every above 0"):
        train_options(tiny_cache, tmp_path, early_stop={"patience": 2})


# --- options --------------------------------------------------------------------------------------------------------


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
