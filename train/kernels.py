"""Triton kernels of 8-bit products: rows to int8, an int8 matrix product with its scales, an int8 transposition.

R rows, D the features summed over, C the features that come out. Sums are int32 and so exact, and multiplications are
not fused with additions: whichever candidate is the fastest, the bits of the result are those of plain torch.
train/int8_arithmetic.py says what is computed, and computes it without Triton; this file is loaded on a GPU alone. The
tests run the kernels in Triton's interpreter, and compile each candidate for sm_80, sm_89 and sm_90 without spills.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(127.0)
TINIEST = tl.constexpr(1e-30)
"""Rows below it become zeros: 127 / largest would overflow."""
ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float of the size of one has no bits for fractions, so adding it rounds to nearest, ties to even."""


@triton.jit
def quantize_rows_kernel(
    x: tl.tensor, column_scale: tl.tensor, integers: tl.tensor, row_scale: tl.tensor, num_columns: tl.tensor,
    x_stride: tl.tensor, SCALED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One row to a program, read once. What is not finite stays so, in the scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(column_scale + column, mask=inside, other=0.0).to(tl.float32)
    # The bits of positive floats are ordered as they are, infinity above all and NaN above it; a maximum of floats
    # would pass over NaN.
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, axis=0).to(tl.float32, bitcast=True)
    steps = tl.where(largest > TINIEST, tl.div_rn(LARGEST, largest), 0.0)
    rounded = (value * steps + ROUNDING) - ROUNDING
    tl.store(integers + row * num_columns + column, rounded.to(tl.int8), mask=inside)
    tl.store(row_scale + row, tl.div_rn(largest, LARGEST))


