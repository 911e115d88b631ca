"""Checkpoints: the ControlNet as diffusers reads it, and beside it all that an exact resume needs.

    checkpoints/step-00000400/
      controlnet/            config.json, diffusion_pytorch_model.safetensors
      optimizer.safetensors  the optimizer's tensors, in 8 bit where it keeps 8 bit
      state.json             step, position of the loader, settings; checksums of every file here. Written last

A checkpoint appears whole or not at all. A damaged one is passed over for the one before, saying so.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shared import atomic
from shared.cache.schema import file_checksum
from shared.errors import UserError
from shared.report import warn

CONTROLNET, OPTIMIZER, STATE = "controlnet", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class CheckpointOptions:
    """When to save, and how much to keep."""

    every: int = 500
    """Steps between checkpoints. The last step is always saved."""
    keep: int = 2
    """The newest checkpoints that stay on disk (5-10 takes 13 GB each with 8-bit Adam); 0 keeps all."""

    def check(self) -> None:
        """Refuse impossible values."""
        if self.every < 1 or self.keep < 0:
            raise UserError("checkpoint.every must be 1 or more and checkpoint.keep 0 or more")


def save(
    folder: Path,
    step: int,
    save_weights: Callable[[Path], None],
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` into the run's `folder`, link `controlnet` to it, drop all but the last `keep`."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.rmtree(path)  # a damaged one that was passed over
    with atomic.writing_directory(path) as part:
        save_weights(part / CONTROLNET)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part / OPTIMIZER)
        files = sorted(file for file in part.rglob("*") if file.is_file())
        sums = {str(file.relative_to(part)): file_checksum(file) for file in files}
        (part / STATE).write_text(json.dumps({"step": step, **state, "files": sums}, indent=2) + "\n")
    _link(folder / CONTROLNET, path / CONTROLNET)
    if keep:
        for old in sorted(path.parent.glob("step-????????"))[:-keep]:
            shutil.rmtree(old)
    return path


def _link(link: Path, target: Path) -> None:
    """Make `link` a relative link to `target`, in one rename."""
    part = link.with_name(link.name + atomic.PART)
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(target, link.parent))
    os.replace(part, link)


def newest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, or None. Damaged ones are named and passed over."""
    for path in _newest_first(folder):
        if (damage := _damage(path)) is None:
            return path
        warn(f"checkpoint {path} is damaged ({damage}): going back to the one before")
    return None


def _newest_first(folder: Path) -> Iterator[Path]:
    return iter(sorted((folder / "checkpoints").glob("step-????????"), reverse=True))


def _damage(path: Path) -> str | None:
    try:
        stated = json.loads((path / STATE).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{STATE} cannot be read: {error}"
    for name, expected in stated.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if file_checksum(path / name) != expected:
            return f"{name} was altered"
    return None


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's tensors and the state of a checkpoint."""
    return load_file(path / OPTIMIZER), json.loads((path / STATE).read_text())
