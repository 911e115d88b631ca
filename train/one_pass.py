"""AdamW with 8-bit moments in one pass over memory: a Triton kernel for GPUs.

What train/optimizer.py does in several passes (a float32 copy, bitsandbytes' kernel, random bits, rounding: 60 bytes
read and written per bfloat16 weight) takes 10 bytes here. The states are bitsandbytes' own, the same bytes with the
same meaning, so a run may change between the two. The noise is another: a hash of the weight's place and the seed,
which costs no memory. Before it is used the kernel is held against bitsandbytes' on the card; the tests run it in
Triton's interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK_NUMEL = tl.constexpr(256)
BLOCKS = 4
"""Blocks of 256 values to a program."""
NUM_WARPS = 4
STOCHASTIC, NEAREST, FLOAT32, MASTER = 0, 1, 2, 3
"""What becomes of a stepped value: a bfloat16 weight, by chance or the nearest; a float32 weight; a float32 master copy
and the bfloat16 weight nearest to it."""
_EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def _code(x: tl.tensor, middles: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """Which of the 256 code values is nearest to x, from -1 (0 where they have no sign) to 1.

    bitsandbytes' "dynamic" codes: seven decades from 1e-7 up to 1, of 1, 2, 4 ... 64 equal cells each (twice as many
    without a sign), each standing for its middle; and 0, and 1. So the cell follows from the number. At the ends of a
    decade a neighbour's value may be nearer: the `middles` between consecutive values decide.
    """
    size = tl.abs(x)
    decade = (size >= 1e-6).to(tl.int32) + (size >= 1e-5).to(tl.int32) + (size >= 1e-4).to(tl.int32)
    decade += (size >= 1e-3).to(tl.int32) + (size >= 1e-2).to(tl.int32) + (size >= 1e-1).to(tl.int32)
    ten_up = tl.where(decade == 0, 1e6, tl.where(decade == 1, 1e5, tl.where(decade == 2, 1e4, 1e3)))
    ten_up = tl.where(decade < 4, ten_up, tl.where(decade == 4, 1e2, tl.where(decade == 5, 1e1, 1.0)))
    num_cells = (1 if SIGNED else 2) << decade
    cell = ((size * ten_up - 0.1) * (num_cells.to(tl.float32) / 0.9)).to(tl.int32)
    cell = tl.minimum(tl.maximum(cell, 0), num_cells - 1)
    code = num_cells - 1 + cell
    if SIGNED:
        code = tl.where(x < 0, 126 - code, 128 + code)
    below = tl.load(middles + tl.maximum(code - 1, 0))
    above = tl.load(middles + tl.minimum(code, 254))
    code += ((x > above) & (code < 255)).to(tl.int32) - ((x < below) & (code > 0)).to(tl.int32)
    return code


@triton.jit
def _noise(place: tl.tensor, key: tl.tensor, second_key: tl.tensor) -> tl.tensor:
    """16 random bits: the finalizer of MurmurHash3, twice, each time with a key of its own."""
    bits = place.to(tl.uint32) * 0x9E3779B1 ^ key.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = (bits ^ (bits >> 16)) ^ second_key.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return (bits >> 16).to(tl.int32)


@triton.jit(do_not_specialize=["key", "second_key"])
def adamw_kernel(
    stepped: tl.tensor, weight: tl.tensor, gradient: tl.tensor, after: tl.tensor, state1: tl.tensor, state2: tl.tensor,
    absmax1: tl.tensor, absmax2: tl.tensor, codes1: tl.tensor, codes2: tl.tensor, middles1: tl.tensor,
    middles2: tl.tensor, squares: tl.tensor, scale: tl.tensor, numel: tl.tensor, step_size: tl.tensor,
    root_correction: tl.tensor, kept: tl.tensor, epsilon: tl.tensor, beta1: tl.tensor, rest1: tl.tensor,
    beta2: tl.tensor, rest2: tl.tensor, key: tl.tensor, second_key: tl.tensor, MODE: tl.constexpr,
    MEASURED: tl.constexpr, BLOCKS: tl.constexpr,
) -> None:  # fmt: skip
    """One step of the values of BLOCKS blocks."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK_NUMEL + tl.arange(0, BLOCK_NUMEL)[None, :]
    inside = place < numel
    blocks_inside = block * BLOCK_NUMEL < numel
    before = tl.load(stepped + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    code1 = tl.load(state1 + place, mask=inside, other=0).to(tl.int32)
    code2 = tl.load(state2 + place, mask=inside, other=0).to(tl.int32)
    m = tl.load(codes1 + code1) * tl.load(absmax1 + block, mask=blocks_inside, other=0.0)[:, None]
    v = tl.load(codes2 + code2) * tl.load(absmax2 + block, mask=blocks_inside, other=0.0)[:, None]
    m = tl.where(inside, m * beta1 + g * rest1, 0.0)
    v = tl.where(inside, v * beta2 + g * g * rest2, 0.0)
    value = before * kept - step_size * m / (tl.sqrt(v) / root_correction + epsilon)
    change = value - before  # 0 outside
    tl.store(squares + tl.program_id(0), tl.sum(tl.sum(change * change, axis=1), axis=0))

    largest1, largest2 = tl.max(tl.abs(m), axis=1), tl.max(v, axis=1)
    code1 = _code(m / tl.where(largest1 > 0, largest1, 1.0)[:, None], middles1, True)
    code2 = _code(v / tl.where(largest2 > 0, largest2, 1.0)[:, None], middles2, False)
    tl.store(state1 + place, code1.to(tl.uint8), mask=inside)
    tl.store(state2 + place, code2.to(tl.uint8), mask=inside)
    tl.store(absmax1 + block, largest1, mask=blocks_inside)
    tl.store(absmax2 + block, largest2, mask=blocks_inside)

    if MEASURED:
        tl.store(after + place, value, mask=inside)
    if MODE >= 2:
        tl.store(stepped + place, value, mask=inside)
    if MODE != 2:
        bits = value.to(tl.int32, bitcast=True)
        added = 0x7FFF + ((bits >> 16) & 1)  # to the nearest, of two as near the even one
        if MODE == 0:
            added = _noise(place, key, second_key)
        # Infinities and NaN are kept from becoming one another.
        bits = tl.where((bits & _EXPONENT) == _EXPONENT, bits, (bits + added) & -65536)
        tl.store(weight + place, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)


def adamw(
    *,
    stepped: torch.Tensor,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    after: torch.Tensor | None,
    state: dict[str, torch.Tensor],
    codes: tuple[torch.Tensor, torch.Tensor],
    middles: tuple[torch.Tensor, torch.Tensor],
    scale: torch.Tensor,
    mode: int,
    seed: int,
    num_steps: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> torch.Tensor:
    """Step `stepped` (the weight itself, or its float32 master copy) by `scale` (0-dim) times its gradient; all flat
    and contiguous. `state`: `state1`, `state2`, `absmax1`, `absmax2`, changed in place. `codes`: what the bytes of mean
    and mean of squares stand for (256,); `middles`: between those (255,). `after` (float32): gets the values before
    rounding. `num_steps` counts this step; `seed` (64 bits) draws the rounding. Back comes the squared norm of the
    change before it was rounded, 0-dim float32."""
    key, second_key = (((seed >> shift) & 0xFFFFFFFF) - (1 << 31) for shift in (0, 32))
    num_programs = triton.cdiv(stepped.numel(), BLOCKS * 256)
    squares = torch.empty(num_programs, device=stepped.device)
    adamw_kernel[(num_programs,)](
        stepped, weight, gradient, stepped if after is None else after,
        state["state1"], state["state2"], state["absmax1"], state["absmax2"], *codes, *middles, squares,
        scale, stepped.numel(), learning_rate / (1 - beta1**num_steps), (1 - beta2**num_steps) ** 0.5,
        1 - learning_rate * weight_decay, epsilon, beta1, 1 - beta1, beta2, 1 - beta2, key, second_key,
        MODE=mode, MEASURED=after is not None, BLOCKS=BLOCKS, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return squares.sum()


def middles_of(codes: torch.Tensor) -> torch.Tensor:
    """(256,) -> (255,): between consecutive values."""
    return (codes[:-1] + codes[1:]) / 2


def agrees(kernel: Callable[..., None], codes: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether this kernel does what `kernel`, bitsandbytes', does, on the device where `codes` are: two steps of
    100,000 values, the second from one and the same state. Waits for the device.

    Values must be the same to float32's rounding (in the second step, to where in it the weight decays), states to a
    code's distance (bitsandbytes' rounding to codes is not quite to the nearest on every device); and what is rounded
    by chance must be a neighbour, right on average.
    """
    device, numel = codes[0].device, 100_100
    draw = torch.Generator(device).manual_seed(1)
    theirs = torch.randn(numel, generator=draw, device=device)
    sizes = torch.logspace(-4, 0, numel, device=device)
    blocks = -(-numel // 256)
    state = {name: torch.zeros(numel, dtype=torch.uint8, device=device) for name in ("state1", "state2")}
    state |= {name: torch.zeros(blocks, device=device) for name in ("absmax1", "absmax2")}
    good = torch.ones((), dtype=torch.bool, device=device)
    for num_steps, decay in ((1, 0.0), (2, 0.1)):
        gradient = torch.randn(numel, generator=draw, device=device) * sizes
        ours, rounded, meant = theirs.clone(), theirs.to(torch.bfloat16), torch.empty_like(theirs)
        mine, again = ({name: tensor.clone() for name, tensor in state.items()} for _ in range(2))
        kernel(
            "adam", gradient, theirs, state["state1"], state["state2"], 0.9, 0.99, 0.0, 0.0, 1e-8, num_steps, 1e-2,
            *codes, state["absmax1"], state["absmax2"], decay, gnorm_scale=1.0,
        )  # fmt: skip
        step = functools.partial(
            adamw, gradient=gradient, codes=codes, middles=(middles_of(codes[0]), middles_of(codes[1])),
            scale=torch.ones((), device=device), num_steps=num_steps, learning_rate=1e-2, beta1=0.9, beta2=0.99,
            epsilon=1e-8, weight_decay=decay,
        )  # fmt: skip
        before = ours.clone()
        square = step(stepped=ours, weight=ours, after=None, state=mine, mode=FLOAT32, seed=0)
        good &= torch.isclose(square, (ours - before).double().square().sum().float(), rtol=1e-4, atol=0)
        step(stepped=rounded, weight=rounded, after=meant, state=again, mode=STOCHASTIC, seed=num_steps << 32 | 7)
        good &= torch.isclose(ours, theirs, rtol=1e-5, atol=1e-6 if decay == 0 else 1e-4).all()
        for i in (1, 2):
            value, same = (codes[i - 1][held[f"state{i}"].long()] for held in (state, mine))
            good &= torch.isclose(value, same, rtol=0, atol=0.015).all()  # two codes are 0.014 apart at most
            good &= torch.isclose(state[f"absmax{i}"], mine[f"absmax{i}"], rtol=1e-4, atol=0).all()
        spacing = torch.ldexp(torch.ones_like(meant), torch.frexp(meant).exponent - 8)  # of bfloat16's neighbours
        error = (rounded.float() - meant) / spacing
        good &= (error.abs() <= 1).all() & (error.mean().abs() < 0.01) & (error.std() > 0.3)
    return bool(good.item())