@triton.jit
def matmul_kernel(
    rows: tl.tensor, weight: tl.tensor, out: tl.tensor, row_scale: tl.tensor, scale: tl.tensor, bias: tl.tensor,
    R: tl.tensor, C: tl.tensor, D: tl.tensor, weight_stride: tl.tensor,
    ALONG_ROWS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr, UNROLL: tl.constexpr,
    TILE_R: tl.constexpr, TILE_C: tl.constexpr, TILE_D: tl.constexpr, BAND: tl.constexpr,
) -> None:  # fmt: skip
    """out (R, C) = rows (R, D) @ weight, times row_scale (R,), times scale (C,), plus bias (C,).

    The weight is (C, D) in memory, summed along its rows, or (D, C), summed along its columns. WHOLE: D is a multiple
    of TILE_D. Tiles go in bands of BAND rows of tiles, so that what is read is still in the cache for the next tile.
    """
    num_tiles_r, num_tiles_c = tl.cdiv(R, TILE_R), tl.cdiv(C, TILE_C)
    program = tl.program_id(0)
    in_band = BAND * num_tiles_c
    band = program // in_band
    band_height = tl.minimum(num_tiles_r - band * BAND, BAND)
    tile_r = band * BAND + (program % in_band) % band_height
    tile_c = (program % in_band) // band_height
    r = tile_r * TILE_R + tl.arange(0, TILE_R)
    c = tile_c * TILE_C + tl.arange(0, TILE_C)
    d = tl.arange(0, TILE_D)
    # Beyond the edge the first rows are read once more: reading needs no mask then, writing has one.
    rows_at = rows + (r % R)[:, None].to(tl.int64) * D + d[None, :]
    if ALONG_ROWS:
        weight_at = weight + (c % C)[None, :].to(tl.int64) * weight_stride + d[:, None]
    else:
        weight_at = weight + d[:, None].to(tl.int64) * weight_stride + (c % C)[None, :]
    total = tl.zeros((TILE_R, TILE_C), dtype=tl.int32)
    for start in tl.range(0, D, TILE_D, loop_unroll_factor=UNROLL):
        if WHOLE:
            left = tl.load(rows_at)
            right = tl.load(weight_at)
        else:
            left = tl.load(rows_at, mask=d[None, :] < D - start, other=0)
            right = tl.load(weight_at, mask=d[:, None] < D - start, other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        rows_at += TILE_D
        if ALONG_ROWS:
            weight_at += TILE_D
        else:
            weight_at += TILE_D * weight_stride
    result = total.to(tl.float32) * tl.load(row_scale + r, mask=r < R, other=0.0)[:, None]
    if SCALED:
        result *= tl.load(scale + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if BIASED:
        result += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    out_at = out + r[:, None].to(tl.int64) * C + c[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=(r < R)[:, None] & (c < C)[None, :])


@triton.jit
def transpose_kernel(
    matrix: tl.tensor, out: tl.tensor, N: tl.tensor, K: tl.tensor, TILE: tl.constexpr
) -> None:  # fmt: skip
    """out (K, N) = matrix (N, K) of int8."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (n < N)[:, None] & (k < K)[None, :]
    tile = tl.load(matrix + n[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0)
    tl.store(out + k[:, None].to(tl.int64) * N + n[None, :], tl.trans(tile), mask=tl.trans(inside))


@dataclass(frozen=True)
class Tiles:
    """One way to run `matmul_kernel`."""

    r: int
    c: int
    d: int
    num_warps: int
    num_stages: int
    unroll: int = 1


BAND, TRANSPOSED_TILE = 8, 128
_UNROLL = 2 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 1
"""Products in a round on sm_80 and sm_89. Since Triton 3.8 a loop with one product fetches the next round's operands
into registers, a register to a byte: 264 instructions beside 32 of the tensor core, and 3 KB of spills with the larger
tile. With two it does not. Before 3.8 two spill, and one is clean."""
_AMPERE = (Tiles(128, 256, 64, 8, 4, _UNROLL), Tiles(128, 128, 64, 8, 4, _UNROLL))
_ADA = (Tiles(128, 256, 64, 8, 3, _UNROLL), Tiles(128, 128, 64, 8, 4, _UNROLL))
_HOPPER = (Tiles(128, 256, 128, 8, 3), Tiles(128, 128, 128, 8, 3))


def candidates(capability: tuple[int, int]) -> tuple[Tiles, ...]:
    """The tiles to try on a card: by its shared memory (163 KiB a block on sm_80, 99 on sm_86, sm_89 and sm_120, 227 on
    sm_90), and by whether its tensor cores read that memory themselves (sm_90)."""
    if capability == (9, 0):
        return _HOPPER
    return _AMPERE if capability == (8, 0) else _ADA


def quantize_rows(x: torch.Tensor, column_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, D), times column_scale (D,) -> int8 (R, D) and the rows' scales (R,) fp32."""
    x = x if x.stride(1) == 1 else x.contiguous()
    R, D = x.shape
    integers = torch.empty(R, D, dtype=torch.int8, device=x.device)
    row_scale = torch.empty(R, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(D)
    quantize_rows_kernel[(R,)](
        x, x if column_scale is None else column_scale, integers, row_scale, D, x.stride(0),
        SCALED=column_scale is not None, BLOCK=block, num_warps=quantizing_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return integers, row_scale


def quantizing_warps(block: int) -> int:
    """Warps to a row of `block` numbers: 32 numbers to a thread at most."""
    return min(max(block // 1024, 4), 16)


def matmul(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """int8 rows (R, D) times the int8 weight (C, D) -> (R, C): times row_scale (R,), times scale (C,), plus bias."""
    C, out = len(weight), torch.empty(len(rows), len(weight), dtype=dtype, device=rows.device)
    tried: list[Callable[[], None]] = [
        functools.partial(launch_matmul, tiles, rows, row_scale, weight, scale, bias, out, along_rows=True)
        for tiles in _candidates(rows.device)
    ]
    _fastest(("forward", rows.device, _rounded(len(rows)), C, rows.shape[1]), tried)
    return out


def matmul_transposed(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """int8 rows (R, N) times the int8 weight (N, K) -> (R, K), times row_scale (R,).

    Tensor cores want the bytes that they sum over side by side; here they lie a row apart. Either the bytes are
    gathered inside the product, or the weight is transposed first, into memory that is free again afterwards: which of
    them is faster the card and the number of rows decide.
    """
    out = torch.empty(len(rows), weight.shape[1], dtype=dtype, device=rows.device)

    def transposed_first(tiles: Tiles) -> None:
        launch_matmul(tiles, rows, row_scale, transposed(weight), None, None, out, along_rows=True)

    tried: list[Callable[[], None]] = [
        functools.partial(launch_matmul, tiles, rows, row_scale, weight, None, None, out, along_rows=False)
        for tiles in _candidates(rows.device)
    ]
    tried += [functools.partial(transposed_first, tiles) for tiles in _candidates(rows.device)]
    _fastest(("backward", rows.device, _rounded(len(rows)), *weight.shape), tried)
    return out


def launch_matmul(
    tiles: Tiles,
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    along_rows: bool,
) -> None:
    """Fill `out` (R, C) with these tiles. `weight` is (C, D) if summed along its rows, else (D, C); all contiguous."""
    (R, D), C = rows.shape, out.shape[1]
    matmul_kernel[(triton.cdiv(R, tiles.r) * triton.cdiv(C, tiles.c),)](
        rows, weight, out, row_scale, out if scale is None else scale, out if bias is None else bias,
        R, C, D, weight.stride(0), num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=False,
        **constants(
            tiles, along_rows=along_rows, scaled=scale is not None, biased=bias is not None, whole=D % tiles.d == 0
        ),
    )  # fmt: skip


def constants(tiles: Tiles, *, along_rows: bool, scaled: bool, biased: bool, whole: bool) -> dict[str, bool | int]:
    """What `matmul_kernel` is compiled for."""
    return {
        "ALONG_ROWS": along_rows, "SCALED": scaled, "BIASED": biased, "WHOLE": whole, "UNROLL": tiles.unroll,
        "TILE_R": tiles.r, "TILE_C": tiles.c, "TILE_D": tiles.d, "BAND": BAND,
    }  # fmt: skip


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """int8 (N, K) -> (K, N), contiguous."""
    N, K = matrix.shape
    out = torch.empty(K, N, dtype=torch.int8, device=matrix.device)
    transpose_kernel[(triton.cdiv(N, TRANSPOSED_TILE), triton.cdiv(K, TRANSPOSED_TILE))](
        matrix, out, N, K, TILE=TRANSPOSED_TILE, num_warps=8
    )
    return out


@functools.cache
def _candidates(device: torch.device) -> tuple[Tiles, ...]:
    return candidates(torch.cuda.get_device_capability(device))


def _rounded(num_rows: int) -> int:
    """Numbers of rows between two powers of two share what was measured."""
    return triton.next_power_of_2(num_rows)


_measured: dict[Hashable, int] = {}


def _fastest(key: Hashable, tried: list[Callable[[], None]]) -> None:
    """Run what was found the fastest under this key; the first time, all of them, a few times each."""
    if (best := _measured.get(key)) is None:
        seconds = [_time(run) for run in tried]
        best = _measured[key] = seconds.index(min(seconds))
    tried[best]()


def _time(run: Callable[[], None]) -> float:
    """The shortest of five runs, in ms, after one that compiles."""
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in itertools.pairwise(marks))
