"""What else goes wrong, each tried for some worlds: two runs on one cache, Ctrl-C, a cache that may not be written, an
encoder that gives a value that is not finite."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.torture.faults import Operation
from benchmarks.torture.trials import (
    Tally,
    can_mount,
    check_end,
    check_one_sentence,
    check_reading,
    check_same_files,
    expect_code,
    finished,
    mounted,
    remount,
    run,
)
from benchmarks.torture.worlds import BATCHES, BLACK, World, read
from preprocess.pipeline import preprocess
from preprocess.repair import repair
from shared import atomic, families
from shared.cache.reader import Cache
from shared.errors import EXIT_INCOMPLETE, EXIT_INTERRUPTED
from shared.families.base import Encode, Tensors

NOT_FINITE = "the encoder gave values that are not finite"


@dataclass(frozen=True)
class Pause:
    """The process stops before the n-th operation, until it is told to go on."""

    number: int

    def before(self, operation: Operation) -> bool:
        if operation.number == self.number:
            os.kill(os.getpid(), signal.SIGSTOP)
        return True

    def after(self, operation: Operation) -> None:
        pass


def two_runs(world: World, folder: Path) -> Tally:
    """A second run, and a repair, of a cache that is being made: both are refused, and the first ends as if alone."""
    tally, where = Tally(), f"{world.name}, two runs at once"
    cache = folder / "cache"
    options = world.begin(cache)
    first = run(preprocess, options, folder / "first", Pause(world.num_operations // 2))
    os.waitid(os.P_PID, first.pid, os.WSTOPPED)
    kept = finished(cache)
    for command in (preprocess, repair):
        ended = run(command, options, folder / "second").wait()
        check_one_sentence(ended, f"another process is preprocessing into {cache}; ", tally, where)
    os.kill(first.pid, signal.SIGCONT)
    expect_code(first.wait(), (world.code,), tally, where)
    check_end(cache, tally, world.end, kept, where)
    check_same_files(cache, tally, world.end, where)
    shutil.rmtree(folder)
    return tally


def interrupted(world: World, seed: str, folder: Path) -> Tally:
    """Ctrl-C before a random operation: one sentence, no half of a file, and the next run ends at the same bytes."""
    tally, where = Tally(), f"{world.name}, Ctrl-C {seed}"
    cache = folder / "cache"
    options = world.begin(cache)
    child = run(preprocess, options, folder / "run", Pause(random.Random(seed).randrange(world.num_operations)))
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    kept = finished(cache) if cache.exists() else {}
    os.kill(child.pid, signal.SIGINT)
    os.kill(child.pid, signal.SIGCONT)
    ended = child.wait()
    expect_code(ended, (EXIT_INTERRUPTED,), tally, where)
    said = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
    tally.expect(said == ["interrupted: run the same command again to resume"], f"{where}: it says {said}")
    parts = [path.name for path in cache.rglob(f"*{atomic.PART}")]
    tally.expect(not parts, f"{where}: it leaves {parts}")
    expect_code(run(preprocess, options, folder / "run").wait(), (world.code,), tally, where)
    check_end(cache, tally, world.end, kept, where)
    check_same_files(cache, tally, world.end, where)
    shutil.rmtree(folder)
    return tally


def read_only(world: World, folder: Path) -> Tally:
    """A finished cache that may not be written: it can be read, and a run is refused before it begins."""
    tally, where = Tally(), f"{world.name}, a read-only cache"
    with read_only_copy(world.end.path, folder) as cache:
        if cache is None:
            tally.notes["read-only caches that could not be tried, for want of the right to mount"] += 1
            return tally
        options = replace(world.options, cache=str(cache))
        for command in (preprocess, repair):
            ended = run(command, options, folder / "run").wait()
            check_one_sentence(ended, f"{cache} is read-only for this user", tally, where)
        check_reading(cache, tally, world.end, where=where)
        check_same_files(cache, tally, world.end, where)
    shutil.rmtree(folder)
    return tally


@contextmanager
def read_only_copy(cache: Path, folder: Path) -> Iterator[Path | None]:
    """A copy of a cache that this process may not write: by its modes, or for root, who heeds none, on a disk that is
    mounted so. None where that is not allowed."""
    if os.geteuid() != 0:
        copy = shutil.copytree(cache, folder / "cache")
        _set_modes(copy, 0o555, 0o444)
        try:
            yield copy
        finally:
            _set_modes(copy, 0o755, 0o644)
    elif can_mount(folder / "disk"):
        with mounted(folder / "disk") as disk:
            copy = shutil.copytree(cache, disk / "cache")
            remount(disk, "ro")
            yield copy
    else:
        yield None


def _set_modes(folder: Path, of_folders: int, of_files: int) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(of_folders if path.is_dir() else of_files)


def not_finite(world: World, folder: Path) -> Tally:
    """The VAE gives NaN for one image, of a new cache: the rows of its samples say so and every other row is as it must
    be; the next run knows it without encoding anything."""
    tally, where = Tally(), f"{world.name}, a value that is not finite"
    options = world.begin(folder / "cache")
    spoilt = {("latents", s.key) for s in Cache(world.end.path).samples.values() if s.source == BLACK}

    def spoil() -> None:
        family = type(families.get(options.family))
        open_encoder = family.open_encoder

        def spoiled(self: Any, kind: Any, *more: Any) -> Encode:
            encode = open_encoder(self, kind, *more)

            def with_nan(batch: Any) -> Tensors:
                tensors = encode(batch)
                for i, item in enumerate(batch):
                    if kind.reads == "image" and not item.any():
                        next(iter(tensors.values()))[i] = torch.nan
                return tensors

            return with_nan

        family.open_encoder = spoiled  # type: ignore[assignment, method-assign]

    for prepare in (spoil, None):
        ended = run(preprocess, options, folder / "run", prepare=prepare).wait()
        expect_code(ended, (EXIT_INCOMPLETE,), tally, where)
        named = any(NOT_FINITE in line and f"{BLACK}: " in line for line in ended.err.splitlines())
        tally.expect(named, f"{where}: it says {ended.err[-300:]}")
        found, refused = read(folder / "cache")
        differing = {key[:2] for key, value in world.end.rows.items() if found.get(key) != value}
        differing = {
            (layer, key) for layer, key in differing if not layer.startswith(BATCHES)
        }  # which it is left out of
        tally.expect(differing == spoilt, f"{where}: other rows than its own: {differing}")
        reasons = {found.get((*row, "error"), "") for row in spoilt}
        right = all(reason.startswith(NOT_FINITE) for reason in reasons) and not refused
        tally.expect(right, f"{where}: the rows say {reasons}, {refused}")
    shutil.rmtree(folder)
    return tally
