"""Predicted step times: against predictions that were made by other means, and within what is possible."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from train.counting import Setting
from train.memory_plan import count
from train.optimizer import OptimizerOptions
from train.roofline import GPUS, predict, product_seconds

MILLISECONDS = {
    (512, 512): {"a100": 323, "h200": 109, "a100, int8": 239, "a100, quanto": 408},
    (512, 77): {"a100": 236, "a100, int8": 167, "a100, quanto": 300},
}
"""Of DEPTH 2-4 at batch 1: compiled and hoisted, the same with int8 products, quanto's layer uncompiled."""


def setting(px: int, T: int, **more: Any) -> Setting:
    return Setting((2, 4), px, px, T, **more)


@pytest.mark.parametrize(("px", "T"), MILLISECONDS)
def test_predictions_are_those_of_the_table(px: int, T: int) -> None:
    ours, theirs = count(setting(px, T)), count(setting(px, T, base="quanto", hoist=False))
    predicted = {
        "a100": predict(ours, GPUS["a100"], compiled=True),
        "h200": predict(ours, GPUS["h200"], compiled=True),
        "a100, int8": predict(ours, GPUS["a100"], compiled=True, arithmetic="int8"),
        "a100, quanto": predict(theirs, GPUS["a100"], compiled=False),
    }
    expected = MILLISECONDS[px, T]
    assert {name: predicted[name].seconds * 1e3 for name in expected} == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", GPUS)
def test_no_product_is_faster_than_the_card(name: str) -> None:
    gpu = GPUS[name]
    rate = gpu.flops * gpu.product_share
    for m, n, k in ((1, 3072, 3072), (77, 12288, 3072), (1536, 3072, 15360), (8192, 8192, 8192)):
        seconds = product_seconds(gpu, m, n, k, rate, 2, 2)
        assert seconds >= 2 * m * n * k / rate
        assert seconds >= 2 * (m * k + n * k + m * n) / gpu.bytes_per_second
    best = 2 * 8192**3 / rate
    assert product_seconds(gpu, 8192, 8192, 8192, rate, 2, 2) < 1.1 * best


def test_recomputing_and_accumulating_take_their_time() -> None:
    one = setting(512, 77)
    gpu = GPUS["a100"]
    kept, again = (predict(count(one, *blocks), gpu, compiled=True).seconds for blocks in ((0, 0), (57, 6)))
    assert 1.3 < again / kept < 1.6
    twice = predict(count(replace(one, accumulation=2)), gpu, compiled=True).seconds
    assert 1.8 < twice / kept < 2


def test_a_streamed_base_is_hidden_behind_a_step_that_is_longer_than_its_copies() -> None:
    gpu = GPUS["4090"]
    streamed = predict(count(setting(512, 77, stream=True)), gpu, compiled=True)
    assert streamed.seconds == streamed.bus_seconds == pytest.approx(0.69, rel=0.02)
    slow = replace(gpu, product_share=gpu.product_share / 10)
    hidden = predict(count(setting(512, 77, stream=True)), slow, compiled=True)
    assert hidden.seconds == predict(count(setting(512, 77)), slow, compiled=True).seconds


def test_states_on_the_host_are_not_hidden() -> None:
    gpu = GPUS["a100"]
    kept, away = (
        predict(count(setting(512, 77, optimizer=OptimizerOptions(states=states))), gpu, compiled=True)
        for states in ("device", "cpu")
    )
    assert away.seconds - kept.seconds == pytest.approx(2 * 1.348e9 / gpu.bus_bytes_per_second, rel=0.02)
