"""Checkpoints: the trained weights as diffusers reads them, and beside it all that an exact resume needs.

    checkpoints/step-00000400/
      controlnet/            config.json, diffusion_pytorch_model.safetensors. Of a base that was trained itself it is
                             transformer/ or unet/, of a LoRA lora/ with pytorch_lora_weights.safetensors
      ema/                   the same of the average of the weights, in float32, where one is kept (train/ema.py)
      optimizer.safetensors  the optimizer's tensors, in 8 bit where it keeps 8 bit
      state.json             step, position of the loader, settings; checksums of every file here and its own.
                             Written last

A checkpoint appears whole or not at all: it gets its name when its files were flushed, read back, and held against what
they were made from, and older ones go only then. One that is damaged later is passed over for the one before, saying
so.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
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
from train import readback
from train.readback import NotAsMeantError, SaveWeights

CONTROLNET, EMA, OPTIMIZER, STATE = "controlnet", "ema", "optimizer.safetensors", "state.json"
WEIGHTS = "weights"
"""In `state.json`: the folder of the trained weights, where it is not `controlnet`."""
BEST = "best"
"""A link in the run's folder to a checkpoint that stays, however many newer ones there are."""


@dataclass(frozen=True)
class CheckpointOptions:
    """When to save, and how much to keep."""

    every: int = 500
    """Steps between checkpoints. The last step is always saved. Each is written and read back once."""
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
    save_weights: SaveWeights,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int,
    beside: Mapping[str, SaveWeights] | None = None,
    *,
    best: bool = False,
    name: str = CONTROLNET,
) -> Path:
    """Write the checkpoint of `step` into the run's `folder`, link its weights there, drop all but the last `keep`.

    `name`: of the folder of weights. `beside`: further ones, by name. `best`: mark it as the best, so that it stays.
    What comes back from the disk other than it was meant is written once more. Raises `UserError` where the disk is
    full, or was wrong twice; the checkpoints before are untouched.
    """
    path = path_of(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    for passed_over in all_newest_first(folder):
        if step_of(passed_over) >= step:  # a damaged one: training goes on from an undamaged one before it
            _remove(passed_over)
    weights = {name: save_weights, **(beside or {})}
    state = state if name == CONTROLNET else {**state, WEIGHTS: name}
    for second in (False, True):
        try:
            _write(path, step, weights, tensors, state)
            break
        except NotAsMeantError as error:
            if second:
                raise UserError(
                    f"checkpoint {path}: {error}, twice in a row. The disk, or the way to it, cannot be trusted; the "
                    "checkpoints before are as they were, and the same command goes on from them"
                ) from error
            warn(f"checkpoint {path}: {error}; it is written once more")
    if best:
        mark_best(folder, path)
    settle(folder, path, keep)
    return path


def _write(
    path: Path,
    step: int,
    weights: Mapping[str, SaveWeights],
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> None:
    """Write, read back, name. Raises `NotAsMeantError` where the disk does not hold what it was given."""
    try:
        with atomic.writing_directory(path) as part:
            on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            saved = {name: save_weights(part / name) for name, save_weights in weights.items()}
            save_file(on_host, part / OPTIMIZER)
            meant = {name: tensors for name, tensors in saved.items() if tensors is not None}
            sums = readback.checksums(part, {**meant, OPTIMIZER: on_host})
            content = atomic.json_bytes(schema.seal({"step": step, **state, "files": sums}))
            (part / STATE).write_bytes(content)
            for name in sums:
                shutil.copymode(part / STATE, part / name)  # safetensors makes files that nobody else may read
            readback.verify(part, {**sums, STATE: schema.checksum(content)})
    except SafetensorError as error:
        raise _disk_full(error, path) or error from error


def settle(folder: Path, path: Path, keep: int) -> None:
    """Make the run's `folder` what it is after saving the checkpoint at `path`, also where a kill came in between:
    linked to it, with the last `keep` checkpoints and the best one, and nothing half."""
    _clear(folder)
    link(folder, path)
    stays = best(folder)
    if keep:
        at_most = [old for old in all_newest_first(folder) if old <= path]  # a newer one is damaged: the next save's
        for old in at_most[keep:]:
            if old != stays:
                _remove(old)


def _clear(folder: Path) -> None:
    """Remove what a kill left while it was written or removed."""
    for unfinished in (folder / "checkpoints").glob(f"*{atomic.PART}"):
        shutil.rmtree(unfinished)


def _remove(path: Path) -> None:
    """A checkpoint that is half removed no longer has its name."""
    part = path.with_name(path.name + atomic.PART)
    os.replace(path, part)
    shutil.rmtree(part)


def _disk_full(error: SafetensorError, path: Path) -> UserError | None:
    """safetensors reports a full disk in its own class, with the system's number in the text alone."""
    numbers = [number for number in (errno.ENOSPC, errno.EDQUOT) if f"os error {number})" in str(error)]
    return disk_full(OSError(numbers[0], str(error)), f"writing {path}") if numbers else None


def link(folder: Path, path: Path) -> None:
    """Make the run's `controlnet`, or what the weights are called, a relative link to those of the checkpoint at
    `path`, in one rename."""
    weights = weights_of(path, "trained")
    _link(folder / weights.name, weights)


def linked(folder: Path) -> Path | None:
    """The checkpoint that the run's `folder` links to; None where there is none yet."""
    links = (path for path in folder.iterdir() if path.is_symlink() and path.name != BEST)
    found = [path.resolve().parent for path in links if path.is_dir()]
    # Others may be links as well: `checkpoints`, where they lie on another disk.
    return next((path for path in found if (path / STATE).is_file()), None)


def mark_best(folder: Path, path: Path) -> None:
    """From now on the checkpoint at `path` is the best of the run, and stays."""
    _link(folder / BEST, path)


def best(folder: Path) -> Path | None:
    """The checkpoint that was marked as the best; None where there is none, or none any more."""
    name = folder / BEST
    return path_of(folder, step_of(Path(os.readlink(name)))) if name.is_symlink() and name.is_dir() else None


def _link(name: Path, target: Path) -> None:
    part = name.with_name(name.name + atomic.PART)
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(target, name.parent))
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


def weights_of(path: Path, which: str) -> Path:
    """The folder of the weights in the checkpoint at `path`: "trained", as the step left them, or "ema", their average.
    Raises `UserError` where no average was kept."""
    folder = path / (EMA if which == "ema" else state(path).get(WEIGHTS, CONTROLNET))
    if which == "ema" and not folder.is_dir():
        raise UserError(
            f"{path} has no average of the weights: leave --weights ema out, or train with --ema.profile power"
        )
    return folder


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
