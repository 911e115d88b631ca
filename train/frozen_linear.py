"""A frozen linear layer held in int8: what it computes, what it keeps, how its products are computed.

N output features, K input features, R rows: all tokens of a batch. The numbers are optimum-quanto's: one scale for each
output channel, weight = weight_int8 * scale. Its own layer keeps every input for a weight gradient that nobody needs
(+2.95 GiB for a FLUX.1-dev sample of 512 px); this one keeps nothing but the weights that are there anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

import torch

Arithmetic = Literal["exact", "int8_backward", "int8"]
"""exact: products of the dequantized weight. int8_backward: the gradient's product in int8. int8: both in int8."""

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x (..., K), weight_int8 (N, K), scale (N, 1), bias (N,) or None -> (..., N), differentiable in x alone."""


class FrozenInt8Linear(torch.nn.Module):
    """y = x (weight_int8 * scale)^T + bias, frozen: everything it holds is a buffer, so no library can make it train.

    For backward it saves no activation: the gradient of x needs the weight alone.
    """

    weight_int8: torch.Tensor
    """int8 (N, K)."""
    scale: torch.Tensor
    """(N, 1), in the dtype of the computation: x must have it."""
    bias: torch.Tensor | None
    """(N,) in the scale's dtype."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        """The buffers are not initialised: `from_float` fills them, or whoever has the numbers."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.arithmetic: Arithmetic = "exact"
        self.register_buffer("weight_int8", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, 1, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    @torch.no_grad()
    def from_float(cls, linear: torch.nn.Linear) -> FrozenInt8Linear:
        """The layer in int8 with quanto's numbers, bit for bit, where its weight is; `linear` stays as it is."""
        with torch.device("meta"):
            frozen = cls(
                linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=linear.weight.dtype
            )
        frozen.weight_int8, frozen.scale = quantized(linear.weight)
        frozen.bias = None if linear.bias is None else linear.bias.detach().clone()
        return frozen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N). The one place where an arithmetic is chosen."""
        return ARITHMETIC[self.arithmetic](x, self.weight_int8, self.scale, self.bias)

    @property
    def num_weights(self) -> int:
        """Numbers of the layer that it was made from: what a count of parameters is to show."""
        return self.weight_int8.numel() + (0 if self.bias is None else self.bias.numel())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"arithmetic={self.arithmetic}"
        )


@torch.no_grad()
def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) -> int8 (N, K) and the scales (N, 1) in the weight's dtype, on its device: quanto's own functions."""
    from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight

    scale = AbsmaxOptimizer()(weight, qtype=qint8, axis=0)
    held = quantize_weight(weight, qtype=qint8, axis=0, scale=scale, optimized=False)
    parts, _ = held.__tensor_flatten__()
    integers, scale = (getattr(held, part) for part in parts)
    return integers, scale


class _Exact(torch.autograd.Function):
    """The product with the dequantized weight. Saved for backward: the integers and their scales."""

    @staticmethod
    def forward(
        x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight = _dequantized(weight_int8, scale)
        product = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        return product.view(*x.shape[:-1], weight_int8.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, weight_int8, scale, _ = inputs
        ctx.save_for_backward(weight_int8, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        [gradient] = gradients
        weight_int8, scale = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        product = rows @ _dequantized(weight_int8, scale, backward=True)
        return product.view(*gradient.shape[:-1], weight_int8.shape[1]), None, None, None


def exact(x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`Multiply` with the dequantized weight: quanto's result up to rounding (the bias enters inside the product)."""
    assert x.dtype == scale.dtype, f"{x.dtype} meets a weight held for {scale.dtype}"
    return _Exact.apply(x, weight_int8, scale, bias)


ARITHMETIC: dict[str, Multiply] = {"exact": exact}
"""What multiplies under each name of `Arithmetic`. The others are put here by whoever has them:
train/int8_arithmetic.py."""


def linears(module: torch.nn.Module) -> dict[str, FrozenInt8Linear]:
    """Every int8 layer of a model under its qualified name, in the model's order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, FrozenInt8Linear)}


_scratch: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}
"""One weight's room for each (device, dtype, queue of work), as large as the largest weight was."""


def _dequantized(weight_int8: torch.Tensor, scale: torch.Tensor, *, backward: bool = False) -> torch.Tensor:
    """(N, K) in the scale's dtype, valid until the next call: all layers of a queue share one room, so that a pass
    over the model needs memory for its largest weight and not for what an allocator keeps of all of them."""
    plain = type(weight_int8) in (torch.Tensor, torch.nn.Parameter)  # a parameter where it is spread over cards
    if torch.compiler.is_compiling() or not plain or weight_int8.is_meta:
        # A compiler plans memory itself; a fake tensor has none. Where it sees one product both in forward and in
        # backward, it keeps the matrix in between: 16 GiB of them. In another order it is another product to it.
        return scale * weight_int8 if backward else weight_int8 * scale
    device = weight_int8.device
    # On a GPU work is queued in order; on the CPU each thread works by itself, and backward in the caller's.
    queue = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident()
    key = (device, scale.dtype, queue)
    room = _scratch.get(key)
    if room is None or room.numel() < weight_int8.numel():
        _scratch.pop(key, None)
        with torch.inference_mode(False):  # else it could be written to in inference alone
            room = _scratch[key] = torch.empty(weight_int8.numel(), dtype=scale.dtype, device=device)
    weight = room[: weight_int8.numel()].view(weight_int8.shape)
    return torch.mul(weight_int8, scale, out=weight)
