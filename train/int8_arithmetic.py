"""Products with a frozen int8 weight in int8 themselves: the gradient's alone, or the activations' too.

`frozen_linear.ARITHMETIC` gets the two names when this file is imported; `eight_bit.use` does it where it is asked for.

    int8_backward   y as in exact arithmetic; dx = (int8(g * scale^T) weight_int8) * row_scale
    int8            also y = (int8(x) weight_int8^T) * row_scale * scale^T + bias

Each row, that is each token, has a scale of its own: its largest magnitude is 127. The weight's scale belongs to the
output channels, over which the gradient's product sums: it is folded into the gradient before rounding, so the one copy
of the weight serves both directions. (The forward half, and leaving weight gradients alone: SwitchBack, Wortsman et al.
2023, arXiv 2304.13013.) Sums are int32 and exact. Nothing but weight and scale is kept for backward.

On a GPU the Triton kernels of train/kernels.py compute this; everywhere else plain torch does, to the same integers:
for tests and for `eight_bit`'s measure on a CPU, not for speed. Each function is an operator of its own
(underdrawing::...), so that compiled blocks and fake tensors carry it; in compiled blocks rows are rounded by what
produces them.

Letters: R rows, K input features, N output features, D the features summed over, C those that come out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from train import frozen_linear

FEWEST_ROWS = 128
"""With fewer rows a product waits for its weight on a GPU, not for arithmetic: it stays exact. A tile of `kernels` has
as many."""
MOST_SUMMED = (2**31 - 1) // 127**2
"""Features that an int32 sum of int8 products holds: 133,144."""
_TINIEST = 1e-30

torch.library.define("underdrawing::int8_rows", "(Tensor x, Tensor? column_scale) -> (Tensor, Tensor)")
torch.library.define(
    "underdrawing::int8_matmul",
    "(Tensor rows, Tensor row_scale, Tensor weight, Tensor? scale, Tensor? bias, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "underdrawing::int8_matmul_transposed",
    "(Tensor rows, Tensor row_scale, Tensor weight, ScalarType dtype) -> Tensor",
)


def int8_rows(x: torch.Tensor, column_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, D), times column_scale (D,) where given -> int8 (R, D) and row_scale (R,) fp32: x is about their product.

    A row that holds NaN or infinity gets a scale that is not finite, and so does all that is computed from it.
    """
    if torch.compiler.is_compiling():
        return _rows(x, column_scale)  # as plain torch, the compiler joins it with what makes x, and does it once
    return torch.ops.underdrawing.int8_rows(x, column_scale)


