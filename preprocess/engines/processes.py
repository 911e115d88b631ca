"""Workers in processes of their own on this machine: one for each GPU, or several on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from preprocess.engine import Died, EngineOptions, Event, Finished, Ready, Workers, told
from preprocess.units import Unit
from preprocess.worker import Setup, Worker, device_of
from shared import atomic
from shared.errors import UserError
from shared.report import quiet_libraries

AHEAD = 3


def check(options: EngineOptions) -> None:
    """Refuse (`UserError`) GPUs that are not there."""
    if options.gpus and max(options.gpus) >= (count := torch.cuda.device_count()):
        there = f"GPUs 0 to {count - 1}" if count else "no GPU that torch can use"
        raise UserError(f"engine.gpus names {max(options.gpus)}, but this machine has {there}")


class ProcessWorkers(Workers):
    """Each worker is a process that this one starts, and kills when it is done."""

    ahead = AHEAD

    def __init__(self, options: EngineOptions, setup: Setup) -> None:
        self._setup, self._gpus = setup, options.gpus
        self.num_workers = len(options.gpus) or options.processes or 1
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, SpawnProcess] = {}
        self._connections: dict[int, Connection] = {}

    def start(self, worker: int) -> None:
        ours, theirs = self._context.Pipe()
        gpu = self._gpus[worker] if self._gpus else None
        process = self._context.Process(
            target=_serve, args=(self._setup, gpu, theirs), name=f"preprocess worker {worker}", daemon=True
        )
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._processes[worker], self._connections[worker] = process, ours

    def give(self, worker: int, unit: Unit) -> None:
        with suppress(OSError):  # it has just died, as `events` will say
            self._connections[worker].send(unit)

    def events(self) -> list[Event]:
        ready = connection.wait(list(self._connections.values()))
        return [
            event for worker, pipe in list(self._connections.items()) if pipe in ready for event in self._heard(worker)
        ]

    def _heard(self, worker: int) -> list[Event]:
        try:
            said, *more = self._connections[worker].recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a word
            return [self._died(worker)]
        if said == "failed":
            raise more[0]
        if said == "rows":
            self.on_rows(worker, *more)
            return []
        return [Ready(worker) if said == "ready" else Finished(worker, *more)]

    def _died(self, worker: int) -> Died:
        self._connections.pop(worker).close()
        process = self._processes.pop(worker)
        process.join()
        code = process.exitcode
        assert code is not None
        return Died(worker, f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}")

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()
        for pipe in self._connections.values():
            pipe.close()


def _serve(setup: Setup, gpu: int | None, pipe: Connection) -> None:
    """In the worker's process: make what comes through the pipe, several units at a time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the first one decides
    _end_with_parent()
    atomic.write_as(f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    quiet_libraries()
    lock = threading.Lock()

    def say(*words: Any) -> None:
        with lock:
            pipe.send(words)

    try:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        worker = Worker(setup, device_of(setup.options, gpu))
        say("ready")
        with ThreadPoolExecutor(AHEAD) as pool:
            while True:
                pool.submit(_make, worker, pipe.recv(), say)
    except EOFError:
        pass
    except BaseException as error:
        say("failed", told(error))


def _make(worker: Worker, unit: Unit, say: Callable[..., None]) -> None:
    try:
        worker.make(unit, partial(say, "rows", unit.name))
        say("finished", unit.name)
    except BaseException as error:
        say("failed", told(error))


def _end_with_parent() -> None:
    """End this process at once when the one that started it is gone, killed perhaps: nobody waits for its work."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
