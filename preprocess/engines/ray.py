"""Workers as actors of a Ray cluster: the one at RAY_ADDRESS, or one of this machine's cores and GPUs, started here."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import preprocess
import shared
from preprocess.engine import Died, EngineOptions, Event, Finished, Ready, Workers, told
from preprocess.units import Unit
from preprocess.worker import Setup, Worker, device_of
from shared import atomic, registry
from shared.errors import UserError
from shared.report import quiet_libraries, warn

AHEAD = 3
_OBJECT_STORE_BYTES = 100 << 20  # units pass through it, some KB a row; pixels and tensors never do
_PATIENCE_SECONDS = 60


def check() -> None:
    """Refuse (`UserError`) where Ray is not installed, or nobody answers at RAY_ADDRESS."""
    if find_spec("ray") is None:
        raise UserError("engine.kind=ray needs Ray, which is not installed: pip install -r requirements-ray.txt")
    address = os.environ.get("RAY_ADDRESS", "")
    if match := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address):
        # Ray itself would try for five minutes before it says so.
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except OSError as error:
            raise UserError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({error.strerror or error}); start one with "
                "`ray start --head`, mend the address, or unset it to have one started here"
            ) from error


class RayWorkers(Workers):
    """Each worker is an actor that holds an encoder. One that is lost is started anew, wherever there is room."""

    ahead = AHEAD

    def __init__(self, options: EngineOptions, setup: Setup) -> None:
        """Connects to the cluster or starts one. Raises `UserError` where there is none at RAY_ADDRESS, or where it has
        no room for a worker."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import: nothing is reported to anyone
        import ray

        self._ray, self._setup = ray, setup
        self._connected_here = not ray.is_initialized()
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, _Call] = {}
        self._marker: Path | None = None
        if self._connected_here:
            _connect(ray)
        try:
            self._share = _share_of(ray, options, setup)
        except UserError:
            self.close()
            raise
        self.num_workers = options.ray_workers or self._share.room
        self._impatient_at = time.monotonic() + _PATIENCE_SECONDS

    def start(self, worker: int) -> None:
        storage = self._setup.storage
        if self._marker is None and not storage.remote:
            self._marker = storage.root / f"ray-{secrets.token_hex(4)}{atomic.PART}"
            self._marker.touch()
        actor = self._ray.remote(_Actor).options(
            num_cpus=self._share.num_cpus, num_gpus=self._share.num_gpus, max_concurrency=AHEAD + 1, max_restarts=0,
            scheduling_strategy="SPREAD",
        )  # fmt: skip
        self._actors[worker] = actor.remote()
        home = self._ray.get_runtime_context().get_node_id()
        self._call(worker, "start", self._setup, self._share.num_gpus > 0, home, self._marker)

    def give(self, worker: int, unit: Unit) -> None:
        self._call(worker, "make", unit)

    def _call(self, worker: int, method: str, *arguments: Any) -> None:
        reference = getattr(self._actors[worker], method).remote(*arguments)
        self._calls[reference] = _Call(worker, method, arguments[0].name if method == "make" else "")

    def events(self) -> list[Event]:
        pending = list(self._calls)
        self._ray.wait(pending, num_returns=1, timeout=1.0)  # in pieces, so that Ctrl-C is heard
        done, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
        if time.monotonic() > self._impatient_at:
            self._impatient_at = math.inf
            warn(
                f"no worker has started yet: each waits for {self._share.num_cpus:g} CPU and {self._share.num_gpus:g} "
                "GPU of the Ray cluster, which others may be using"
            )
        return [event for reference in done if reference in self._calls for event in self._answered(reference)]

    def _answered(self, reference: Any) -> list[Event]:
        call = self._calls.pop(reference)
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        except self._ray.exceptions.RayError as error:
            return [self._lost(call.worker, error)]
        if call.method == "rows":
            for unit, rows in answer.items():
                self.on_rows(call.worker, unit, rows)
            self._call(call.worker, "rows")
            return []
        if call.method == "start":
            self._impatient_at = math.inf
            self._call(call.worker, "rows")
            return [Ready(call.worker)]
        return [Finished(call.worker, call.unit)]

    def _lost(self, worker: int, error: Exception) -> Died:
        self._calls = {reference: call for reference, call in self._calls.items() if call.worker != worker}
        # One that cannot be reached may be alive: what it still writes is in files of its own.
        self._ray.kill(self._actors.pop(worker))
        return Died(worker, str(error).strip().splitlines()[-1].strip().split(". ")[0][:300])

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._connected_here:
            self._ray.shutdown()  # ends a cluster that was started here, and takes leave of any other


