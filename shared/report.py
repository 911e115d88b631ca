"""What the user sees: progress bars, the table of loaded components, versions, and plain numbers."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "optimum-quanto", "bitsandbytes", "controlnet-aux", "numpy",
    "pillow", "pyarrow", "safetensors",
)  # fmt: skip


def progress(
    iterable: Iterable[Any] | None = None, *, title: str, unit: str, total: int | None = None, **more: Any
) -> Any:
    """A tqdm bar with rate and ETA that keeps quiet where the output is not a terminal."""
    scale = unit == "B"
    return tqdm(
        iterable, total=total, desc=title, unit=unit, unit_scale=scale, disable=None, dynamic_ncols=True, **more
    )


_speaker = ""


@contextmanager
def speaking_as(name: str) -> Iterator[None]:
    """Within, whatever is said and warned of is said in this name: of several runs in one process."""
    global _speaker
    before, _speaker = _speaker, f"{name}: "
    try:
        yield
    finally:
        _speaker = before


def say(text: str) -> None:
    """Print a line without tearing a progress bar."""
    tqdm.write(_spoken(text), file=sys.stdout)
    sys.stdout.flush()


def warn(text: str) -> None:
    """Print a warning line to stderr without tearing a progress bar."""
    tqdm.write(_spoken(f"warning: {text}"), file=sys.stderr)


def _spoken(text: str) -> str:
    return "\n".join(f"{_speaker}{line}" for line in text.split("\n"))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers; missing ones are left out."""
    found = {package: _version(package) for package in PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The checkout's commit, with `-dirty` where files differ from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


@dataclass(frozen=True)
class Component:
    """One loaded component, counted from its storages as they really are (quantized parameters misreport theirs)."""

    name: str
    dtypes: str
    devices: str
    num_parameters: int
    num_trainable: int
    num_bytes: int


def component(name: str, module: torch.nn.Module) -> Component:
    """Count a module's parameters and buffers. A quantized weight counts its integers and its scales; a layer that
    holds its weights as buffers says how many they are (`num_weights`)."""
    dtypes: dict[str, int] = {}
    devices: dict[str, None] = {}
    num_bytes = 0
    seen: set[int] = set()
    for tensor in [*module.parameters(), *module.buffers()]:
        for part in _storages(tensor):
            devices[str(part.device)] = None
            storage = part.untyped_storage()
            if part.device.type != "meta" and storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            dtype = str(part.dtype).removeprefix("torch.")
            dtypes[dtype] = dtypes.get(dtype, 0) + storage.nbytes()
            num_bytes += storage.nbytes()
    by_size = sorted(dtypes, key=lambda dtype: -dtypes[dtype])
    parameters = list(module.parameters())
    held = sum(getattr(part, "num_weights", 0) for part in module.modules())
    return Component(
        name=name,
        dtypes="+".join(by_size),
        devices="+".join(devices),
        num_parameters=held + sum(parameter.numel() for parameter in parameters),
        num_trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        num_bytes=num_bytes,
    )


def _storages(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors inside a tensor: itself, or the parts of a subclass (public `__tensor_flatten__` protocol)."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _storages(getattr(tensor, name))]
    return [tensor.data if type(tensor) is not type(tensor.data) else tensor]


def components_table(components: Sequence[Component]) -> str:
    """The table of every loaded component, columns aligned, with a total."""
    head = ("component", "dtypes", "devices", "parameters", "learnable", "bytes")
    rows = [
        (c.name, c.dtypes, c.devices, f"{c.num_parameters:,}", f"{c.num_trainable:,}", f"{c.num_bytes:,}")
        for c in components
    ]
    total = (
        "total",
        "",
        "",
        f"{sum(c.num_parameters for c in components):,}",
        f"{sum(c.num_trainable for c in components):,}",
        f"{sum(c.num_bytes for c in components):,}",
    )
    return table(head, [*rows, total], right=3)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int) -> str:
    """Text columns under `head`; columns from index `right` on are right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [
            cell.rjust(w) if i >= right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def quiet_libraries() -> None:
    """Silence what the libraries say on every start that tells a user nothing: progress bars of loading a file in
    milliseconds, deprecations inside diffusers, a missing optional kernel. Their errors still come through."""
    import logging
    import warnings

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*FluxPosEmbed.*", category=FutureWarning)
