"""The average of the weights is the one its formula says, moves in float32, and touches nothing that trains."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetModel
from safetensors.torch import load_file

from shared.errors import UserError
from shared.model_folder import resolve
from tests.train.conftest import content, controlnet_bytes, flux, losses, metrics, train_options
from train import checkpoints, ema
from train.adapters.controlnet import read_model, write_model
from train.config import TrainConfig
from train.counting import Setting
from train.ema import Ema, EmaOptions, exponent_of, kept_share
from train.memory_plan import cheapest_change, count
from train.trainer import train

DTYPES = (torch.float32, torch.bfloat16)
CHUNK = 64  # smaller than the largest weight, and no multiple of any


def options(**changes: Any) -> EmaOptions:
    made = EmaOptions(**{"profile": "power", "every": 1, **changes})
    made.check()
    return made


def weights_of(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    """Of a network whose weights share chunks and span them."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"large": (37, 7), "small": (5,), "scalar": (), "other": (9, 11)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in shapes.items()
    }  # fmt: skip


@torch.no_grad()
def move(weights: dict[str, torch.nn.Parameter], step: int) -> None:
    """Training, as far as the average is concerned."""
    draw = torch.Generator().manual_seed(step)
    for weight in weights.values():
        weight.add_(torch.randn(weight.shape, generator=draw).to(weight.dtype))


def averaged(dtype: torch.dtype, steps: int = 12, **changes: Any) -> tuple[Ema, list[dict[str, torch.Tensor]]]:
    """After so many steps: the average, and the weights before the first step and after each, as float64."""
    weights = weights_of(dtype)
    elsewhere = changes.pop("elsewhere", None)
    made = Ema(options(**changes), weights, chunk_numel=CHUNK, elsewhere=elsewhere)
    seen = [{name: weight.detach().double() for name, weight in weights.items()}]
    for step in range(1, steps + 1):
        move(weights, step)
        made.update(step)
        seen.append({name: weight.detach().double() for name, weight in weights.items()})
    made.wait()
    return made, seen


# --- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_power_profile_is_the_mean_over_steps_weighted_by_a_power_of_their_number(dtype: torch.dtype) -> None:
    made, seen = averaged(dtype, steps=12, width=0.15)
    gamma = exponent_of(0.15)
    # What one update after another comes to: step s has the area of t^gamma between s - 1 and s.
    shares = [(s / 12) ** (gamma + 1) - ((s - 1) / 12) ** (gamma + 1) for s in range(1, 13)]
    assert math.fsum(shares) == pytest.approx(1)
    for name, average in made.average.items():
        expected = sum((share * seen[s][name] for s, share in enumerate(shares, 1)), torch.zeros(()).double())
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_the_width_is_the_standard_deviation_of_the_weighted_steps_as_a_share_of_the_run(width: float) -> None:
    t = torch.arange(1, 100_001).double() / 100_000
    share = t ** exponent_of(width)
    share /= share.sum()
    mean = (share * t).sum()
    assert ((share * (t - mean) ** 2).sum().sqrt()).item() == pytest.approx(width, rel=1e-3)


def test_the_width_of_a_tenth_is_the_exponent_that_the_paper_states() -> None:
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_constant_profile_forgets_by_its_decay_and_faster_at_first(dtype: torch.dtype) -> None:
    made, seen = averaged(dtype, steps=40, profile="constant", decay=0.6)
    assert kept_share(made.options, 1) == 2 / 11
    assert kept_share(made.options, 40) == 0.6
    for name, average in made.average.items():
        expected = seen[0][name]
        for step in range(1, 41):
            beta = min(0.6, (1 + step) / (10 + step))
            expected = beta * expected + (1 - beta) * seen[step][name]
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_update_every_few_steps_counts_for_all_of_them() -> None:
    made, seen = averaged(torch.float32, steps=11, every=5)
    beta = (1 - 5 / 10) ** (exponent_of(0.1) + 1)
    for name, average in made.average.items():  # the first, after step 5, keeps nothing
        expected = beta * seen[5][name] + (1 - beta) * seen[10][name]
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
    assert kept_share(options(profile="constant", decay=0.9, every=5), 1000) == pytest.approx(0.9**5)


def test_bf16_weights_do_not_swallow_small_moves_of_the_average() -> None:
    weight = {"w": torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))}
    made = Ema(options(profile="constant", decay=0.9999), weight)
    with torch.no_grad():
        weight["w"].fill_(1.0078125)  # the next number in bfloat16
    for step in range(100_001, 100_101):
        made.update(step)
    assert made.average["w"].dtype == torch.float32
    expected = 1 + 0.0078125 * (1 - 0.9999**100)
    assert made.average["w"].mean().item() == pytest.approx(
        expected, abs=1e-5
    )  # float32's own rounding; bfloat16 stays at 1


