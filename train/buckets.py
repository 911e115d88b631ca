"""Which weights an optimizer steps together, and how their states lie in memory: in one buffer for each bucket.

One buffer means one copy each way where the states rest on the host, and one layout wherever they rest. A weight
larger than a chunk is cut into pieces, so that what a step holds beside the states is bounded by the chunk, whatever
the size of the largest weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

CHUNK_NUMEL = 1 << 24
"""Weights stepped at once: float32 copies of them, of their gradients and of the noise are 0.19 GiB."""
LARGE_SHARE = 16
"""A weight of at least a 16th of a chunk is stepped by itself; smaller ones share buckets."""
MIN_8BIT_NUMEL = 4096
"""Smaller tensors keep 32-bit states, also under `adamw8bit` (bitsandbytes' own limit): they hold next to nothing."""
BLOCK_NUMEL = 256
"""Values that share one scale in 8-bit states (bitsandbytes). Pieces begin at multiples of it."""
_ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class Field:
    """One tensor of a state, in a bucket's buffer."""

    start: int
    """Where it begins, in bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor, of `shape`; it lies in `buffer` (uint8)."""
        num_bytes = prod(self.shape) * self.dtype.itemsize
        return buffer[self.start : self.start + num_bytes].view(self.dtype).view(self.shape)


@dataclass
class Piece:
    """A weight, or a part of a contiguous one."""

    name: str
    weight: torch.nn.Parameter
    start: int
    stop: int
    """It is the values from `start` to before `stop` of the flattened weight."""
    fields: dict[str, Field]
    """Its states: `exp_avg`, `exp_avg_sq`, or `state1`, `state2`, `absmax1`, `absmax2` (8 bits); `master` before them
    where a float32 copy of the weight is kept. Zeros are the states of a weight that was never stepped."""
    num_steps: int = 0

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """This piece's values, flat, of a tensor of the weight's shape. A view where the tensor is contiguous."""
        return tensor.reshape(-1)[self.start : self.stop]


@dataclass
class Bucket:
    """Pieces that are stepped together."""

    index: int
    eight_bit: bool
    pieces: list[Piece]
    num_bytes: int
    """Of the buffer that holds their states."""
    rate: float = 1.0
    """What the learning rate is multiplied by for them."""

    @property
    def num_weights(self) -> int:
        """Single values."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def in_blocks(numel: int) -> bool:
    """Whether a weight of so many values has its moments in 8 bits, where that is wanted."""
    return numel >= MIN_8BIT_NUMEL


def is_large(parameter: torch.Tensor, chunk_numel: int = CHUNK_NUMEL) -> bool:
    """Whether a weight shares its buckets with no other."""
    return parameter.numel() >= chunk_numel // LARGE_SHARE


def make_buckets(
    parameters: Mapping[str, torch.nn.Parameter],
    *,
    eight_bit: bool | frozenset[str],
    master: bool,
    chunk_numel: int = CHUNK_NUMEL,
    rates: Mapping[str, float] | None = None,
) -> list[Bucket]:
    """Buckets of pieces alike in dtype, state and rate, in the order of the parameters, large and small apart; none
    holds more weights than a chunk or than the largest parameter. They depend on the names, shapes, dtypes and rates
    alone.

    `eight_bit`: whether moments are kept in 8 bits, or the names of the weights of which they are. `rates`: what the
    learning rate is multiplied by, of the weights for which it is."""
    assert chunk_numel % BLOCK_NUMEL == 0, chunk_numel
    limit = min(chunk_numel, max(parameter.numel() for parameter in parameters.values()))
    buckets: list[Bucket] = []
    shared: dict[tuple[torch.dtype, bool, float], Bucket] = {}
    for name, weight in parameters.items():
        in_8_bits = name in eight_bit if isinstance(eight_bit, frozenset) else eight_bit and in_blocks(weight.numel())
        rate = 1.0 if rates is None else rates.get(name, 1.0)
        # A weight that is not contiguous has no flat view to cut.
        size = chunk_numel if weight.is_contiguous() else weight.numel()
        for start in range(0, max(1, weight.numel()), max(1, size)):
            stop = min(weight.numel(), start + size)
            key = (weight.dtype, in_8_bits, rate)
            bucket = None if is_large(weight, chunk_numel) else shared.get(key)
            if bucket is None or bucket.num_weights + stop - start > limit:
                bucket = Bucket(len(buckets), in_8_bits, [], 0, rate)
                buckets.append(bucket)
                if not is_large(weight, chunk_numel):
                    shared[key] = bucket
            fields: dict[str, Field] = {}
            for field, (dtype, numel) in _states(weight, stop - start, in_8_bits, master).items():
                fields[field] = Field(bucket.num_bytes, dtype, (numel,))
                bucket.num_bytes += -(-numel * dtype.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            bucket.pieces.append(Piece(name, weight, start, stop, fields))
    return buckets


def _states(weight: torch.Tensor, numel: int, eight_bit: bool, master: bool) -> dict[str, tuple[torch.dtype, int]]:
    """Names, dtypes and sizes of the states of `numel` values."""
    blocks = -(-numel // BLOCK_NUMEL)
    first = {"master": (torch.float32, numel)} if master and weight.dtype != torch.float32 else {}
    if not eight_bit:
        return first | {"exp_avg": (torch.float32, numel), "exp_avg_sq": (torch.float32, numel)}
    moments = {"state1": (torch.uint8, numel), "state2": (torch.uint8, numel)}
    return first | moments | {"absmax1": (torch.float32, blocks), "absmax2": (torch.float32, blocks)}
