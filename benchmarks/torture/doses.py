"""How much of everything is tried, with which seeds, and in which processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.torture import others, trials
from benchmarks.torture.trials import Tally, make_worlds
from benchmarks.torture.worlds import World
from shared import families
from shared.report import progress, quiet_libraries, say

ROOT = Path(__file__).parents[2]
PRELOADED = (
    "benchmarks.torture.doses", "cv2", "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip",
    "transformers.models.t5.modeling_t5", "transformers.models.t5.tokenization_t5",
)  # fmt: skip
"""Imported once by the server from which all processes are forked."""
KILLS_A_TRIAL = 5
MOUNTED = 5
"""One in so many full disks is a real one, where mounting is allowed."""


@dataclass(frozen=True)
class Dose:
    """How much of everything."""

    kills: int = 200
    """Of preprocessing."""
    kills_of_others: int = 40
    """Of repairing and of pruning, in turn."""
    power_cuts: int = 40
    enospc: int = 50
    flips: int = 500
    truncations: int = 20
    worlds: int = 6
    """Seeds; each gives two journeys, a new cache and a changed data set."""
    others: int = 4
    """Journeys in which two runs at once, Ctrl-C, a read-only cache and values that are not finite are tried."""


def torture(dose: Dose, seed: int, jobs: int, folder: Path) -> Tally:
    """All trials of a dose, by `jobs` processes, in `folder`."""
    tally = Tally()
    with processes(jobs) as pool:
        model = pool.submit(make_model, folder / "model").result()
        worlds = [
            world for pair in pool.map(partial(_worlds, model, folder), _seeds(seed, dose.worlds)) for world in pair
        ]
        for world in worlds:
            say(f"seed {world.name}: {len(world.end.files)} files, {world.num_operations} operations, "
                f"{world.seconds:.1f} s undisturbed")  # fmt: skip
        trials = list(_trials(dose, seed, worlds, folder))
        futures = [pool.submit(_attempt, trial) for trial in trials]
        with progress(title="torture", unit="trial", total=len(trials)) as bar:
            for future in as_completed(futures):
                tally += future.result()
                bar.update()
                bar.set_postfix(kills=tally.kills, enospc=tally.enospc, flips=tally.flips, lost=tally.lost)
    return tally


def _seeds(seed: int, count: int) -> list[str]:
    return [f"{seed}.{i}" for i in range(count)]


def _worlds(model: Path, folder: Path, seed: str) -> list[World]:
    return make_worlds(seed, model, folder / f"world {seed}")


def make_model(folder: Path) -> Path:
    """The real classes at a few thousand parameters."""
    return families.get("flux").tiny(folder)


def _trials(dose: Dose, seed: int, worlds: list[World], folder: Path) -> Iterator[partial[Tally]]:
    """Everything that is tried, each with a seed and a folder of its own."""

    def place(kind: str, i: int) -> Path:
        return folder / f"{kind} {i}"

    can_mount = trials.can_mount(folder / "can mount")
    if not can_mount:
        say("this user may not mount: no disk is really full, all are made so operation by operation")
    for number, quota in enumerate(_quotas(dose.kills)):
        world = worlds[number % len(worlds)]
        yield partial(trials.kill_trial, world, f"{seed} {number}", quota, place("kills", number))
    for number, quota in enumerate(_quotas(dose.kills_of_others)):
        kill = trials.prune_kill_trial if number % 2 else trials.repair_kill_trial
        world = worlds[number // 2 % len(worlds)]
        yield partial(kill, world, f"{seed} {number}", quota, place("kills of others", number))
    for i in range(dose.power_cuts):
        yield partial(trials.power_cut_trial, worlds[i % len(worlds)], f"{seed} {i}", place("power cut", i))
    for i in range(dose.enospc):
        world, where = worlds[i % len(worlds)], place("enospc", i)
        if can_mount and i % MOUNTED == MOUNTED - 1:
            yield partial(trials.mounted_trial, world, f"{seed} {i}", where)
        else:
            # Spread over the whole run, in every world.
            share = (i // len(worlds) + 0.5) / -(-dose.enospc // len(worlds))
            yield partial(trials.enospc_trial, world, int(share * world.num_operations), i % 2 == 0, where)
    for kind, count in ((trials.flip, dose.flips), (trials.cut, dose.truncations)):
        for i in range(count):
            where = place(kind.__name__, i)
            yield partial(trials.damage_trial, worlds[i % len(worlds)], f"{seed} {kind.__name__} {i}", kind, where)
    for i, world in enumerate(worlds[: dose.others]):
        yield partial(others.two_runs, world, place("two runs", i))
        yield from (partial(others.interrupted, world, f"{seed} {i} {j}", place("Ctrl-C", 3 * i + j)) for j in range(3))
        yield partial(others.read_only, world, place("read only", i))
        if world.start is None:
            yield partial(others.not_finite, world, place("not finite", i))


def _quotas(count: int) -> list[int]:
    return [min(KILLS_A_TRIAL, count - i) for i in range(0, count, KILLS_A_TRIAL)]


def _attempt(trial: partial[Tally]) -> Tally:
    """One trial. Whatever it raises that it should not is a problem, and does not stop the others."""
    try:
        return trial()
    except Exception as error:
        what = f"{trial.func.__name__} in {trial.args[0].name}, {trial.args[1:-1]}"
        return Tally(problems=[f"{what}: {''.join(traceback.format_exception(error))}"])


@contextmanager
def processes(jobs: int) -> Iterator[Executor]:
    """Processes that begin with everything imported and fork at once: each is forked from one that has computed
    nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin) as pool:
            yield pool
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _begin() -> None:
    torch.set_num_threads(1)
    # tqdm's own lock is between processes, and a process that is killed leaves it behind.
    tqdm.set_lock(threading.RLock())
    quiet_libraries()
