"""Numbers that are drawn: on the device where it draws by itself, else on the CPU, and sent there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DRAWS = ("cpu", "cuda", "mps", "xpu")
"""Devices whose generators can be seeded one by one. XLA's has one for all."""


def generator_for(device: torch.device | str) -> torch.Generator:
    """One whose numbers are meant for a device. Where memory is only counted nothing is drawn, and any will do."""
    return torch.Generator(device if torch.device(device).type in DRAWS else "cpu")


def normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Standard normal numbers, float32, on the device."""
    on = device if device.type in (*DRAWS, "meta") else generator.device
    return torch.randn(shape, generator=generator, device=on, dtype=torch.float32).to(device)
