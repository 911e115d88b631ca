"""A sudden rise is found where it is, and nowhere else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from train.convergence import Convergence, find

STEPS = list(range(0, 10_001, 250))
S = np.array(STEPS, float)


def noise(seed: int, scale: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, len(STEPS))


@pytest.mark.parametrize("at", [1500, 4000, 8000])
@pytest.mark.parametrize("scale", [0.002, 0.02])
def test_a_sudden_rise_is_found_where_it_is(at: int, scale: float) -> None:
    for seed in range(10):
        found = find(STEPS, list(np.where(at < S, 0.2, 0.05) + noise(seed, scale)))
        assert found is not None
        assert abs(found.step - at) <= 250
        assert found.begun <= at < found.done
        assert found.before == pytest.approx(0.05, abs=4 * scale)
        assert found.after == pytest.approx(0.2, abs=4 * scale)


def test_a_rise_over_some_looks_is_marked_at_its_half() -> None:
    found = find(STEPS, list(0.15 / (1 + np.exp(-(S - 6000) / 300)) + noise(0, 0.004)))
    assert found is not None
    assert abs(found.step - 6000) <= 250
    assert found.begun < 5500 < 6500 < found.done


@pytest.mark.parametrize("curve", [
    0 * S,
    0.15 * S / S[-1],
    0.15 * np.sqrt(S / S[-1]),
    *(0.15 * (1 - np.exp(-S / rate)) for rate in (100, 300, 1000, 3000)),
    0.15 / (1 + np.exp(-(S - 5000) / 2000)),
    np.where(S > 4000, 0.0, 0.15),
    np.where(S > 9800, 0.15, 0.0),
], ids=["noise", "line", "root", "at once", "soon", "later", "slowly", "wide", "fall", "not yet over"])  # fmt: skip
def test_noise_and_gradual_rises_are_no_sudden_convergence(curve: np.ndarray) -> None:
    assert [find(STEPS, list(curve + noise(seed, 0.005))) for seed in range(10)] == [None] * 10


def test_the_demo_s_curve_rises_gradually() -> None:
    gaps = [0.0, 0.054, 0.079, 0.113, 0.145, 0.154, 0.184, 0.19, 0.191, 0.192]
    assert find([100 * i for i in range(10)], gaps) is None


def test_a_rise_within_the_errors_is_none() -> None:
    values = list(np.where(S > 4000, 0.2, 0.05) + noise(0, 0.002))
    assert find(STEPS, values, [0.01] * len(S)) is not None
    assert find(STEPS, values, [float("nan")] * len(S)) == find(STEPS, values)
    assert find(STEPS, values, [0.2] * len(S)) is None


def test_a_few_looks_say_nothing() -> None:
    assert find([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1]) is None
    assert find([], []) is None


def test_unequal_distances_of_looks_do_not_move_it() -> None:
    steps = [0, 100, 200, 300, 400, 500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500, 5000]
    values = [0.9 if step > 2000 else 0.1 for step in steps]
    found = find(steps, list(np.array(values) + np.random.default_rng(0).normal(0, 0.01, len(steps))))
    assert found is not None
    assert found.begun <= 2000 < found.done


def test_what_is_found_is_json() -> None:
    found = Convergence(4000, 0.1, 0.2, 3750, 4250)
    assert json.loads(json.dumps(found.as_dict())) == {
        "step": 4000, "before": 0.1, "after": 0.2, "begun": 3750, "done": 4250,
    }  # fmt: skip
