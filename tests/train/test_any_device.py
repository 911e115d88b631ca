"""Training calls nothing of CUDA's where there is no CUDA: so it runs on whatever device torch and accelerate know."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from shared import drawn
from shared.errors import UserError
from tests.prepared import ROOT
from tests.train.conftest import losses, train_options
from train import processes
from train.trainer import train

OURS = tuple(str(ROOT / part) for part in ("train", "shared"))
MAY_BE_ASKED = {"is_available", "Event", "Stream"}  # types are named in annotations


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`torch.cuda` without anything that this project may call; what was called nevertheless comes back."""
    called: list[str] = []

    def refusing(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_code.co_filename.startswith(OURS):
                called.append(name)
                raise AssertionError(f"torch.cuda.{name} was called where there is no CUDA")
            return function(*args, **kwargs)  # torch asks itself

        return call

    for name, function in vars(torch.cuda).copy().items():
        if isinstance(function, types.FunctionType) and not name.startswith("_") and name not in MAY_BE_ASKED:
            monkeypatch.setattr(torch.cuda, name, refusing(name, function))
    return called


@pytest.mark.parametrize(
    "different",
    [
        {"memory": {"hoist": "yes", "recompute": "2"}, "optimizer": {"states": "cpu"}},
        {"memory": {"stream": "yes"}, "ema": {"profile": "power", "every": 1}},
        {"adapter": "lora", "optimizer": {"kind": "adamw", "survival_every": 1}},
        {"adapter": "full", "base": {"weights": "none"}, "precision": "bf16"},
    ],
    ids=["controlnet, hoisted", "controlnet, streamed", "lora", "full"],
)
def test_a_run_calls_nothing_of_cuda_s(
    different: dict[str, Any], no_cuda: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    looks = {"every": 1, "samples": 2, "timesteps": 2, "pictures_every": 2, "pictures": 1, "picture_steps": 1}
    options = train_options(tiny_cache, tmp_path, steps=2, validation=looks, checkpoint={"every": 1}, **different)
    assert train(options) == 0
    assert no_cuda == []
    assert len(losses(tmp_path / "run")) == 2


def test_the_watch_sees_what_is_called(no_cuda: list[str]) -> None:
    from train.fit import CudaMeter

    with pytest.raises(AssertionError, match=r"torch\.cuda\.reset_peak_memory_stats was called"):
        CudaMeter(torch.device("cpu")).begin()
    assert no_cuda == ["reset_peak_memory_stats"]


def test_a_device_that_draws_nothing_gets_what_the_cpu_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn.normal((2, 3), drawn.generator_for("cpu").manual_seed(1), torch.device("cpu"))
    monkeypatch.setattr(drawn, "DRAWS", ())
    generator = drawn.generator_for("xla")
    assert generator.device.type == "cpu"
    assert torch.equal(drawn.normal((2, 3), generator.manual_seed(1), torch.device("cpu")), expected)


def test_an_optimizer_without_a_kernel_for_xla_is_refused_there(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_xla(**_: Any) -> Any:
        return types.SimpleNamespace(device=torch.device("xla", 0), distributed_type="XLA")

    monkeypatch.setattr(processes, "Accelerator", on_xla)
    with pytest.raises(UserError, match=r"no kernel for XLA's devices; set --optimizer\.kind adamw"):
        processes.accelerator(train_options(tiny_cache, tmp_path))
