"""DeepSpeed, where it is installed: the same step, and states that a run without it goes on from."""

from __future__ import annotations

import importlib.util
import os
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from shared.errors import UserError, run_command_line
from tests.prepared import ROOT
from tests.train.conftest import losses, metrics, train_options
from tests.train.test_distributed import World, exit_codes, free_port
from train import checkpoints, fit, zero
from train.budget import MemoryOptions
from train.config import TrainConfig
from train.optimizer import OptimizerOptions
from train.preparation import decide_fit, ground_of
from train.trainer import train

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def train_as(rank: int, port: int, options: TrainConfig, world: World) -> None:
    """One of several processes, as accelerate launches it by examples/launch/deepspeed_stage_2.yaml, on the CPU."""
    stated = yaml.safe_load((ROOT / "examples" / "launch" / "deepspeed_stage_2.yaml").read_text())["deepspeed_config"]
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world.count), LOCAL_WORLD_SIZE=str(world.count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu",
        ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stated["zero_stage"]),
        ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=stated["offload_optimizer_device"],
        ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=stated["offload_param_device"],
    )  # fmt: skip
    sys.stderr = (world.folder / f"stderr-{rank}").open("w", buffering=1)
    run_command_line(lambda: train(options))


def train_with_deepspeed(context: ForkServerContext, options: TrainConfig, folder: Path) -> None:
    world = World(folder)
    world.folder.mkdir()
    port = free_port()
    both = [context.Process(target=train_as, args=(rank, port, options, world)) for rank in range(world.count)]
    for process in both:
        process.start()
    assert exit_codes(both, world) == [0, 0]


@needs_deepspeed
@pytest.mark.parametrize("adapter", ["controlnet", "full"])
def test_a_run_under_deepspeed_is_one_without_and_goes_on_either_way(
    adapter: str, processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    def options(name: str, steps: int, accumulation: int) -> TrainConfig:
        base = {"base": {"weights": "none"}} if adapter == "full" else {}
        return train_options(
            tiny_cache, tmp_path, name=name, adapter=adapter, depth="1-1", steps=steps, checkpoint={"every": 2},
            loader={"batch_size": 2, "accumulation": accumulation}, **base,
            optimizer={"kind": "adamw", "epsilon": 1e-3, "learning_rate": 1e-3, "clip_norm": 0.1},
        )  # fmt: skip

    assert train(options("without", 6, 4)) == 0
    train_with_deepspeed(processes, options("with", 2, 2), tmp_path / "first")
    assert train(options("with", 4, 4)) == 0  # alone, and without DeepSpeed
    train_with_deepspeed(processes, options("with", 6, 2), tmp_path / "second")
    one, several = metrics(tmp_path / "without"), metrics(tmp_path / "with")
    assert [line["step"] for line in one] == [line["step"] for line in several]
    for alone, together in zip(one, several, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert together["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-4)
    last = [checkpoints.path_of(tmp_path / name, 6) for name in ("without", "with")]
    folder = "controlnet" if adapter == "controlnet" else "transformer"
    for file in (f"{folder}/diffusion_pytorch_model.safetensors", checkpoints.OPTIMIZER):
        expected, actual = (load_file(path / file) for path in last)
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-5, msg=f"{file}: {name}")
    assert len(set(losses(tmp_path / "with"))) == 6


@needs_deepspeed
def test_bf16_weights_are_stepped_on_a_float32_copy_that_is_kept(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    def options(name: str, steps: int) -> TrainConfig:
        return train_options(
            tiny_cache, tmp_path, name=name, steps=steps, precision="bf16", checkpoint={"every": 2, "keep": 0},
            optimizer={"kind": "adamw", "master": True},
        )  # fmt: skip

    train_with_deepspeed(processes, options("whole", 4), tmp_path / "whole-ranks")
    for steps in (2, 4):
        train_with_deepspeed(processes, options("resumed", steps), tmp_path / f"ranks-{steps}")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    expected, actual = (
        load_file(checkpoints.path_of(tmp_path / name, 4) / checkpoints.OPTIMIZER) for name in ("whole", "resumed")
    )
    assert any(name.endswith(".master") for name in expected)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "weights", "stage", "rates", "said"),
    [
        ({"kind": "adamw"}, torch.float32, 3, {}, r"DeepSpeed stage 3; .*--memory\.shard yes"),
        ({"kind": "adamw"}, torch.float32, 2, {"a": 0.05}, r"lora\.text_learning_rate: under DeepSpeed all weights"),
        ({}, torch.float32, 2, {}, r"optimizer\.kind adamw8bit .*set --optimizer\.kind adamw"),
        ({"kind": "adamw"}, torch.bfloat16, 2, {}, r"set --optimizer\.master True"),
        ({"kind": "adamw", "release": True, "clip_norm": 0.0}, torch.float32, 2, {}, r"--optimizer\.release False"),
        ({"kind": "adamw", "clip": "parameter"}, torch.float32, 2, {}, r"--optimizer\.clip global"),
    ],
)
def test_what_deepspeed_does_not_do_is_refused(
    options: dict[str, Any], weights: torch.dtype, stage: int, rates: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        zero.refuse(OptimizerOptions(**options), weights, stage, rates=rates)
    zero.refuse(OptimizerOptions(kind="adamw"), torch.float32, 2, rates={"a": 1.0})


def test_a_base_is_not_spread_by_training_itself_where_deepspeed_is_wanted(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {"adapter": "full", "base": {"weights": "none"}}
    options = train_options(tiny_cache, tmp_path, memory={"shard": "auto", "budget": "40GB"}, **full)
    given: list[MemoryOptions] = []

    def decide(memory: MemoryOptions, *args: Any, **more: Any) -> Any:
        given.append(memory)
        raise UserError("seen")

    monkeypatch.setattr(fit, "decide", decide)
    ground, accelerator = ground_of(options), Accelerator(cpu=True)
    for _ in range(2):
        with pytest.raises(UserError, match="seen"):
            decide_fit(options, accelerator, ground.family, ground.model, ground.samples, None)
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert [memory.shard for memory in given] == ["auto", "no"]
    with pytest.raises(UserError, match=r"memory\.shard yes spreads weights by FSDP2"):
        zero.refuse_spread("yes")


def test_deepspeed_that_is_not_installed_is_refused_with_what_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'deepspeed>=0\.18', .*--optimizer\.states cpu"):
        zero.refuse_missing()
