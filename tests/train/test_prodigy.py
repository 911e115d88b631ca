"""Prodigy steps as its library does, resumes to the bit, and finds a step size of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import UserError
from tests.train.conftest import content, losses, metrics, train_options
from train.config import TrainConfig
from train.optimizer import OptimizerOptions, make
from train.prodigy import Prodigy
from train.trainer import train

prodigyopt = pytest.importorskip("prodigyopt")


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    named = {"a": torch.randn(6, 5, generator=draw), "b": torch.zeros(7), "idle": torch.ones(2)}
    return {name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in named.items()}


def give_gradients(parameters: dict[str, torch.nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for name, parameter in parameters.items():
        if name != "idle":
            parameter.grad = torch.randn(parameter.shape, generator=draw) + 1


def options(**changes: Any) -> OptimizerOptions:
    made = OptimizerOptions(**{"kind": "prodigy", "learning_rate": 1.0, "clip_norm": 0.0, **changes})
    made.check()
    return made


def step(optimizer: Any, parameters: dict[str, torch.nn.Parameter], number: int) -> Any:
    optimizer.begin(1.0, None)
    give_gradients(parameters, number)
    return optimizer.finish(optimizer.norm().item())


def test_it_steps_as_the_library_does_to_the_bit_and_says_how_far() -> None:
    ours, theirs = weights(), weights()
    optimizer = make(options(weight_decay=0.02), ours)
    assert isinstance(optimizer, Prodigy)
    expected = prodigyopt.Prodigy(
        theirs.values(), lr=1.0, weight_decay=0.02, use_bias_correction=True, safeguard_warmup=True
    )
    for number in range(1, 6):
        before = {name: p.detach().clone() for name, p in ours.items()}
        update = step(optimizer, ours, number)
        give_gradients(theirs, number)
        expected.step()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        moved = torch.cat([(ours[name] - before[name]).flatten() for name in ours]).norm()
        torch.testing.assert_close(update.norm, moved)
        assert update.found.item() == pytest.approx(expected.param_groups[0]["d"])
    assert optimizer.num_updates == 5


@pytest.mark.parametrize("clip", ["global", "parameter"])
def test_gradients_are_clipped(clip: Any) -> None:
    parameters = weights()
    optimizer = make(options(clip_norm=0.1, clip=clip), parameters)
    step(optimizer, parameters, 1)
    norms = [parameters[name].grad.norm().item() for name in ("a", "b")]  # type: ignore[union-attr]
    expected = 0.1 if clip == "global" else 0.1 * 2**0.5
    assert (norms[0] ** 2 + norms[1] ** 2) ** 0.5 == pytest.approx(expected, rel=1e-4)


def test_a_saved_one_goes_on_to_the_bit() -> None:
    whole, first = weights(), weights()
    one, two = make(options(), whole), make(options(), first)
    for number in range(1, 41):
        step(one, whole, number)
        step(two, first, number)
    tensors, meta = two.state()
    resumed = make(options(), first)
    resumed.load_state(tensors, meta)
    assert meta["found"]["d"] > 2e-6  # else it would not matter what was found
    for number in range(41, 46):
        assert step(one, whole, number).found == step(resumed, first, number).found
    assert all(torch.equal(whole[name], first[name]) for name in whole)


def test_the_state_of_another_kind_or_of_other_weights_is_refused() -> None:
    adamw = make(OptimizerOptions(kind="adamw"), weights())
    with pytest.raises(UserError, match=r"the saved optimizer is 'adamw', but optimizer\.kind is 'prodigy'"):
        make(options(), weights()).load_state(*adamw.state())
    parameters = weights()
    optimizer = make(options(), parameters)
    step(optimizer, parameters, 1)
    with pytest.raises(UserError, match="has states of 'b', which is not trained here"):
        make(options(), {"a": weights()["a"]}).load_state(*optimizer.state())


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"with optimizer\.kind prodigy it is a factor, set it to 1"):
        options(learning_rate=2e-5)
    for changes in ({"states": "cpu"}, {"master": True}, {"release": True, "clip": "parameter"}):
        with pytest.raises(UserError, match="is not for prodigy"):
            options(**changes)
    with pytest.raises(UserError, match=r"steps float32 weights, and 'a' is torch\.bfloat16"):
        make(options(), weights(torch.bfloat16))


def run_options(cache: Path, runs: Path, **changes: Any) -> TrainConfig:
    return train_options(
        cache, runs, adapter="lora", checkpoint={"every": 40, "keep": 0},
        optimizer={"kind": "prodigy", "learning_rate": 1.0, "warmup_steps": 0}, **changes,
    )  # fmt: skip


def test_a_lora_s_run_finds_its_step_size_and_resumes_to_the_bit(tiny_cache: Path, tmp_path: Path) -> None:
    assert train(run_options(tiny_cache, tmp_path, name="whole", steps=40)) == 0
    for steps in (3, 40):
        assert train(run_options(tiny_cache, tmp_path, name="resumed", steps=steps)) == 0
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert content(tmp_path / "resumed" / "lora") == content(tmp_path / "whole" / "lora")
    found = [line["found_step_size"] for line in metrics(tmp_path / "whole") if "found_step_size" in line]
    assert found == sorted(found)
    assert found[-1] > 2 * found[0]
