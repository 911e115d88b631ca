"""Where figures were measured: the processor, the memory, the disk, and the versions of what was compared."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from shared.report import git_revision, versions

COMPARED = ("safetensors", "webdataset", "mosaicml-streaming", "datasets", "xxhash")


def description(folder: Path) -> str:
    """Two lines: machine (with the file system that `folder` is on), and versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    machine = (
        f"{len(os.sched_getaffinity(0))} cores of {_processor()}, {memory:.0f} GB of memory, {_file_system(folder)}, "
        f"Linux {platform.release()}, load {os.getloadavg()[0]:.1f}"
    )
    found = versions()
    for package in COMPARED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    packages = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"machine: {machine}\nversions: underdrawing {git_revision()}, {packages}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    """The type of the mount that holds the folder, such as ext4."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(inside, key=lambda mount: len(mount[0]))[1] if inside else "an unknown file system"
