"""The int8 linear: quanto's numbers and quanto's results, with nothing kept for backward, eager and compiled."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.quanto import freeze, qint8, quantize

from shared.families.base import Batch
from shared.model_folder import resolve
from tests.train.conftest import flux
from train import frozen_linear
from train.adapters.controlnet import ControlNetAdapter, ControlNetOptions
from train.frozen_linear import FrozenInt8Linear
from train.quantize import Weights, place_base

CPU = torch.device("cpu")


def linear_of(dtype: torch.dtype, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 96, bias=bias).to(dtype)


def quanto_of(linear: torch.nn.Linear) -> Any:
    """quanto's own frozen layer of the same weights."""
    module = torch.nn.Sequential(copy.deepcopy(linear))
    quantize(module, weights=qint8)
    freeze(module)
    return module.requires_grad_(False)[0]


def both_of(layer: torch.nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The output on 2 x 5 rows, and the gradient that arrives at them."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 64, generator=draw).to(dtype).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(2, 5, 96, generator=draw).to(dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor, or of one of quanto's its integers and scales."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [tensor]


@contextmanager
def saved_bytes(known: torch.nn.Module) -> Iterator[list[int]]:
    """Bytes of each tensor saved for backward meanwhile that is neither a weight nor a buffer of `known`."""
    storages = {
        part.untyped_storage().data_ptr()
        for tensor in [*known.parameters(), *known.buffers()]
        for part in parts_of(tensor)
    }
    found: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        new = [part for part in parts_of(tensor) if part.untyped_storage().data_ptr() not in storages]
        found.extend(part.untyped_storage().nbytes() for part in new)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


# --- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_quanto_s_to_the_bit(dtype: torch.dtype) -> None:
    linear = linear_of(dtype)
    frozen = FrozenInt8Linear.from_float(linear)
    theirs = quanto_of(linear).weight
    assert torch.equal(frozen.weight_int8, getattr(theirs, "_data"))  # noqa: B009
    assert torch.equal(frozen.scale, getattr(theirs, "_scale"))  # noqa: B009
    assert (frozen.weight_int8.dtype, frozen.scale.dtype, frozen.scale.shape) == (torch.int8, dtype, (96, 1))
    assert torch.equal(frozen.bias, linear.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_quanto_s_up_to_one_rounding(dtype: torch.dtype, bias: bool) -> None:
    linear = linear_of(dtype, bias)
    ours, theirs = both_of(FrozenInt8Linear.from_float(linear), dtype), both_of(quanto_of(linear), dtype)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == dtype
        assert relative(our, their) < (2e-7 if dtype == torch.float32 else 2.0**-8)


def test_nothing_is_saved_but_the_weights_where_quanto_saves_the_input() -> None:
    linear = linear_of(torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    frozen, theirs = FrozenInt8Linear.from_float(linear), quanto_of(linear)
    with saved_bytes(frozen) as ours:
        frozen(x)
    with saved_bytes(theirs) as quanto:
        theirs(x)
    assert sum(ours) == 0
    assert sum(quanto) >= 3 * 64 * 4


def test_all_layers_share_one_room_as_large_as_the_largest_weight() -> None:
    frozen_linear._scratch.clear()
    for rows, columns in ((8, 16), (32, 16), (4, 4)):
        FrozenInt8Linear.from_float(torch.nn.Linear(columns, rows))(torch.randn(2, columns))
    assert [room.numel() for room in frozen_linear._scratch.values()] == [32 * 16]
    with torch.inference_mode():
        FrozenInt8Linear.from_float(torch.nn.Linear(64, 64))(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    FrozenInt8Linear.from_float(torch.nn.Linear(64, 64))(x).sum().backward()  # room that was made in inference
    assert [room.numel() for room in frozen_linear._scratch.values()] == [64 * 64]


def test_threads_do_not_write_into_each_other_s_room() -> None:
    layers = [FrozenInt8Linear.from_float(torch.nn.Linear(512, 512)) for _ in range(2)]
    x = torch.randn(64, 512)
    expected = [layer(x) for layer in layers]
    wrong: list[int] = []

    def run(i: int) -> None:
        wrong.extend(i for _ in range(100) if not torch.equal(layers[i](x), expected[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_whole_it_computes_the_same_and_saves_no_dequantized_weight(dtype: torch.dtype) -> None:
    frozen = FrozenInt8Linear.from_float(linear_of(dtype))
    compiled: Any = torch.compile(frozen, fullgraph=True, backend="aot_eager_decomp_partition")
    for ours, eager in zip(both_of(compiled, dtype), both_of(frozen, dtype), strict=True):
        assert relative(ours, eager) < (2e-7 if dtype == torch.float32 else 2.0**-8)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    with saved_bytes(frozen) as saved:
        compiled(x)
    assert sum(saved) == 0
    gelu: Any = torch.compile(torch.nn.GELU(), fullgraph=True, backend="aot_eager_decomp_partition")
    with saved_bytes(frozen) as seen:
        gelu(x)
    assert sum(seen) > 0, "what compiled code saves is seen"


def test_another_arithmetic_is_chosen_by_name_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = FrozenInt8Linear.from_float(linear_of(torch.float32))
    monkeypatch.setitem(frozen_linear.ARITHMETIC, "int8", lambda x, weight_int8, scale, bias: x.new_zeros(7))
    frozen.arithmetic = "int8"
    assert frozen(torch.randn(2, 64)).shape == (7,)


def test_an_input_of_another_precision_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match=r"float32 meets a weight held for torch\.bfloat16"):
        FrozenInt8Linear.from_float(linear_of(torch.bfloat16))(torch.randn(2, 64))


def test_no_switch_makes_it_trainable_and_its_buffers_are_its_state() -> None:
    frozen = FrozenInt8Linear.from_float(linear_of(torch.float32)).requires_grad_(True)
    assert not list(frozen.parameters())
    assert set(frozen.state_dict()) == {"weight_int8", "scale", "bias"}
    assert frozen.num_weights == 64 * 96 + 96


# --- a whole base ---------------------------------------------------------------------------------------------------


def step_on(weights: Weights, model: Path) -> tuple[dict[str, torch.Tensor], list[int]]:
    """ControlNet gradients of one loss through a base that is held so, and the bytes that the base saved."""
    folder, draw = resolve(str(model), ()), torch.Generator().manual_seed(0)
    base = place_base(flux().load_base(folder, torch.float32), CPU, weights)
    controlnet = flux().make_controlnet(folder, 1, 1, "copy", torch.float32)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    batch = Batch(["a", "b"], 64, 64, {
        "t5.prompt_embeds": torch.randn(2, 8, 32, generator=draw),
        "clip.pooled_prompt_embeds": torch.randn(2, 24, generator=draw),
    })  # fmt: skip
    x_t, condition = (torch.randn(2, 16, 64, generator=draw) for _ in range(2))
    inputs = flux().inputs(batch, condition, torch.float32)
    adapter = ControlNetAdapter(flux(), base, controlnet, ControlNetOptions())
    t = torch.tensor([0.2, 0.8])
    residuals = flux().residuals(controlnet, x_t, t, inputs, 3.5, None)
    with saved_bytes(base) as saved:
        prediction = flux().predict(adapter.base, x_t, t, inputs, 3.5, residuals)
    prediction.square().mean().backward()
    return {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}, saved


def test_gradients_of_a_controlnet_on_the_lean_base_are_those_on_quanto_s(tiny_model: Path) -> None:
    (ours, lean), (theirs, quanto) = step_on("int8", tiny_model), step_on("quanto", tiny_model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) < 2e-6, name
    assert sum(lean) < sum(quanto)


def test_a_lean_base_saves_for_backward_what_an_unquantized_frozen_one_does(tiny_model: Path) -> None:
    (_, lean), (_, plain) = step_on("int8", tiny_model), step_on("none", tiny_model)
    assert sum(lean) == sum(plain)
