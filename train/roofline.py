"""How long a step will take on a GPU that is not here: predicted from its counted work, not measured.

Each matrix product takes the time that its tiles need on the GPU's multiprocessors, the last wave of them included, or
its memory traffic if that is more; attention and everything else take operations and bytes over rates. The rates are
those that large products and copies reach on such a card, not the vendor's. What compiling fuses is estimated as a
share of the traffic that was counted kernel by kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from train.counting import Work
from train.memory_plan import Counted
from train.speed import Arithmetic

UNCERTAINTY = 0.25
"""Share by which a prediction may be off, a judgement: nothing of it was fitted to a measured training step."""
FUSED_SHARE = 0.35
"""Of the traffic of elementwise kernels, what is left when compiled: 36 GB of 102 GB in a FLUX block stack."""
FUSED_KERNELS = 0.25
"""Of the kernels that are neither products nor attention, those that are left when compiled."""
LONG_TOKENS = 2500
"""From here on attention runs at its rate for long sequences."""
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.93), (128, 64, 0.80), (64, 128, 0.80), (64, 64, 0.65))
"""(rows, columns, share of the best rate) of what one multiprocessor computes at a time."""
TAIL_RECOVERED = 0.5
"""Of a last wave that is not full, the share that is lost; kernels that split products recover the rest."""
OPTIMIZER_BYTES = 12
"""Read and written for each trained number: bfloat16 weight and gradient, 8-bit moments, and what clipping reads."""


@dataclass(frozen=True)
class Gpu:
    """One kind of card, by what it reaches."""

    name: str
    memory: str
    """As `memory.budget` takes it."""
    flops: float
    """bfloat16 products, dense, as the vendor states it: what shares of the peak refer to."""
    product_share: float
    """Of it, what large products reach."""
    int8_flops: float
    """int8 products, as stated, ..."""
    int8_forward_share: float
    int8_backward_share: float
    """... and the shares that are reached forward and backward."""
    bytes_per_second: float
    """Copies."""
    multiprocessors: int
    attention: tuple[float, float]
    """Operations per second of flash attention forward, for short and long sequences."""
    attention_backward: tuple[float, float]
    launch_seconds: float
    """Until the next kernel can begin, when the host issues them one by one."""
    bus_bytes_per_second: float = 25e9
    """To and from the host's page-locked memory, each way (PCIe 4 x16)."""


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(
        "A100 40 GB", "40GB", 312e12, 0.80, 624e12, 0.62, 0.50, 1.35e12, 108, (150e12, 195e12), (120e12, 160e12), 7e-6
    ),
    "h200": Gpu(
        "H200", "141GB", 989e12, 0.80, 1979e12, 0.58, 0.55, 4.1e12, 132, (420e12, 600e12), (330e12, 480e12), 6e-6, 50e9
    ),
    "4090": Gpu(
        "RTX 4090", "24GB", 165e12, 0.92, 660e12, 0.55, 0.45, 0.93e12, 128, (130e12, 150e12), (105e12, 125e12), 6e-6
    ),
}
"""H200: products measured at 788 TFLOP/s (8,192 squared, random numbers); all else from published figures."""


_EIGHT_BIT_PARTS: Mapping[Arithmetic, tuple[str, ...]] = {
    "exact": (),
    "int8_backward": ("base backward",),
    "int8": ("base forward", "base backward"),
}


@dataclass(frozen=True)
class Prediction:
    """A step's time, by what it goes into."""

    parts_seconds: dict[str, float]
    """On the GPU, one after the other."""
    host_seconds: float
    """What the host needs to issue the kernels, at the same time."""
    bus_seconds: float
    """What copies to and from the host need, of which those of the base are hidden behind the GPU's work."""
    states_seconds: float
    """What copying the optimizer's states adds: nothing else runs then."""

    @property
    def seconds(self) -> float:
        """The step."""
        return max(sum(self.parts_seconds.values()), self.host_seconds, self.bus_seconds) + self.states_seconds


def predict(counted: Counted, gpu: Gpu, *, compiled: bool, arithmetic: Arithmetic = "exact") -> Prediction:
    """The time of the counted step."""
    setting = counted.setting
    size = setting.dtype.itemsize
    parts: dict[str, float] = {}
    num_launches = 0.0
    for name, work in counted.work.items():
        eight_bit = (name == "base backward" and arithmetic != "exact") or (
            name == "base forward" and arithmetic == "int8"
        )
        if eight_bit:
            share = gpu.int8_backward_share if name == "base backward" else gpu.int8_forward_share
            rate = gpu.int8_flops * share
        else:
            rate = gpu.flops * gpu.product_share
        weight_bytes = 1 if eight_bit else size
        parts[f"{name}, products"] = sum(
            num * product_seconds(gpu, m, n, k, rate, size, weight_bytes) for (m, n, k), num in work.products.items()
        )
        parts[f"{name}, attention"] = _attention_seconds(gpu, work)
        dequantized = 0 if eight_bit else work.dequantized * (1 + size)
        rest = work.traffic_bytes * (FUSED_SHARE if compiled else 1.0)
        parts[f"{name}, the rest"] = (dequantized + rest) / gpu.bytes_per_second
        alone = work.products.total() + work.attention.total()
        num_launches += alone + (work.num_kernels - alone) * (FUSED_KERNELS if compiled else 1.0)
    parts = {name: seconds * setting.num_batches for name, seconds in parts.items()}
    parts["optimizer"] = counted.num_trained * OPTIMIZER_BYTES / gpu.bytes_per_second
    return Prediction(
        parts_seconds=parts,
        host_seconds=num_launches * setting.num_batches * gpu.launch_seconds,
        bus_seconds=counted.streamed_bytes * setting.num_batches / gpu.bus_bytes_per_second,
        states_seconds=counted.host_states_bytes / gpu.bus_bytes_per_second,
    )


def product_seconds(gpu: Gpu, m: int, n: int, k: int, rate: float, size: int, weight_bytes: int) -> float:
    """One product of (M, K) and (K, N), numbers of `size` bytes, at `rate` operations per second when all
    multiprocessors are at work."""
    best = math.inf
    for rows, columns, share in TILES:
        num = math.ceil(m / rows) * math.ceil(n / columns)
        full = num / gpu.multiprocessors
        used = full / (full + TAIL_RECOVERED * (math.ceil(full) - full)) if num >= gpu.multiprocessors else full**0.7
        best = min(best, 2.0 * num * rows * columns * k / (rate * share * used))
    return max(best, (m * k * size + m * n * size + n * k * weight_bytes) / gpu.bytes_per_second)


def _attention_seconds(gpu: Gpu, work: Work) -> float:
    seconds = 0.0
    for (backward, *shape), num in work.attention.items():
        one = Work()
        one.attention[(backward, *shape)] = num  # type: ignore[index]
        rates = gpu.attention_backward if backward else gpu.attention
        seconds += one.attention_flops / rates[shape[2] > LONG_TOKENS]
    return seconds
