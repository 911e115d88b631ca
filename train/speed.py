"""How fast a step is computed: the options of `train/compile.py`, `train/attention.py` and
`train/int8_arithmetic.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["auto", "flash", "cudnn", "efficient", "math"]
Arithmetic = Literal["exact", "int8_backward", "int8"]


@dataclass(frozen=True)
class SpeedOptions:
    """What a step computes stays the same to rounding, but for 8-bit arithmetic, which is measured first."""

    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the blocks of the base and the ControlNet, once for each shape; what is compiled is kept for the next
    start. auto: on a GPU. Turn it off for a run of a few steps, or where compiling fails."""
    attention: Attention = "auto"
    """Which of torch's attention kernels. auto: on a GPU the fastest at this run's shapes, measured when a kind of card
    is first used; on the CPU torch's own choice. math keeps a number for every pair of tokens: only to compare."""
    arithmetic: Arithmetic = "exact"
    """exact: the int8 base is computed with in the run's precision. int8_backward: gradients pass the base's linears in
    8-bit arithmetic; int8: activations too. On the first batches of each start the gradient is held against the
    unquantized base's and refused where it differs too much. Not yet tried on FLUX.1-dev's own weights."""
