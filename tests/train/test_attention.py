"""The attention kernel that is asked for is the one that runs; auto takes what was measured fastest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from shared import families
from shared.errors import UserError
from train import attention
from train.attention import DEFAULT, Shape, choose, measure, use

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPES = [Shape(2, 2, 40, 16), Shape(2, 2, 24, 16)]


def kernel() -> str:
    """Which one runs now."""
    query, key, value = attention._inputs(SHAPES[0], torch.float32, CPU)
    output = scaled_dot_product_attention(query, key, value)
    assert output.grad_fn is not None
    return "flash" if "Flash" in output.grad_fn.name() else "math"


def test_the_kernel_that_is_chosen_runs_until_the_end_of_the_run(tmp_path: Path) -> None:
    before = kernel()
    for name in ("math", "flash"):
        chosen = choose(name, SHAPES, torch.float32, CPU, tmp_path)
        with use(chosen):
            assert kernel() == name
        assert kernel() == before


def test_all_kernels_compute_the_same() -> None:
    query, key, value = attention._inputs(SHAPES[0], torch.float32, CPU)
    found = []
    for name in ("math", "flash"):
        with use(name):
            output = scaled_dot_product_attention(query, key, value)
            found.append([output, *torch.autograd.grad(output.square().sum(), (query, key, value))])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_what_the_chosen_kernel_cannot_do_the_others_do() -> None:
    mask = torch.zeros(40, 40, requires_grad=True)  # flash has no gradient of a mask
    with use("flash"):
        query, key, value = attention._inputs(SHAPES[0], torch.float32, CPU)
        scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    assert mask.grad is not None


def test_a_kernel_that_is_asked_for_and_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"speed.attention cudnn cannot run here, with float32 on the CPU at 2 x 40"):
        choose("cudnn", SHAPES, torch.float32, CPU, tmp_path)


def test_on_the_cpu_auto_leaves_the_choice_to_torch(tmp_path: Path) -> None:
    assert choose("auto", SHAPES, torch.float32, CPU, tmp_path) == DEFAULT
    assert not list(tmp_path.iterdir())
    before = kernel()
    with use(DEFAULT):
        assert kernel() == before


def test_a_measurement_times_what_can_run_and_knows_what_cannot() -> None:
    found = measure(["flash", "math", "cudnn"], SHAPES[0], torch.float32, CPU)
    assert found["cudnn"] is None
    for name in ("flash", "math"):
        assert 0 < (found[name] or 0) < float("inf")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """The shapes that were measured on a card that is not here: flash wins at few tokens, cuDNN over all."""
    shapes: list[Shape] = []

    def times(names: Any, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float | None]:
        shapes.append(shape)
        return {"cudnn": shape.S / 100, "flash": 0.2 if shape.S < 30 else 0.9, "efficient": None}

    monkeypatch.setattr(attention, "measure", times)
    monkeypatch.setattr(attention, "_card", lambda device: "NVIDIA H200")
    return shapes


def test_auto_takes_the_kernel_with_the_least_time_over_all_shapes(
    tmp_path: Path, measured: list[Shape], capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose("auto", SHAPES, torch.bfloat16, GPU, tmp_path) == "cudnn"
    assert "attention: cudnn, 0.64 ms forward and backward at 2 shapes; flash 1.10" in capsys.readouterr().out
    assert choose("auto", SHAPES[1:], torch.bfloat16, GPU, tmp_path) == "flash"


def test_a_shape_is_measured_once_for_each_card_and_precision(
    tmp_path: Path, measured: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose("auto", [*SHAPES, *SHAPES], torch.bfloat16, GPU, tmp_path / "new")
    assert measured == sorted(SHAPES)
    choose("auto", [*SHAPES, Shape(1, 2, 8, 16)], torch.bfloat16, GPU, tmp_path / "new")
    assert measured == [*sorted(SHAPES), Shape(1, 2, 8, 16)]
    choose("auto", SHAPES, torch.float32, GPU, tmp_path / "new")
    assert len(measured) == 5
    monkeypatch.setattr(attention, "_card", lambda device: "NVIDIA A100")
    choose("auto", SHAPES, torch.bfloat16, GPU, tmp_path / "new")
    assert len(measured) == 7
    assert len(json.loads((tmp_path / "new" / attention.TIMINGS).read_text())) == 3


def test_timings_that_cannot_be_read_are_taken_again(tmp_path: Path, measured: list[Shape]) -> None:
    (tmp_path / attention.TIMINGS).write_text("{half")
    assert choose("auto", SHAPES, torch.bfloat16, GPU, tmp_path) == "cudnn"
    assert len(measured) == 2


def test_where_no_kernel_can_do_all_shapes_torch_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "measure", lambda names, *more: dict.fromkeys(names))
    monkeypatch.setattr(attention, "_card", lambda device: "an old card")
    assert choose("auto", SHAPES, torch.bfloat16, GPU, tmp_path) == DEFAULT


def test_a_card_without_free_memory_says_nothing_of_its_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(name: str, inputs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(attention, "_call", full)
    monkeypatch.setattr(attention, "_timed", lambda call, device, calls: call())
    monkeypatch.setattr(attention, "_inputs", lambda shape, dtype, device: [])
    monkeypatch.setattr(attention, "_card", lambda device: "a full card")
    assert choose("auto", SHAPES, torch.bfloat16, GPU, tmp_path) == DEFAULT
    assert "for want of memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_shape_is_that_of_the_model_s_own_call(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    from shared.families.base import Batch
    from shared.model_folder import resolve

    flux, called = families.get("flux"), []

    def noted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any) -> torch.Tensor:
        called.append(Shape(*query.shape))
        return scaled_dot_product_attention(query, key, value)

    base = flux.load_base(resolve(str(tiny_model), components=()), torch.float32)
    tensors = {"t5.prompt_embeds": torch.randn(3, 8, 32), "clip.pooled_prompt_embeds": torch.randn(3, 24)}
    inputs = flux.inputs(Batch([""] * 3, 96, 48, tensors), None, torch.float32)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    flux.predict(base, torch.randn(3, 18, 64), torch.rand(3), inputs, 3.5, None)
    assert {*called} == {Shape(3, *flux.attention_shape(base, 96, 48, 8))}
