"""int8 is really int8, the base is frozen for good, and its output is hardly another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.cache.storage import RemoteOptions
from shared.errors import UserError
from shared.model_folder import resolve
from shared.report import component
from tests.train.conftest import flux, train_options, trainer_of
from train.frozen_linear import linears as linears_of
from train.quantize import BaseOptions, Weights, place_base, refuse_trainable

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
@pytest.mark.parametrize("weights", ["int8", "quanto"])
def test_every_linear_of_the_blocks_is_stored_in_int8_and_nothing_else(
    weights: Weights, tiny_model: Path, dtype: torch.dtype
) -> None:
    base = base_of(tiny_model, dtype)
    num_parameters = sum(p.numel() for p in base.parameters())
    linears = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    of_blocks = {name for name in linears if name.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    num_int8 = sum(linears[name].weight.numel() for name in of_blocks)
    # One scale per output channel, and two numbers of quanto's own for each linear.
    num_scales = sum(linears[name].weight.shape[0] + 2 * (weights == "quanto") for name in of_blocks)

    counted = component("base", place_base(base, CPU, weights))

    assert set(counted.dtypes.split("+")) == {"int8", str(dtype).removeprefix("torch.")}
    assert counted.num_bytes == num_int8 + (num_parameters - num_int8 + num_scales) * dtype.itemsize
    assert counted.num_parameters == num_parameters
    if weights == "int8":
        assert set(linears_of(base)) == of_blocks
    else:
        assert {name for name in of_blocks if hasattr(base.get_parameter(f"{name}.weight"), "_data")} == of_blocks


def test_both_int8_bases_hold_the_same_numbers(tiny_model: Path) -> None:
    ours, theirs = place_base(base_of(tiny_model), CPU, "int8"), place_base(base_of(tiny_model), CPU, "quanto")
    for name, linear in linears_of(ours).items():
        weight = theirs.get_parameter(f"{name}.weight")
        assert torch.equal(linear.weight_int8, getattr(weight, "_data"))  # noqa: B009
        assert torch.equal(linear.scale, getattr(weight, "_scale"))  # noqa: B009
    difference = predict(ours, torch.float32) - predict(theirs, torch.float32)
    assert difference.norm() < 1e-6 * predict(theirs, torch.float32).norm()


@pytest.mark.parametrize("weights", ["int8", "quanto", "none"])
def test_a_placed_base_is_frozen_and_in_evaluation_mode(tiny_model: Path, weights: Weights) -> None:
    base = place_base(base_of(tiny_model).train(), CPU, weights)
    assert not any(tensor.requires_grad for tensor in [*base.parameters(), *base.buffers()])
    assert not any(module.training for module in base.modules())


def test_int8_changes_the_prediction_by_less_than_a_percent_and_bf16_by_no_more_than_without(tiny_model: Path) -> None:
    exact = predict(place_base(base_of(tiny_model), CPU, "none"), torch.float32)

    def error(dtype: torch.dtype, weights: Weights) -> float:
        prediction = predict(place_base(base_of(tiny_model, dtype), CPU, weights), dtype).float()
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


def test_a_base_left_trainable_by_a_library_is_caught_before_the_step(tiny_cache: Path, tmp_path: Path) -> None:
    trainer = trainer_of(train_options(tiny_cache, tmp_path))
    batches = next(iter(trainer.loader))
    trainer.step(batches, 1, 1e-3)
    before = {name: p.detach().clone() for name, p in trainer.adapter.named_parameters()}
    base = trainer.adapter.base
    base.get_parameter("transformer_blocks.1.attn.norm_q.weight").requires_grad_(True)
    with pytest.raises(UserError, match=r"1 of its tensors require gradients \(as transformer_blocks\.1\.attn\.norm_q"):
        trainer.step(batches, 2, 1e-3)
    assert all(torch.equal(p, before[name]) for name, p in trainer.adapter.named_parameters())
    base.requires_grad_(False)
    base.get_buffer("transformer_blocks.0.attn.to_q.bias").requires_grad_(True)
    with pytest.raises(UserError, match=r"as transformer_blocks\.0\.attn\.to_q\.bias"):
        refuse_trainable(base)


def test_quantized_bases_lie_beside_the_cache_unless_another_folder_is_named(tmp_path: Path) -> None:
    remote = RemoteOptions(folder=str(tmp_path / "fetched"))
    beside = BaseOptions().folder_beside
    assert beside(str(tmp_path / "cache"), remote) == tmp_path / "bases"
    assert beside(f"file://{tmp_path}/cache", remote) == tmp_path / "bases"
    assert beside("cache", remote) == Path.cwd() / "bases"
    assert beside("s3://bucket/cache", remote) == tmp_path / "fetched" / "bases"
    assert BaseOptions(folder="elsewhere").folder_beside("cache", remote) == Path("elsewhere")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to quantize: Linear has no list of blocks"):
        place_base(torch.nn.Linear(2, 2), CPU, "int8")
