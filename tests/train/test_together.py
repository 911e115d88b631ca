"""Side by side on one frozen base, every run is the one that it would be alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import EXIT_INCOMPLETE, UserError
from tests.train.conftest import controlnet_bytes, flux, metrics, train_options
from train import recompute, together
from train.budget import GIB
from train.config import TrainConfig
from train.memory_plan import least_bytes, resting_bytes
from train.models import Base
from train.objectives import FlowMatching, Noised
from train.preparation import Prepared, begin, setting_of
from train.step import Step
from train.together import train_together
from train.trainer import open_base, train

HELD = {"hoist": "yes", "hoist_steps": 3, "stream": "yes"}


def three(cache: Path, runs: Path, **changes: Any) -> list[TrainConfig]:
    """Runs that have nothing in common but the base and the number of steps: other depths, batches, seeds, rates and
    other blocks recomputed."""

    def run(name: str, depth: str, seed: int, memory: dict[str, Any], **more: Any) -> TrainConfig:
        looks = {"every": 3, "samples": 2, "timesteps": 2}
        parts = {"memory": {**HELD, **memory}, "validation": looks, **more, **changes}
        return train_options(cache, runs, name=name, depth=depth, seed=seed, steps=5, **parts)

    return [
        run("a", "1-1", 0, {"recompute": "2"}, checkpoint={"every": 2}),
        run("b", "0-2", 3, {"recompute": "none"}, loader={"batch_size": 1, "accumulation": 2}),
        run("c", "2-0", 0, {"recompute": "all"}, optimizer={"learning_rate": 1e-2}, controlnet={"guidance": 2.0}),
    ]


@pytest.fixture(scope="module")
def alone(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the three runs, each trained by itself."""
    runs = tmp_path_factory.mktemp("alone")
    for options in three(tiny_cache, runs):
        assert train(options) == 0
    return runs