@dataclass(frozen=True)
class _Call:
    worker: int
    method: str
    unit: str


@dataclass(frozen=True)
class _Share:
    """What one worker takes of the cluster, and how many fit."""

    num_cpus: float
    num_gpus: float
    room: int


def _connect(ray: Any) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # The workers run this very code, also on machines that have another version of it or none.
    code: dict[str, Any] = {"py_modules": [str(Path(package.__path__[0])) for package in (preprocess, shared)]}
    if beyond := registry.folders():  # which all machines are to see, as they do the cache
        code["env_vars"] = {registry.VARIABLE: os.pathsep.join(map(str, beyond))}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address and address != "local":
            ray.init(address=address, runtime_env=code, **quiet)
        else:
            ray.init(
                address="local", runtime_env=code, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at RAY_ADDRESS={address} cannot be joined" if address else "Ray cannot be started"
        raise UserError(f"{where}: {str(error).strip().splitlines()[0][:300]}") from error


def _share_of(ray: Any, options: EngineOptions, setup: Setup) -> _Share:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpus = any(node.get("GPU", 0) for node in nodes) and setup.options.device != "cpu"
    gpus = options.ray_gpus_per_worker
    num_gpus = (1.0 if has_gpus else 0.0) if gpus is None else gpus
    cpus = options.ray_cpus_per_worker
    if cpus is None:
        largest = max((node.get("CPU", 0) for node in nodes), default=0)
        cpus = 1.0 if num_gpus else max(1.0, min(float(setup.num_threads), largest))
    shares = {name: share for name, share in (("CPU", cpus), ("GPU", num_gpus)) if share}
    room = sum(min((int(node.get(n, 0) / share + 1e-6) for n, share in shares.items()), default=1) for node in nodes)
    if not room and options.ray_workers is None:
        raise UserError(
            f"the Ray cluster ({len(nodes)} machine(s)) has no room for a worker of {cpus:g} CPU and {num_gpus:g} GPU: "
            "add machines, lower engine.ray_cpus_per_worker or engine.ray_gpus_per_worker, or say engine.ray_workers "
            "if it grows by itself"
        )
    return _Share(cpus, num_gpus, room)


class _Actor:
    """A worker on some machine of the cluster. Methods are called by several threads at once."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._rows: Counter[str] = Counter()

    def start(self, setup: Setup, with_gpu: bool, home: str, marker: Path | None) -> None:
        """Be ready for units. `home`: the machine that the run was started on. `marker`: a file in the cache."""
        import ray

        try:
            atomic.write_as(f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
            quiet_libraries()
            with suppress(OSError):  # without it a path that is not absolute will not be found, and named
                os.chdir(setup.working_folder)
            if marker is not None and not marker.exists():
                raise UserError(
                    f"a worker on {socket.gethostname()} does not see the cache: {marker.parent} is not the same "
                    "folder there; use one that all machines share"
                )
            elsewhere = ray.get_runtime_context().get_node_id() != home
            self._worker = Worker(setup, device_of(setup.options) if with_gpu else "cpu", elsewhere=elsewhere)
        except BaseException as error:
            raise told(error) from None

    def make(self, unit: Unit) -> None:
        """Make a unit. Raises `UserError` as `Worker.make`."""
        try:
            self._worker.make(unit, partial(self._made, unit.name))
        except BaseException as error:
            raise told(error) from None

    def _made(self, unit: str, rows: int) -> None:
        with self._news:
            self._rows[unit] += rows
            self._news.notify()

    def rows(self) -> dict[str, int]:
        """Rows of each unit that were made since the last call; waits a second for some."""
        with self._news:
            if not self._rows:
                self._news.wait(1)
            rows, self._rows = dict(self._rows), Counter()
            return rows
