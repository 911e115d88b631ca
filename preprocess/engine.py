"""Maps units over workers: in this process, in several on this machine, on a Ray cluster. What comes out is the same.

A worker that dies loses only the units that it was given; they are given again. The engine knows nothing of encoders.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from shared.errors import UserError
from shared.report import warn

if TYPE_CHECKING:
    from preprocess.units import Unit
    from preprocess.worker import Setup

MOST_DEATHS = 3
"""A unit whose worker dies so often is at fault itself; so is a cluster whose workers die before they are ready."""


@dataclass(frozen=True)
class EngineOptions:
    """Where the encoders run. Nothing here changes a byte of the cache, nor is part of a layer's fingerprint."""

    kind: Literal["auto", "local", "processes", "ray"] = "auto"
    """local: in this process. processes: one for each of several GPUs of this machine. ray: on a Ray cluster, the one
    at RAY_ADDRESS or one that is started here. auto: processes where gpus or processes are given, else local."""
    gpus: tuple[int, ...] = ()
    """The GPUs of this machine to use, one process on each. Default: the first one, in this process."""
    processes: int | None = None
    """Processes on the CPU of this machine; each uses as many threads as one alone would (OMP_NUM_THREADS)."""
    ray_workers: int | None = None
    """Workers on the cluster. Default: as many as it has GPUs, or where it has none, cores, for."""
    ray_gpus_per_worker: float | None = None
    """Share of a GPU that a worker takes: 0.5 lets two share one, where their encoders fit its memory together.
    Default: 1 where the cluster has GPUs, else 0."""
    ray_cpus_per_worker: float | None = None
    """Cores that Ray sets aside for each worker. Default: 1 beside a GPU, else as many as torch uses."""

    @property
    def chosen(self) -> Literal["local", "processes", "ray"]:
        """`kind`, with auto resolved."""
        if self.kind == "auto":
            return "processes" if self.gpus or self.processes is not None else "local"
        return self.kind

    def check(self) -> None:
        """Refuse impossible values and those that would have no effect."""
        if len(set(self.gpus)) < len(self.gpus) or any(gpu < 0 for gpu in self.gpus):
            raise UserError(f"engine.gpus must be different numbers from 0, not {' '.join(map(str, self.gpus))}")
        if self.gpus and self.processes is not None:
            raise UserError("give engine.gpus, one process on each, or engine.processes on the CPU, not both")
        for name in ("processes", "ray_workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"engine.{name} must be 1 or more, not {value}")
        for name in ("ray_gpus_per_worker", "ray_cpus_per_worker"):
            if (share := getattr(self, name)) is not None and share < 0:
                raise UserError(f"engine.{name} must be 0 or more, not {share}")
        kinds = {"gpus": "processes", "processes": "processes"}
        for name in ("gpus", "processes", "ray_workers", "ray_gpus_per_worker", "ray_cpus_per_worker"):
            kind = kinds.get(name, "ray")
            if getattr(self, name) not in (None, ()) and self.chosen != kind:
                raise UserError(f"engine.{name} is for engine.kind={kind}, which is '{self.chosen}' here")
        if self.kind == "processes" and not self.gpus and self.processes is None:
            raise UserError("engine.kind=processes needs engine.gpus, or engine.processes on the CPU")


@dataclass(frozen=True)
class Ready:
    """A worker waits for units."""

    worker: int


@dataclass(frozen=True)
class Finished:
    """A unit's shard is written."""

    worker: int
    unit: str


@dataclass(frozen=True)
class Died:
    """A worker is gone, and what it was given is not done."""

    worker: int
    reason: str


Event = Ready | Finished | Died

OnRows = Callable[[int, str, int], None]
"""Called with a worker, the name of its unit, and how many rows of it were made since the last call."""


class Workers(ABC):
    """Workers of one kind, numbered from 0. Numbers stay when workers die and are started again."""

    num_workers: int
    """At most."""
    ahead: int
    """Units that a worker is given at once: while it encodes one, it reads the next, and writes the one before."""
    on_rows: OnRows
    """The engine's; by any thread."""

    @abstractmethod
    def start(self, worker: int) -> None:
        """Start a worker, or start it again; `Ready` comes when it is there."""

    @abstractmethod
    def give(self, worker: int, unit: Unit) -> None:
        """Hand a unit to a worker that is ready; `Finished` or `Died` will come."""

    @abstractmethod
    def events(self) -> list[Event]:
        """What has happened; waits until something has, more or less. Raises what a worker's unit raised."""

    @abstractmethod
    def close(self) -> None:
        """End all workers, whatever they are doing."""


@dataclass
class _Given:
    unit: Unit
    rows: int = 0


@dataclass
class _Lane:
    """What the engine knows of one worker."""

    ready: bool = False
    given: dict[str, _Given] = field(default_factory=dict)


class Engine:
    """Workers at work, for the length of a `with` block."""

    def __init__(self, workers: Workers, on_rows: Callable[[str, int], None]) -> None:
        """`on_rows` is told the layer and the number of rows that were made, or were lost with a worker (negative)."""
        self._workers, self._on_rows = workers, on_rows
        workers.on_rows = self._rows_made
        self._lanes: dict[int, _Lane] = {}
        self._deaths: Counter[str] = Counter()
        self._false_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workers.close()

    def map(self, units: Iterable[Unit], count: int) -> Iterator[Unit]:
        """Make `count` units; each comes back when its shard is written, in any order.

        Raises `UserError` where one cannot be made: its worker says why, or dies again and again.
        """
        self._fresh, self._num_fresh = iter(units), count
        self._next: Unit | None = None
        self._again: deque[Unit] = deque()
        for worker in range(len(self._lanes), min(self._workers.num_workers, count)):
            self._start(worker)
        while self._hand_out():
            for event in self._workers.events():
                if isinstance(event, Ready):
                    self._lanes[event.worker].ready = True
                    self._false_starts = 0
                elif isinstance(event, Finished):
                    given = self._lanes[event.worker].given.pop(event.unit)
                    self._count(given, len(given.unit.items) - given.rows)
                    yield given.unit
                else:
                    self._bury(event)

    def _rows_made(self, worker: int, unit: str, rows: int) -> None:
        if (given := self._lanes[worker].given.get(unit)) is not None:
            self._count(given, rows)

    def _count(self, given: _Given, rows: int) -> None:
        if rows:
            given.rows += rows
            self._on_rows(given.unit.layer, rows)

    def _start(self, worker: int) -> None:
        self._lanes[worker] = _Lane()
        self._workers.start(worker)

    def _hand_out(self) -> bool:
        """Give units to who has room for some, the idle first; whether any is not done."""
        for depth in range(self._workers.ahead):
            for worker, lane in self._lanes.items():
                if lane.ready and len(lane.given) == depth and (unit := self._choose(lane)) is not None:
                    lane.given[unit.name] = _Given(unit)
                    self._workers.give(worker, unit)
        return self._num_fresh > 0 or bool(self._again) or any(lane.given for lane in self._lanes.values())

    def _choose(self, lane: _Lane) -> Unit | None:
        if not lane.given:
            return self._again.popleft() if self._again else self._take()
        if any(self._deaths[name] for name in lane.given):
            return None  # a unit that a worker has died of is alone with the next one: it shall not take others along
        if self._num_fresh <= sum(not other.given for other in self._lanes.values()):
            return None  # the last ones are for those that have nothing
        layer = next(iter(lane.given.values())).unit.layer
        following = self._peek()
        # One layer at a time: between two, an encoder goes and another comes.
        return self._take() if following is not None and following.layer == layer else None

    def _peek(self) -> Unit | None:
        if self._next is None and self._num_fresh:
            self._next = next(self._fresh)
        return self._next

    def _take(self) -> Unit | None:
        unit = self._peek()
        if unit is not None:
            self._next, self._num_fresh = None, self._num_fresh - 1
        return unit

    def _bury(self, died: Died) -> None:
        lane = self._lanes[died.worker]
        if not lane.ready:
            self._false_starts += 1
            if self._false_starts >= MOST_DEATHS:
                raise UserError(
                    f"workers die before they are ready ({died.reason}); what is finished stays, and engine.kind=local "
                    "shows what is wrong with one"
                )
        for given in lane.given.values():
            self._count(given, -given.rows)
            self._deaths[given.unit.name] += 1
            if self._deaths[given.unit.name] >= MOST_DEATHS:
                raise UserError(
                    f"a worker has died {MOST_DEATHS} times of the same {len(given.unit.items)} row(s) of "
                    f"{given.unit.layer} ({died.reason}): {given.unit.names(10)}. If memory ran out, lower the batches "
                    "(encode.image_batch, encode.text_batch); else take out what is at fault (a smaller "
                    "encode.shard_rows narrows it down), and run again: what is finished stays"
                )
            self._again.append(given.unit)
        lost = f"; {len(lane.given)} shard(s) that it was making are made again" if lane.given else ""
        warn(f"worker {died.worker} died ({died.reason}){lost}")
        self._start(died.worker)


def told(error: BaseException) -> BaseException:
    """An error as another process can be told of it: with its traceback as a note, where it is our own mistake."""
    if isinstance(error, UserError):
        return UserError(str(error))
    note = RuntimeError(f"in a worker: {type(error).__name__}: {error}")
    note.add_note("".join(traceback.format_exception(error)))
    return note


def check_available(options: EngineOptions) -> None:
    """Refuse (`UserError`) what these options ask for and this machine has not, before anything is done."""
    if options.chosen == "ray":
        from preprocess.engines import ray

        ray.check()
    elif options.chosen == "processes":
        from preprocess.engines import processes

        processes.check(options)


def open_workers(options: EngineOptions, setup: Setup) -> Workers:
    """The workers that the options ask for; none is started. Raises `UserError` where they are not to be had."""
    if options.chosen == "ray":
        from preprocess.engines.ray import RayWorkers

        return RayWorkers(options, setup)
    if options.chosen == "processes":
        from preprocess.engines.processes import ProcessWorkers

        return ProcessWorkers(options, setup)
    from preprocess.engines.local import LocalWorkers

    return LocalWorkers(setup)
