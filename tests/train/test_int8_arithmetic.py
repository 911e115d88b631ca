"""8-bit products: what they round, what they keep, what passes through them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from train import frozen_linear, int8_arithmetic
from train.frozen_linear import Arithmetic, FrozenInt8Linear

K, N = 192, 320
MODES: list[Arithmetic] = ["int8_backward", "int8"]
BOTH = pytest.mark.parametrize("arithmetic", MODES)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(arithmetic: Arithmetic, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> FrozenInt8Linear:
    linear = torch.nn.Linear(K, N, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(randn(N, K, seed=1) / K**0.5)
        if bias:
            linear.bias.copy_(randn(N, seed=2))
    layer = FrozenInt8Linear.from_float(linear.to(dtype))
    layer.arithmetic = arithmetic
    return layer


def passed(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and the gradient of x for a random gradient of y."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(randn(*y.shape, seed=3).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def error(tested: torch.Tensor, expected: torch.Tensor) -> float:
    return ((tested.double() - expected.double()).norm() / expected.double().norm()).item()


def test_a_row_is_its_integers_times_its_scale_to_half_a_step() -> None:
    x = randn(50, K) * torch.logspace(-8, 8, 50)[:, None]
    integers, scale = int8_arithmetic.int8_rows(x)
    assert (integers.dtype, integers.shape, scale.dtype, scale.shape) == (torch.int8, x.shape, torch.float32, (50,))
    assert integers.abs().amax(dim=1).eq(127).all()
    assert (((integers * scale[:, None] - x).abs() / scale[:, None]).max() <= 0.5001).item()


def test_a_row_of_zeros_stays_zero_and_what_is_not_finite_reaches_all_that_is_computed_from_it() -> None:
    x = randn(4, K)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, -torch.inf
    y = int8_arithmetic.int8_matmul(
        *int8_arithmetic.int8_rows(x), torch.ones(N, K, dtype=torch.int8), None, None, x.dtype
    )
    assert not y[0].any()
    assert not y[1:3].isfinite().any()
    assert y[3].isfinite().all()
    layer = layer_of("int8_backward")
    x = randn(3, K).requires_grad_()
    gradient = torch.ones(3, N)
    gradient[1, 7] = torch.inf
    [found] = torch.autograd.grad(layer(x), x, gradient)
    assert found.isfinite().all(dim=1).tolist() == [True, False, True]


def test_products_are_those_of_the_integers_themselves() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, weight = (torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8) for shape in ((30, K), (N, K)))
    rows[0], weight[0] = 127, 127  # the largest sum
    row_scale, scale, bias = torch.rand(30), torch.rand(N), randn(N)
    sums = (rows.long() @ weight.long().t()).float()
    expected = sums * row_scale[:, None] * scale + bias
    assert torch.equal(int8_arithmetic.int8_matmul(rows, row_scale, weight, scale, bias, torch.float32), expected)
    back = (torch.ones(30, N, dtype=torch.long) @ weight.long()).float() * row_scale[:, None]
    ones = torch.ones(30, N, dtype=torch.int8)
    assert torch.equal(int8_arithmetic.int8_matmul_transposed(ones, row_scale, weight, torch.float32), back)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH
def test_the_gradient_and_where_asked_the_output_are_near_the_exact_ones(
    arithmetic: Arithmetic, dtype: torch.dtype, bias: bool
) -> None:
    x = randn(2, 70, K).to(dtype)
    exact, tested = (passed(layer_of(each, dtype, bias=bias), x) for each in ("exact", arithmetic))
    assert (tested[0].shape, tested[0].dtype, tested[1].shape, tested[1].dtype) == ((2, 70, N), dtype, x.shape, dtype)
    assert torch.equal(tested[0], exact[0]) == (arithmetic == "int8_backward")
    errors = [error(a, b) for a, b in zip(tested, exact, strict=True)]
    print(f"{arithmetic}, {dtype}: relative error of the output {errors[0]:.2%}, of the gradient {errors[1]:.2%}")
    assert errors[0] < 0.01
    assert 0.001 < errors[1] < 0.01


def test_output_channels_of_very_different_scales_do_not_spoil_the_gradient() -> None:
    # Rounded before the weight's scale is folded in, small gradients of strong channels would be lost.
    layer, x = layer_of("int8_backward"), randn(64, K).requires_grad_()
    layer.scale = layer.scale * torch.logspace(-3, 0, N)[:, None]
    gradient = randn(64, N, seed=3) / layer.scale[:, 0]
    [tested] = torch.autograd.grad(layer(x), x, gradient)
    layer.arithmetic = "exact"
    [exact] = torch.autograd.grad(layer(x), x, gradient)
    assert error(tested, exact) < 0.01


@BOTH
def test_nothing_is_kept_for_backward_beside_the_weights(arithmetic: Arithmetic) -> None:
    layer = layer_of(arithmetic)
    held = {tensor.untyped_storage().data_ptr() for tensor in layer.buffers()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(randn(140, K).requires_grad_())
    assert len(kept) == 2
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} < held


@BOTH
def test_compiled_without_a_graph_break_it_computes_the_same(arithmetic: Arithmetic) -> None:
    layer, x = layer_of(arithmetic), randn(2, 70, K)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for tested, expected in zip(passed(compiled, x), passed(layer, x), strict=True):
        torch.testing.assert_close(tested, expected, rtol=1e-6, atol=1e-6)


def test_the_operators_keep_torch_s_rules() -> None:
    x = randn(5, K)
    rows, row_scale = int8_arithmetic.int8_rows(x)
    weight = torch.ones(N, K, dtype=torch.int8)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.underdrawing
    torch.library.opcheck(ops.int8_rows, (x, None), test_utils=checks)
    torch.library.opcheck(ops.int8_rows, (x, torch.rand(K)), test_utils=checks)
    torch.library.opcheck(
        ops.int8_matmul, (rows, row_scale, weight, torch.rand(N), randn(N), torch.bfloat16), test_utils=checks
    )
    torch.library.opcheck(
        ops.int8_matmul_transposed,
        (torch.ones(5, N, dtype=torch.int8), row_scale, weight, torch.float32),
        test_utils=checks,
    )


@BOTH
def test_on_fake_tensors_it_has_the_shapes_and_the_flops_of_exact_arithmetic(arithmetic: Arithmetic) -> None:
    flops = []
    for each in ("exact", arithmetic):
        layer = layer_of(each)
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            y, gradient = passed(layer, torch.empty(2, 70, K))
        assert (y.shape, gradient.shape, gradient.dtype) == ((2, 70, N), (2, 70, K), torch.float32)
        flops.append(counter.get_total_flops())
    assert flops == [2 * 2 * 140 * K * N] * 2


def test_on_a_gpu_few_rows_are_computed_exactly() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
        weight, scale = torch.empty(N, K, dtype=torch.int8, device="cuda"), torch.empty(N, 1, device="cuda")
        for rows in (127, 128):
            int8_arithmetic.int8(torch.empty(1, rows, K, device="cuda"), weight, scale, None)
    names = [str(op) for op in counter.get_flop_counts()["Global"]]
    assert sorted(names) == ["aten.mm", "underdrawing.int8_matmul"]


def test_a_sum_that_int32_cannot_hold_is_a_mistake() -> None:
    assert 127**2 * int8_arithmetic.MOST_SUMMED < 2**31 <= 127**2 * (int8_arithmetic.MOST_SUMMED + 1)
    long = int8_arithmetic.MOST_SUMMED + 1
    with FakeTensorMode(), pytest.raises(AssertionError, match="may overflow int32"):
        int8_arithmetic.int8(torch.empty(1, long), torch.empty(4, long, dtype=torch.int8), torch.empty(4, 1), None)


def test_both_arithmetics_are_known_by_name_to_the_frozen_layer() -> None:
    assert frozen_linear.ARITHMETIC["int8_backward"] is int8_arithmetic.int8_backward
    assert frozen_linear.ARITHMETIC["int8"] is int8_arithmetic.int8
