"""The base itself: its step is diffusers' own, what is saved is a base, and what only a frozen one has is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from shared.errors import UserError
from shared.model_folder import resolve
from tests.train.conftest import content, flux, losses, metrics, train_options, trainer_of
from tests.train.test_controlnet import CPU, Reference
from train.config import TrainConfig
from train.counting import Setting
from train.memory_plan import changes, count
from train.optimizer import OptimizerOptions
from train.preparation import base_dtype, dtypes
from train.trainer import train

LOOKS = {"every": 4, "samples": 2, "timesteps": 2}


def full_options(cache: Path, runs: Path, **different: Any) -> TrainConfig:
    parts = {"base": {"weights": "none"}, "optimizer": {"kind": "adamw", **different.pop("optimizer", {})}}
    return train_options(cache, runs, **{"adapter": "full", "depth": "2-4", **parts, **different})


# --- the step is diffusers' -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [{}, {"recompute": "all"}], ids=["kept", "checkpointing"])
def test_loss_and_every_gradient_equal_those_of_diffusers_own_transformer_from_the_pictures_themselves(
    memory: dict[str, Any], tiny_data: Path, tiny_cache: Path, tiny_model: Path, tmp_path: Path
) -> None:
    options = full_options(tiny_cache, tmp_path, memory=memory, seed=5, optimizer={"clip_norm": 0.0})
    trainer = trainer_of(options)
    iterator = iter(trainer.loader)
    [batch] = next(iterator)
    iterator.close()

    own = flux().make_controlnet(resolve(str(tiny_model), ()), 1, 1, "copy", torch.float32)  # for its pictures alone
    pictures = Reference(tiny_data, tiny_cache, tiny_model, own)
    pipeline = FluxPipeline.from_pretrained(tiny_model)
    loss = pictures.loss_without_control(pipeline, batch, 5)
    loss.backward()
    expected = {name: p.grad for name, p in pipeline.transformer.named_parameters() if p.grad is not None}

    figures = trainer.step([batch], 1, 1e-5)
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
    actual = {name: p.grad for name, p in trainer.adapter.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys() == dict(pipeline.transformer.named_parameters()).keys()
    whole = math.hypot(*(gradient.norm().item() for gradient in expected.values()))
    worst = max((actual[name] - gradient).norm().item() for name, gradient in expected.items())
    print(f"{len(expected)} gradients differ by at most {worst / whole:.1e} of the whole norm")
    assert worst < 1e-5 * whole


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 8 steps: "whole", with an average, looked at and painted; and "resumed" after the fourth."""
    folder = tmp_path_factory.mktemp("runs")
    common: dict[str, Any] = {"validation": LOOKS, "checkpoint": {"every": 4, "keep": 0}}
    common["ema"] = {"profile": "power", "every": 2}
    painted = {**common, "validation": {**LOOKS, "pictures_every": 8, "pictures": 1}}
    assert train(full_options(tiny_cache, folder, name="whole", steps=8, **painted)) == 0
    for steps in (4, 8):
        assert train(full_options(tiny_cache, folder, name="resumed", steps=steps, **common)) == 0
    return folder


def test_it_learns_and_is_looked_at_without_what_it_was_before(runs: Path) -> None:
    looked = [line["held_out"] for line in metrics(runs / "whole") if "held_out" in line]
    assert looked[-1]["loss"] < 0.95 * looked[0]["loss"]
    assert not {"loss_without_control", "condition_gap"} & looked[-1].keys()
    assert (runs / "whole" / "pictures" / "step-00000008.png").is_file()


def test_a_resumed_run_goes_on_to_the_bit(runs: Path) -> None:
    assert losses(runs / "resumed") == losses(runs / "whole")
    assert content(runs / "resumed" / "transformer") == content(runs / "whole" / "transformer")
    average = Path("checkpoints") / "step-00000008" / "ema"
    assert content(runs / "resumed" / average) == content(runs / "whole" / average)