@pytest.fixture(scope="module")
def shared(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the three, trained together."""
    runs = tmp_path_factory.mktemp("shared")
    noted: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        opened: list[int] = []

        def open_once(prepared: Sequence[Prepared], attention: str) -> Base:
            opened.append(len(prepared))
            return open_base(prepared, attention)

        patch.setattr(together, "open_base", open_once)
        assert train_together(three(tiny_cache, runs), noted.__setitem__) == 0
    assert opened == [3]
    assert noted == {name: {"outcome": "trained", "step": 5} for name in "abc"}
    return runs


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_every_run_is_to_the_bit_what_it_is_alone(alone: Path, shared: Path, name: str) -> None:
    assert metrics(shared / name) == metrics(alone / name)
    assert len(metrics(shared / name)) == 5 + 3
    assert controlnet_bytes(shared / name) == controlnet_bytes(alone / name)


def test_they_take_turns_step_by_step_hold_no_gradients_between_and_recompute_each_its_own(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[int, int]] = []
    graded: list[int] = []
    recomputed: list[tuple[int, int]] = []
    call, steps, apply = Step.__call__, [], recompute.apply

    def taken(self: Step, batches: Any, step: int, rate: float) -> dict[str, float]:
        if self not in steps:
            steps.append(self)
        graded.append(sum(p.grad is not None for other in steps for p in other.optimizer.parameters.values()))
        turns.append((steps.index(self), step))
        recomputed.append(now[-1])
        return call(self, batches, step, rate)

    now: list[tuple[int, int]] = []

    def applied(family: Any, base: Any, controlnet: Any, *blocks: int, **named: int) -> tuple[int, int]:
        now.append(apply(family, base, controlnet, *blocks, **named))
        return now[-1]

    monkeypatch.setattr(Step, "__call__", taken)
    monkeypatch.setattr(recompute, "apply", applied)
    runs = [
        train_options(
            tiny_cache, tmp_path, name=f"run-{i}", depth="1-0", steps=2 + i, memory={"recompute": f"{i + 1}+{i}"}
        )
        for i in range(2)
    ]
    assert train_together(runs) == 0
    assert turns == [(0, 1), (1, 1), (0, 2), (1, 2), (1, 3)]
    assert graded == [0] * 5
    assert recomputed == [(1, 0), (2, 1), (1, 0), (2, 1), (2, 1)]


def test_one_that_fails_is_dropped_and_the_others_are_what_they_would_have_been(
    alone: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = FlowMatching.loss

    def breaks(self: FlowMatching, prediction: torch.Tensor, noised: Noised) -> torch.Tensor:
        return loss(self, prediction, noised) * (torch.nan if self.options.logit_mean == 0.5 else 1)

    monkeypatch.setattr(FlowMatching, "loss", breaks)
    a, b, c = three(tiny_cache, tmp_path)
    b = dataclasses.replace(b, objective=dataclasses.replace(b.objective, logit_mean=0.5))
    too_deep = dataclasses.replace(a, name="deep", depth="3-0")
    noted: dict[str, dict[str, Any]] = {}
    assert train_together([a, b, too_deep, c], noted.__setitem__) == EXIT_INCOMPLETE
    assert {name: state["outcome"] for name, state in noted.items()} == {
        "a": "trained", "b": "failed", "c": "trained", "deep": "failed",
    }  # fmt: skip
    assert "step 1: the loss nan is not finite" in noted["b"]["why"]
    assert "DEPTH 3-0 is deeper than the base" in noted["deep"]["why"]
    assert "b: warning: dropped, the others go on: step 1: the loss nan" in capsys.readouterr().err
    for name in ("a", "c"):
        assert metrics(tmp_path / name) == metrics(alone / name)


def test_each_goes_on_from_its_own_checkpoint(alone: Path, shared: Path, tiny_cache: Path, tmp_path: Path) -> None:
    shutil.copytree(shared / "c", tmp_path / "c", symlinks=True)  # is trained already
    halfway = dataclasses.replace(three(tiny_cache, tmp_path)[0], steps=2)
    assert train(halfway) == 0
    noted: dict[str, dict[str, Any]] = {}
    assert train_together(three(tiny_cache, tmp_path), noted.__setitem__) == 0
    assert noted == {name: {"outcome": "trained", "step": 5} for name in "abc"}
    for name in "abc":
        assert controlnet_bytes(tmp_path / name) == controlnet_bytes(alone / name)
        assert json.loads((tmp_path / name / "run.json").read_text())["starts"][-1]["ended"]["why"] == "trained"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": {"weights": "none"}}, "base is .*int8.* and .*none"),
        ({"precision": "bf16"}, "precision is auto and bf16"),
        ({"memory": {"stream": "no"}}, "memory.stream is auto and no"),
    ],
)
def test_runs_with_different_bases_are_refused(
    tiny_cache: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    runs = [train_options(tiny_cache, tmp_path, name="a"), train_options(tiny_cache, tmp_path, name="b", **changes)]
    with pytest.raises(UserError, match=f"a and b cannot share a base: {words}"):
        train_together(runs)


def test_what_does_not_fit_beside_the_others_follows_when_they_are_done(
    alone: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = three(tiny_cache, tmp_path)
    with ExitStack() as stack:
        begun = [begin(dataclasses.replace(run, name=f"{run.name}-counted"), stack) for run in runs]
        settings = [
            dataclasses.replace(
                setting_of(each.options, torch.device("cpu"), flux(), each.ground.model, each.ground.samples, None),
                batch_size=each.options.loader.batch_size, accumulation=each.options.loader.accumulation,
                hoist=True, stream=True,
            )
            for each in begun if each is not None
        ]  # fmt: skip
    resting, least = [resting_bytes(each) for each in settings], [least_bytes(each) for each in settings]
    both = max(least[0] + resting[1], least[1] + resting[0])
    budget = both + min(resting) // 2
    assert budget < min(least[i] + sum(resting) - resting[i] for i in range(3)), "three would fit"
    assert budget >= least[2]
    held = [
        dataclasses.replace(
            run, memory=dataclasses.replace(run.memory, budget=f"{budget / GIB:.12f}GiB", recompute="auto")
        )
        for run in runs
    ]
    assert train_together(held) == 0
    said = capsys.readouterr().out
    assert "side by side, 1 of 2: a, b" in said
    assert "side by side, 2 of 2: c" in said
    for name in "abc":
        assert metrics(tmp_path / name) == metrics(alone / name)
        memory = json.loads((tmp_path / name / "run.json").read_text())["starts"][-1]["memory"]
        beside = {"a": resting[1], "b": resting[0], "c": 0}[name]
        assert memory["budget_gib"] == pytest.approx((budget - beside) / GIB, abs=1e-3)
