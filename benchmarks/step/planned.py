"""What `make plan` counts for a cell: the peak that a measured one is held against, and the blocks to recompute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.step.cells import Cell
from benchmarks.step.sizes import GIB
from benchmarks.step.ways import WAYS
from shared import atomic
from train.counting import Setting
from train.memory_plan import count
from train.optimizer import Kind, OptimizerOptions


def setting_of(cell: Cell, batch: int) -> Setting:
    """The cell's step as the plan knows it, with batches of so many samples."""
    way = WAYS[cell.way]
    kind: Kind = "adamw" if way.optimizer == "adamw" else "adamw8bit"
    return Setting(
        depth=cell.depths,
        height=cell.resolution,
        width=cell.resolution,
        text_length=cell.text_length,
        batch_size=batch,
        accumulation=way.accumulation,
        base=way.base,
        hoist=way.hoist,
        stream=way.stream,
        weights=torch.float32 if way.controlnet == "fp32" else torch.bfloat16,
        optimizer=OptimizerOptions(kind=kind, states=way.states),
    )


def can_be_planned(cell: Cell) -> bool:
    """Whether the plan counts all that the cell's way holds: it knows no encoders and no autocast."""
    return cell.part == "step" and not WAYS[cell.way].encoders and WAYS[cell.way].controlnet == "bf16"


class Planned:
    """Planned peaks, kept beside the results: each takes some seconds to count, and no GPU."""

    def __init__(self, path: Path, *, count_missing: bool) -> None:
        self.path, self.count_missing = path, count_missing
        self._known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def peak_gib(self, record: dict[str, Any]) -> float | None:
        """Of a measured step; None where it was not counted."""
        cell = Cell(**record["cell"])
        if "peak_allocated_gib" not in record or not can_be_planned(cell):
            return None
        batch, blocks = record["batch"], tuple(record["recomputed_blocks"])
        key = f"{cell.way} {cell.depth} {cell.resolution} {cell.text_length} {batch} {blocks}"
        if key not in self._known and self.count_missing:
            self._known[key] = count(setting_of(cell, batch), *blocks).peak_bytes / GIB
            atomic.write_json(self.path, self._known)
        return self._known.get(key)