def test_every_weight_has_moved(runs: Path, tiny_model: Path) -> None:
    before = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(runs / "whole" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


_PAINT = """
import sys, torch
from diffusers import FluxPipeline, FluxTransformer2DModel
def painted(**parts):
    pipeline = FluxPipeline.from_pretrained(sys.argv[1], **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a box", height=64, width=64, num_inference_steps=2, max_sequence_length=24, output_type="pt",
                    generator=torch.Generator().manual_seed(0)).images
trained = FluxTransformer2DModel.from_pretrained(sys.argv[2])
print((painted(transformer=trained) - painted()).abs().max().item() > 0.01)
"""


def test_another_process_paints_with_it_in_diffusers_pipeline(runs: Path, tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PAINT, str(tiny_model), str(runs / "whole" / "transformer")],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.stdout.split() == ["True"], done.stderr[-2000:]


# --- what it cannot be trained with ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("different", "said"),
    [
        ({"base": {"weights": "int8"}}, r"256 levels for each channel.*Set --base\.weights none"),
        ({"base": {"weights": "quanto"}}, r"base\.weights quanto holds them in 256 levels"),
        ({"memory": {"hoist": "yes"}}, r"memory\.hoist yes is for a base that is frozen"),
        ({"memory": {"stream": "yes"}}, r"memory\.stream yes is for a base that is frozen"),
        (
            {"memory": {"shard": "yes"}, "optimizer": {"kind": "prodigy", "learning_rate": 1.0}},
            r"memory\.shard yes: prodigy finds one step size",
        ),
        ({"speed": {"arithmetic": "int8"}}, r"speed\.arithmetic int8 is for an int8 base"),
    ],
)
def test_what_only_a_frozen_base_has_is_refused_with_the_reason(
    different: dict[str, Any], said: str, tiny_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(full_options(tiny_cache, tmp_path, **different))
    assert not (tmp_path / "run").exists()


def test_the_base_has_the_precision_of_what_is_trained(tiny_cache: Path, tmp_path: Path) -> None:
    options = full_options(tiny_cache, tmp_path, precision="bf16", full={"weights": "fp32"})
    assert dtypes(options, CPU) == (torch.bfloat16, torch.float32)
    assert base_dtype(options, CPU) == torch.float32
    assert base_dtype(train_options(tiny_cache, tmp_path, precision="bf16"), CPU) == torch.bfloat16
    trainer = trainer_of(options)
    assert {p.dtype for p in trainer.adapter.base.parameters()} == {torch.float32}
    [batch] = next(iter(trainer.loader))
    trainer.step([batch], 1, 1e-5)
    assert {p.grad.dtype for p in trainer.adapter.base.parameters() if p.grad is not None} == {torch.float32}


def test_in_bf16_it_is_stepped_with_stochastic_rounding(tiny_cache: Path, tmp_path: Path) -> None:
    different: dict[str, Any] = {"precision": "bf16", "optimizer": {"learning_rate": 1e-3, "survival_every": 1}}
    assert train(full_options(tiny_cache, tmp_path, **different)) == 0
    kept = [line["update_kept"] for line in metrics(tmp_path / "run") if "update_kept" in line]
    assert kept[-1] == pytest.approx(1, abs=0.05)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_its_memory_is_that_of_weights_gradients_and_moments_unless_they_are_released() -> None:
    setting = Setting(
        depth=(0, 0), height=512, width=512, text_length=512, adapter="full", base="none", hoist=False
    )  # fmt: skip
    counted = count(setting)
    billions = counted.num_trained / 1e9
    assert billions == pytest.approx(11.9, abs=0.1)
    assert counted.components["base weights"] == pytest.approx(2e9 * billions, rel=0.01)
    assert counted.components["ControlNet weights"] == 0
    assert counted.components["optimizer states"] == pytest.approx(2e9 * billions, rel=0.05)
    assert counted.peak_bytes > 6e9 * billions
    released = OptimizerOptions(release=True, clip="parameter", states="cpu")
    least = count(Setting(**{**vars(setting), "optimizer": released}), 57)
    assert least.peak_bytes < 3e9 * billions
    print(
        f"{counted.peak_bytes / 2**30:.1f} GiB; released, states on the host, all recomputed: "
        f"{least.peak_bytes / 2**30:.1f} GiB"
    )
    words = " ".join(words for words, _ in changes(setting))
    assert "--optimizer.release True" in words
    assert not any(option in words for option in ("base.weights", "hoist", "stream", "shard"))
