"""Rounding to bfloat16 by chance, so that updates far smaller than the distance of two neighbours arrive on average
(arXiv 1502.02551)."""

from __future__ import annotations

import math
import sys

import torch

_HIGH_HALF = 1 if sys.byteorder == "little" else 0
"""Which of a float32's two 16-bit words is its bfloat16 part."""


def stochastic_round_(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Round float32 `x` to one of its two bfloat16 neighbours so that the mean is `x`. Uses up `x`: the result, of the
    same shape, lies in its memory.

    To the bit: the float32 is read as a 32-bit integer, an integer drawn uniformly from 0 to 65,535 is added, and the
    upper 16 bits are the bfloat16. So the neighbour further from zero is taken with probability lower 16 bits / 65,536,
    and a value that bfloat16 holds exactly never changes. Infinities stay; every NaN becomes the canonical NaN, whose
    lower bits are zero (others could carry over into a number). Beyond the largest bfloat16 the further neighbour is
    infinity, as in rounding to nearest. `x` must be contiguous, `generator` on its device (None: torch's own).
    """
    assert x.dtype == torch.float32, x.dtype
    x.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)
    bits = x.view(-1).view(torch.int32)
    drawn_on = x.device if generator is None else generator.device
    bits.add_(
        torch.randint(0, 1 << 16, bits.shape, generator=generator, device=drawn_on, dtype=torch.int32).to(x.device)
    )
    return bits.view(torch.int16)[_HIGH_HALF::2].view(torch.bfloat16).view(x.shape)