# --- wherever it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_averaged_by_the_host_s_thread_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    here, _ = averaged(dtype)
    there, _ = averaged(dtype, elsewhere=True)
    there.close()
    for name, average in here.average.items():
        assert torch.equal(average, there.average[name])


def test_an_error_of_the_thread_is_not_lost() -> None:
    weights = weights_of(torch.float32)
    made = Ema(options(), weights, elsewhere=True)
    made.average["large"] = torch.zeros(3)
    made.update(1)
    with pytest.raises(RuntimeError):
        made.wait()
    made.close()


@pytest.mark.parametrize("elsewhere", [None, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_its_place_the_weights_are_the_average_and_afterwards_what_they_were(
    dtype: torch.dtype, elsewhere: bool | None
) -> None:
    weights = weights_of(dtype)
    made = Ema(options(), weights, chunk_numel=CHUNK, elsewhere=elsewhere)
    for step in (1, 2, 3):
        move(weights, step)
        made.update(step)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    average: dict[str, torch.Tensor] = {}

    def look() -> None:
        with made.in_place():
            for name, weight in weights.items():
                assert torch.equal(weight, made.average[name].to(dtype))
                assert weight.numel() == 1 or not torch.equal(weight, before[name])
                average[name] = made.average[name].clone()
            raise KeyError("a look that fails")

    with pytest.raises(KeyError, match="a look that fails"):
        look()
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])
        assert torch.equal(made.average[name], average[name])
    move(weights, 4)
    made.update(4)  # what lay on the host in between does no harm
    made.wait()
    made.close()
    straight, _ = averaged(dtype, steps=4)
    assert all(torch.equal(straight.average[name], made.average[name]) for name in average)


def test_a_full_host_is_refused_before_anything_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema, "free_host_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"ema.device cpu: the average takes 0.0 GiB of the host's memory"):
        Ema(options(), weights_of(torch.float32))
    Ema(options(device="device"), {"w": torch.zeros(3, device="meta")})  # not the host's


# --- saved ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def controlnet(tiny_model: Path) -> torch.nn.Module:
    model = resolve(str(tiny_model), components=())
    return flux().make_controlnet(model, 1, 1, "copy", torch.float32)


def test_what_is_saved_is_read_by_diffusers_and_gone_on_with_to_the_bit(
    controlnet: torch.nn.Module, tmp_path: Path
) -> None:
    controlnet.to(torch.bfloat16)
    weights = dict(controlnet.named_parameters())
    made = Ema(options(), weights)
    for step in (1, 2, 3):
        move(weights, step)
        made.update(step)
    made.save(tmp_path / "ema", partial(write_model, controlnet))
    read = FluxControlNetModel.from_pretrained(tmp_path / "ema")
    assert read.config["num_layers"] == read.config["num_single_layers"] == 1
    for name, tensor in read.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, made.average[name])
    resumed = Ema(options(), weights)
    resumed.load(read_model(tmp_path / "ema"))
    move(weights, 4)
    for each in (made, resumed):
        each.update(4)
    assert all(torch.equal(made.average[name], resumed.average[name]) for name in weights)


def test_an_average_of_other_weights_is_refused(controlnet: torch.nn.Module, tmp_path: Path) -> None:
    weights = dict(controlnet.named_parameters())
    Ema(options(), weights).save(tmp_path / "ema", partial(write_model, controlnet))
    with pytest.raises(UserError, match="does not hold the average of this run's weights"):
        Ema(options(), {**weights, "more": torch.zeros(2)}).load(read_model(tmp_path / "ema"))


# --- in training ----------------------------------------------------------------------------------------------------


LOOKED = {"every": 2, "samples": 2, "timesteps": 1}


