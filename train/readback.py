"""Is on the disk what was meant to be? Files are flushed, read back, and held against the tensors they were made from.

A write that went wrong shows up when it is too late otherwise: a flipped bit in the way to the disk becomes a
checkpoint that vouches for the flipped bit, since its checksums were taken of the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import xxhash

from shared.cache import schema

SaveWeights = Callable[[Path], "Mapping[str, torch.Tensor] | None"]
"""Writes a folder of weights as diffusers does, and returns what is in them: name to tensor, which may be on the
device. None where what was meant is not known; then what was written is held against what comes back."""

_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
"""As safetensors calls them."""


class NotAsMeantError(Exception):
    """A file does not hold what it was to hold."""


def checksums(folder: Path, meant: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, str]:
    """Of every file below `folder` (by its name from there) the checksum that it must have, nothing flushed yet.

    `meant`: of a file, or of a folder whose safetensors files hold them together, the tensors by name. The checksums
    of these files come from the tensors; those of others from what was written. Raises `NotAsMeantError` where the
    names, dtypes or shapes are not those of the tensors.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sums = {str(file.relative_to(folder)): schema.file_checksum(file) for file in files if file.suffix != _SAFETENSORS}
    for file in files:
        if file.suffix == _SAFETENSORS:
            name = str(file.relative_to(folder))
            tensors = meant.get(name, meant.get(str(file.parent.relative_to(folder))))
            sums[name] = schema.file_checksum(file) if tensors is None else _checksum_of(file, tensors, name)
    return sums


_SAFETENSORS = ".safetensors"


def _checksum_of(file: Path, tensors: Mapping[str, torch.Tensor], name: str) -> str:
    """Of `file` if its header is followed by these very tensors: the header's own words say in which order."""
    with open(file, "rb") as opened:
        length = opened.read(8)
        header = opened.read(int.from_bytes(length, "little"))
    running = xxhash.xxh3_128(length)
    running.update(header)
    try:
        stated = json.loads(header)
        stated.pop("__metadata__", None)
        order = sorted(stated, key=lambda key: stated[key]["data_offsets"])
        shapes = {key: (stated[key]["dtype"], tuple(stated[key]["shape"])) for key in order}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotAsMeantError(f"{name} is not what was written: its header cannot be read") from error
    if shapes != {key: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}:
        raise NotAsMeantError(f"{name} holds other tensors than were to be saved")
    at = 0
    for key in order:
        data = tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # one tensor at a time
        if stated[key]["data_offsets"] != [at, at := at + len(data)]:
            raise NotAsMeantError(f"{name} is not what was written: its header cannot be right")
        running.update(data.numpy().data)
    return running.hexdigest()


def verify(folder: Path, sums: Mapping[str, str]) -> None:
    """Flush the files of these checksums to the disk, read them back, and raise `NotAsMeantError` where one differs."""
    for name in sums:
        _flush(folder / name)
    for name, expected in sums.items():
        if schema.file_checksum(folder / name) != expected:
            raise NotAsMeantError(f"{name} came back from the disk altered")


def _flush(path: Path) -> None:
    """To the disk, and out of the system's memory: what is read next comes from the disk, as far as its driver lets."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