def int8_matmul(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """int8 rows (R, D) times int8 weight (C, D) -> (R, C) in `dtype`: times row_scale (R,), scale (C,), plus bias (C,).

    Scales and bias are applied in fp32 before the one rounding to `dtype`.
    """
    return torch.ops.underdrawing.int8_matmul(rows, row_scale, weight, scale, bias, dtype)


def int8_matmul_transposed(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """int8 rows (R, D) times int8 weight (D, C), summed along the weight's columns -> (R, C) in `dtype`."""
    return torch.ops.underdrawing.int8_matmul_transposed(rows, row_scale, weight, dtype)


class _Int8Backward(torch.autograd.Function):
    """Exact forward; the gradient's product in int8. Saved for backward: the weight's integers and scales."""

    @staticmethod
    def forward(
        x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return frozen_linear.exact(x, weight_int8, scale, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, weight_int8, scale, _ = inputs
        ctx.save_for_backward(weight_int8, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        [gradient] = gradients
        weight_int8, scale = ctx.saved_tensors
        integers, row_scale = int8_rows(gradient.reshape(-1, gradient.shape[-1]), scale.view(-1))
        product = int8_matmul_transposed(integers, row_scale, weight_int8, gradient.dtype)
        return product.view(*gradient.shape[:-1], weight_int8.shape[1]), None, None, None


class _Int8(_Int8Backward):
    """Both products in int8."""

    @staticmethod
    def forward(
        x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        integers, row_scale = int8_rows(x.reshape(-1, x.shape[-1]))
        product = int8_matmul(integers, row_scale, weight_int8, scale.view(-1), bias, x.dtype)
        return product.view(*x.shape[:-1], weight_int8.shape[0])


def int8_backward(
    x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`frozen_linear.Multiply` whose gradient's product is in int8."""
    if _is_small(x):
        return frozen_linear.exact(x, weight_int8, scale, bias)
    _check(x, weight_int8, scale)
    return _Int8Backward.apply(x, weight_int8, scale, bias)


def int8(x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`frozen_linear.Multiply` with both products in int8."""
    if _is_small(x):
        return frozen_linear.exact(x, weight_int8, scale, bias)
    _check(x, weight_int8, scale)
    return _Int8.apply(x, weight_int8, scale, bias)


frozen_linear.ARITHMETIC.update(int8_backward=int8_backward, int8=int8)


def _is_small(x: torch.Tensor) -> bool:
    return x.device.type == "cuda" and x.numel() < FEWEST_ROWS * x.shape[-1]


def _check(x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor) -> None:
    assert x.dtype == scale.dtype, f"{x.dtype} meets a weight held for {scale.dtype}"
    assert max(weight_int8.shape) <= MOST_SUMMED, f"a sum over {max(weight_int8.shape)} products may overflow int32"


# --- in plain torch -------------------------------------------------------------------------------------------------


def _rows(x: torch.Tensor, column_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    value = x.float() if column_scale is None else x.float() * column_scale.float()
    largest = value.abs().amax(dim=1)
    steps = torch.where(largest > _TINIEST, torch.full_like(largest, 127) / largest, 0.0)  # 127 / x rounds twice
    return torch.round(value * steps[:, None]).to(torch.int8), largest / 127


torch.library.impl("underdrawing::int8_rows", "cpu", _rows)


@torch.library.impl("underdrawing::int8_matmul", "cpu")
def _matmul_on_cpu(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    result = _exact_sums(rows, weight.t()) * row_scale[:, None]
    if scale is not None:
        result *= scale.float()
    if bias is not None:
        result += bias.float()
    return result.to(dtype)


@torch.library.impl("underdrawing::int8_matmul_transposed", "cpu")
def _matmul_transposed_on_cpu(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return (_exact_sums(rows, weight) * row_scale[:, None]).to(dtype)


def _exact_sums(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 (R, D) times int8 (D, C) -> (R, C) fp32, each sum rounded once: float64 holds every partial sum exactly."""
    return (rows.double() @ weight.double()).float()


# --- on a GPU -------------------------------------------------------------------------------------------------------


@torch.library.impl("underdrawing::int8_rows", "cuda")
def _rows_on_gpu(x: torch.Tensor, column_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    from train import kernels

    return kernels.quantize_rows(x, column_scale)


@torch.library.impl("underdrawing::int8_matmul", "cuda")
def _matmul_on_gpu(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    from train import kernels

    return kernels.matmul(rows.contiguous(), row_scale, weight.contiguous(), scale, bias, dtype)


@torch.library.impl("underdrawing::int8_matmul_transposed", "cuda")
def _matmul_transposed_on_gpu(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    from train import kernels

    return kernels.matmul_transposed(rows.contiguous(), row_scale, weight.contiguous(), dtype)


# --- of shapes alone ------------------------------------------------------------------------------------------------


@torch.library.register_fake("underdrawing::int8_rows")
def _rows_of_shape(x: torch.Tensor, column_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.register_fake("underdrawing::int8_matmul")
def _matmul_of_shape(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("underdrawing::int8_matmul_transposed")
def _matmul_transposed_of_shape(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]), dtype=dtype)


@register_flop_formula(torch.ops.underdrawing.int8_matmul)
def _matmul_flops(rows: torch.Size, row_scale: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Counted like any product, though the operations are of integers."""
    return 2 * rows.numel() * weight[0]


@register_flop_formula(torch.ops.underdrawing.int8_matmul_transposed)
def _matmul_transposed_flops(
    rows: torch.Size, row_scale: torch.Size, weight: torch.Size, *_: object, **__: object
) -> int:
    """Counted like any product."""
    return 2 * rows.numel() * weight[1]
