"""What the frozen base does without a ControlNet, kept in the run's folder: it is the same at every look and after
every resumption, and is worked out once.

runs/NAME/baseline/
  losses.safetensors       of the grid without control
  pictures.safetensors     painted without control, and the originals through the VAE
  adherence.safetensors    what both score
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from shared import atomic

FOLDER = "baseline"
_FACTS = "facts"


@dataclass
class Baseline:
    """The folder of it."""

    folder: Path

    @classmethod
    def of(cls, run: Path) -> Baseline:
        """Of the run in this folder."""
        return cls(run / FOLDER)

    def find(self, name: str, facts: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """What was kept under this name, on the CPU; None where nothing was, or what was rests on other `facts` (JSON
        values: samples, seed, steps, ...)."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get(_FACTS) != _stated(facts):
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dictionary)
        except SafetensorError:
            return None  # damaged: it is worked out again

    def keep(self, name: str, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Keep it for the next look, and for the next start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        atomic.write_bytes(self._path(name), save(content, {_FACTS: _stated(facts)}))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _stated(facts: dict[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True)
