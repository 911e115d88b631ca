"""Which of a file's pages the kernel holds in memory: dropped before a cold round, counted to say whether it took."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def drop(files: Iterable[Path]) -> None:
    """Ask the kernel to forget the files' pages, written to disk first. Pages that somebody has mapped stay."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(files: Iterable[Path]) -> float:
    """The share of the files' pages that is in memory, from 0 to 1 (`mincore`, Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    there = total = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
            pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            address = np.frombuffer(mapped, np.uint8).ctypes.data  # the array is gone before the map is closed
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        there += int((pages & 1).sum())
        total += len(pages)
    return there / total if total else 0.0
