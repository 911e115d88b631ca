"""int8 is really int8, the base is frozen, and its output is hardly another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from shared.model_folder import resolve
from shared.report import component
from tests.train.conftest import flux
from train.quantize import Quantization, place_base

CPU = torch.device("cpu")


def base_of(model: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return flux().load_base(resolve(str(model), ()), dtype)


def predict(base: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    with torch.no_grad():
        return base(
            hidden_states=randn(2, 16, 64),
            encoder_hidden_states=randn(2, 8, 32),
            pooled_projections=randn(2, 24),
            timestep=torch.tensor([0.2, 0.9]),
            guidance=torch.tensor([3.5, 3.5]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            return_dict=False,
        )[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_of_the_blocks_is_stored_in_int8_and_nothing_else(tiny_model: Path, dtype: torch.dtype) -> None:
    base = base_of(tiny_model, dtype)
    linears = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    of_blocks = {name for name in linears if name.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    num_int8 = sum(linears[name].weight.numel() for name in of_blocks)
    others = sum(p.numel() for p in base.parameters()) - num_int8
    # One scale per output channel, and two numbers of quanto's own for each linear.
    num_scales = sum(linears[name].weight.shape[0] + 2 for name in of_blocks)

    counted = component("base", place_base(base, CPU, "int8"))

    assert set(counted.dtypes.split("+")) == {"int8", str(dtype).removeprefix("torch.")}
    assert counted.num_bytes == num_int8 + (others + num_scales) * dtype.itemsize
    stored = {name for name, module in base.named_modules() if hasattr(getattr(module, "weight", None), "_data")}
    assert stored == of_blocks
    weights = [base.get_parameter(f"{name}.weight") for name in stored]
    assert {getattr(weight, "_data").dtype for weight in weights} == {torch.int8}  # noqa: B009


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_a_placed_base_is_frozen_and_in_evaluation_mode(tiny_model: Path, quantization: Quantization) -> None:
    base = place_base(base_of(tiny_model).train(), CPU, quantization)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not any(module.training for module in base.modules())


def test_int8_changes_the_prediction_by_less_than_a_percent_and_bf16_by_no_more_than_without(tiny_model: Path) -> None:
    exact = predict(place_base(base_of(tiny_model), CPU, "none"), torch.float32)

    def error(dtype: torch.dtype, quantization: Quantization) -> float:
        prediction = predict(place_base(base_of(tiny_model, dtype), CPU, quantization), dtype).float()
        return ((prediction - exact).norm() / exact.norm()).item()

    int8 = error(torch.float32, "int8")
    print(f"relative error: int8 {int8:.4f}, bf16 {error(torch.bfloat16, 'none'):.4f}, "
          f"int8 in bf16 {error(torch.bfloat16, 'int8'):.4f}")  # fmt: skip
    assert 0 < int8 < 0.01
    assert error(torch.bfloat16, "int8") < 1.2 * error(torch.bfloat16, "none")


def test_gradients_flow_through_the_int8_base_to_its_input(tiny_model: Path) -> None:
    base = place_base(base_of(tiny_model), CPU, "int8")
    control = torch.zeros(1, 16, 32, requires_grad=True)
    prediction = base(
        hidden_states=torch.randn(1, 16, 64),
        encoder_hidden_states=torch.randn(1, 8, 32),
        pooled_projections=torch.randn(1, 24),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
        controlnet_block_samples=[control],
        return_dict=False,
    )[0]
    prediction.sum().backward()
    assert control.grad is not None
    assert control.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in base.parameters())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to quantize: Linear has no list of blocks"):
        place_base(torch.nn.Linear(2, 2), CPU, "int8")
