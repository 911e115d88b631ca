"""Checkpoints: the ControlNet as diffusers reads it, and beside it all that an exact resume needs.

    checkpoints/step-00000400/
      controlnet/            config.json, diffusion_pytorch_model.safetensors
      optimizer.safetensors  the optimizer's tensors, in 8 bit where it keeps 8 bit
      state.json             step, position of the loader, settings; checksums of every file here and its own.
                             Written last

A checkpoint appears whole or not at all. A damaged one is passed over for the one before, saying so.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shared import atomic
from shared.cache import schema
from shared.errors import UserError, disk_full
from shared.report import warn

CONTROLNET, OPTIMIZER, STATE = "controlnet", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class CheckpointOptions:
    """When to save, and how much to keep."""

    every: int = 500
    """Steps between checkpoints. The last step is always saved."""
    keep: int = 2
    """The newest checkpoints that stay on disk (5-10 takes 13 GB each with 8-bit Adam), and one more while saving; 0
    keeps all."""

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
    """Write the checkpoint of `step` into the run's `folder`, link `controlnet` to it, drop all but the last `keep`.

    Raises `UserError` where the disk is full; the checkpoints before are untouched.
    """
    path = path_of(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in path.parent.glob(f"*{atomic.PART}"):
        shutil.rmtree(unfinished)  # a kill while saving left it
    for passed_over in all_newest_first(folder):
        if step_of(passed_over) >= step:  # a damaged one: training goes on from an undamaged one before it
            shutil.rmtree(passed_over)
    try:
        with atomic.writing_directory(path) as part:
            save_weights(part / CONTROLNET)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part / OPTIMIZER)
            files = sorted(file for file in part.rglob("*") if file.is_file())
            sums = {str(file.relative_to(part)): schema.file_checksum(file) for file in files}
            content = schema.seal({"step": step, **state, "files": sums})
            (part / STATE).write_bytes(atomic.json_bytes(content))
            for file in files:
                shutil.copymode(part / STATE, file)  # safetensors makes files that nobody else may read
    except SafetensorError as error:
        raise _disk_full(error, path) or error from error
    link(folder, path)
    if keep:
        for old in all_newest_first(folder)[keep:]:
            shutil.rmtree(old)
    return path


def _disk_full(error: SafetensorError, path: Path) -> UserError | None:
    """safetensors reports a full disk in its own class, with the system's number in the text alone."""
    numbers = [number for number in (errno.ENOSPC, errno.EDQUOT) if f"os error {number})" in str(error)]
    return disk_full(OSError(numbers[0], str(error)), f"writing {path}") if numbers else None


def link(folder: Path, path: Path) -> None:
    """Make the run's `controlnet` a relative link to the ControlNet of the checkpoint at `path`, in one rename."""
    name = folder / CONTROLNET
    part = name.with_name(name.name + atomic.PART)
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(path / CONTROLNET, folder))
    os.replace(part, name)


def newest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, or None. Damaged ones are named and passed over."""
    for path in all_newest_first(folder):
        if (damage := _damage(path)) is None:
            return path
        warn(f"checkpoint {path} is damaged ({damage}): going back to the one before")
    return None


def undamaged(folder: Path, step: int | None = None) -> Path:
    """The checkpoint of `step`, or the newest undamaged one. Raises `UserError` where there is none."""
    there = ", ".join(str(step_of(path)) for path in reversed(all_newest_first(folder))) or "none"
    if step is None:
        if (path := newest(folder)) is None:
            raise UserError(
                f"{folder} has no undamaged checkpoint: train until the next one (checkpoint.every) is saved"
            )
        return path
    path = path_of(folder, step)
    if not path.is_dir():
        raise UserError(f"{folder} has no checkpoint of step {step}; there is: {there}")
    if (damage := _damage(path)) is not None:
        raise UserError(f"checkpoint {path} is damaged ({damage}); choose another STEP, there is: {there}")
    return path


def all_newest_first(folder: Path) -> list[Path]:
    """Every checkpoint of a run, damaged ones too."""
    return sorted((folder / "checkpoints").glob("step-" + 8 * "[0-9]"), reverse=True)


def path_of(folder: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of `step`."""
    return folder / "checkpoints" / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step after which the checkpoint at `path` was saved."""
    return int(path.name.removeprefix("step-"))


def _damage(path: Path) -> str | None:
    try:
        state(path)
        content = schema.read_sealed(path / STATE)
    except schema.CacheError:
        return f"{STATE} was altered"
    except (OSError, ValueError) as error:
        return f"{STATE} cannot be read: {error}"
    for name, expected in content["files"].items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if schema.file_checksum(path / name) != expected:
            return f"{name} was altered"
    return None


def state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the moment it was saved at; tensors apart."""
    return json.loads((path / STATE).read_text())


def optimizer_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The optimizer's tensors of a checkpoint."""
    return load_file(path / OPTIMIZER)