@pytest.fixture(scope="module")
def runs(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 6 steps: "with" an average, "resumed" after the fourth, both saved after each step, and "without" one."""
    folder = tmp_path_factory.mktemp("runs")
    changes: dict[str, Any] = {"validation": LOOKED}
    average = {"ema": {"profile": "power", "every": 2}, "checkpoint": {"every": 1, "keep": 0}}
    for name, steps, more in (
        ("with", 6, average),
        ("resumed", 4, average),
        ("resumed", 6, average),
        ("without", 6, {}),
    ):
        assert train(train_options(tiny_cache, folder, name=name, steps=steps, **changes, **more)) == 0
    return folder


def ema_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.path_of(run, step) / "ema" / "diffusion_pytorch_model.safetensors")


def test_a_run_keeps_the_average_that_its_own_checkpoints_have(runs: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for step in (2, 4, 6):
        folder = checkpoints.path_of(runs / "with", step)
        beta = (1 - 2 / step) ** (exponent_of(0.1) + 1)
        weights = load_file(folder / "controlnet" / "diffusion_pytorch_model.safetensors")
        expected = {name: beta * expected.get(name, 0.0) + (1 - beta) * weight for name, weight in weights.items()}
    found = ema_of(runs / "with", 6)
    assert found.keys() == expected.keys()
    for name, average in found.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)
    assert all(
        torch.equal(average, ema_of(runs / "with", 4)[name]) for name, average in ema_of(runs / "with", 5).items()
    )


def test_keeping_an_average_and_looking_at_it_changes_nothing_of_what_is_learned(runs: Path) -> None:
    assert losses(runs / "with") == losses(runs / "without")
    assert controlnet_bytes(runs / "with") == controlnet_bytes(runs / "without")


def test_the_line_of_a_step_has_the_norm_of_its_own_update_whenever_it_is_written(runs: Path) -> None:
    """Saving and looking write it at once, otherwise it waits for the next step."""
    norms = {
        name: [line["update_norm"] for line in metrics(runs / name) if "loss" in line] for name in ("with", "without")
    }
    assert norms["with"] == norms["without"]
    assert len(norms["with"]) == 6
    weights = [
        load_file(checkpoints.path_of(runs / "with", step) / "controlnet" / "diffusion_pytorch_model.safetensors")
        for step in range(1, 7)
    ]
    for i, (old, new) in enumerate(itertools.pairwise(weights), 1):
        change = math.sqrt(sum((new[name].double() - old[name]).square().sum().item() for name in new))
        assert norms["with"][i] == pytest.approx(change, rel=1e-3)


def test_held_out_losses_are_those_of_the_average(runs: Path) -> None:
    def held_out(name: str) -> dict[int, float]:
        return {line["step"]: line["held_out"]["loss"] for line in metrics(runs / name) if "held_out" in line}

    averaged, plain = held_out("with"), held_out("without")
    assert averaged.keys() == plain.keys() == {0, 2, 4, 6}
    assert (averaged[0], averaged[2]) == (plain[0], plain[2])  # the first update keeps nothing of what was before
    assert averaged[4] != plain[4]
    assert averaged[6] != plain[6]


def test_a_resumed_run_has_the_same_average_to_the_bit(runs: Path) -> None:
    for step in (5, 6):
        assert content(checkpoints.path_of(runs / "resumed", step) / "ema") == content(
            checkpoints.path_of(runs / "with", step) / "ema"
        )
    assert metrics(runs / "resumed") == metrics(runs / "with")


def test_another_average_is_another_experiment_but_where_it_is_kept_is_not(runs: Path, tiny_cache: Path) -> None:
    def options(**ema: Any) -> TrainConfig:
        return train_options(
            tiny_cache, runs, name="with", validation=LOOKED, checkpoint={"every": 1, "keep": 0},
            ema={"profile": "power", "every": 2, **ema},
        )  # fmt: skip

    with pytest.raises(UserError, match=r"holds another experiment \(ema.width was 0.1, is 0.2\)"):
        train(options(width=0.2))
    assert train(options(device="device")) == 0  # trained already


def test_an_average_on_the_device_is_in_the_plan_and_the_first_thing_to_give_up() -> None:
    setting = Setting((2, 4), 512, 512, 512, weights=torch.bfloat16)
    without, there = count(setting), count(replace(setting, averaged=True))
    assert there.peak_bytes - without.peak_bytes == there.components["average of the weights"]
    assert there.components["average of the weights"] == pytest.approx(4 * there.num_trained, rel=0.001)
    assert without.components["average of the weights"] == 0
    change = cheapest_change(replace(setting, averaged=True), without.peak_bytes)
    assert change is not None
    assert change.startswith("--ema.device cpu (")
    assert EmaOptions(profile="power", device="device").on_device
    assert not EmaOptions(profile="power").on_device
    assert not EmaOptions(device="device").on_device


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"profile": "powr"}, "ema.profile 'powr' is unknown"),
        ({"device": "gpu"}, "ema.device 'gpu' is unknown"),
        ({"width": 0.0}, "ema.width must be above 0 and at most 0.28"),
        ({"width": 0.3}, "ema.width must be above 0 and at most 0.28"),
        ({"decay": 1.0}, "ema.decay must be at least 0 and below 1"),
        ({"every": 0}, "ema.every must be 1 or more"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        options(**changes)


def test_options_without_effect_are_named() -> None:
    assert EmaOptions().unused() == []
    assert EmaOptions(evaluate=False, width=0.2, device="device").unused() == ["width", "device", "evaluate"]
    assert options(decay=0.9).unused() == ["decay"]
    assert options(width=0.2, evaluate=False, device="device").unused() == []
