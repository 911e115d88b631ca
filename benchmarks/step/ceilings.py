"""What the card can do at most: matrix products, attention, copies. Every share of a ceiling is of these.

All on random numbers of variance one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.step.sizes import Size
from benchmarks.step.timing import median_seconds

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def measure(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """TFLOP/s of products and attention under their names, TB/s of copies."""
    full = device.type == "cuda"
    tokens = (1536, 6144, 18432) if full else (64,)
    lengths = (1101, 1536, 4173, 4608) if full else (80,)
    return {
        "gemm": dict(_products(size, tokens, 8192 if full else 128, device, dtype)),
        "int8": dict(_int8_products(size, tokens, device)),
        "attention": dict(_attention(size, lengths, device, dtype)),
        "copy": _copies(device, 2**32 if full else 2**20),
    }


def _products(
    size: Size, tokens: tuple[int, ...], square: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, float]]:
    for M, N, K in [(square, square, square), *_shapes(size, tokens)]:
        a, b = _normal(M, K, device=device).to(dtype), _normal(N, K, device=device).to(dtype)
        yield f"{M}x{N}x{K}", _tera(2.0 * M * N * K, lambda a=a, b=b: F.linear(a, b), device)  # type: ignore[misc]


def _int8_products(size: Size, tokens: tuple[int, ...], device: torch.device) -> Iterator[tuple[str, float]]:
    """`_int_mm` with the weights as a forward has them (NT), and as a gradient of activations has them (NN)."""
    for M, N, K in _shapes(size, tokens):
        a, weight = (torch.randint(-127, 128, shape, dtype=torch.int8, device=device) for shape in ((M, K), (N, K)))
        yield f"{M}x{N}x{K} NT", _tera(2.0 * M * N * K, lambda a=a, w=weight: torch._int_mm(a, w.t()), device)  # type: ignore[misc]
        other = weight.t().contiguous()
        yield f"{M}x{N}x{K} NN", _tera(2.0 * M * N * K, lambda a=a, w=other: torch._int_mm(a, w), device)  # type: ignore[misc]


def _attention(
    size: Size, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, float]]:
    """Forward at 4 S^2 D operations, forward and backward at 3.5 times as many."""
    for name, backend in BACKENDS.items():
        if name == "math" and device.type == "cuda":
            continue  # keeps all scores: no one's choice at this size
        for S in lengths:
            q, k, v = (
                _normal(1, size.num_heads, S, size.head_dim, device=device).to(dtype).requires_grad_() for _ in range(3)
            )
            gradient = _normal(*q.shape, device=device).to(dtype)
            forward = 4.0 * S * S * size.width

            def only(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
                with torch.no_grad():
                    return F.scaled_dot_product_attention(q, k, v)

            def both(
                q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v, gradient: torch.Tensor = gradient
            ) -> object:
                return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), gradient)

            try:
                with sdpa_kernel(backend):
                    yield f"{name} S={S} forward", _tera(forward, only, device)
                    yield f"{name} S={S} forward+backward", _tera(3.5 * forward, both, device)
            except RuntimeError:  # this card or this build has no such kernel
                break


def _copies(device: torch.device, num_bytes: int) -> dict[str, float]:
    """TB/s: within the device counting what is read and written, between it and the host's pinned memory one way."""
    source = _normal(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    found = {"within the device": 2 * num_bytes / median_seconds(lambda: target.copy_(source), device) / 1e12}
    if device.type == "cuda":
        host = torch.empty(num_bytes // 16, pin_memory=True)
        part = source[: host.numel()]
        share = num_bytes / 4 / 1e12
        found["host to device"] = share / median_seconds(lambda: part.copy_(host, non_blocking=True), device)
        found["device to host"] = share / median_seconds(lambda: host.copy_(part, non_blocking=True), device)
    return found


def _shapes(size: Size, tokens: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(M, N, K) of a block's linears: to q, k or v; into and out of the feed-forward; into and out of a single block
    with its parts fused, as the original model has them."""
    D = size.width
    linears = ((D, D), (3 * D, D), (4 * D, D), (D, 4 * D), (7 * D, D), (D, 5 * D))
    return [(M, N, K) for M in tokens for N, K in linears]


def _normal(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device)


def _tera(operations: float, call: Callable[[], object], device: torch.device) -> float:
    return operations / median_seconds(call, device, budget_seconds=0.25 if device.type == "cuda" else 0.01) / 1e12


__all__ = ["BACKENDS", "measure"]
