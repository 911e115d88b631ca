"""One worker, in this process."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from functools import partial

from preprocess.engine import Event, Finished, Ready, Workers
from preprocess.units import Unit
from preprocess.worker import Begun, Setup, Worker, device_of


class LocalWorkers(Workers):
    """The one worker; it encodes in the thread that asks for events, so that Ctrl-C stops it at once."""

    num_workers = 1
    ahead = 3

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._worker: Worker | None = None
        self._events: list[Event] = []
        self._begun: deque[Begun] = deque()
        self._written: deque[tuple[str, Future[None]]] = deque()

    def start(self, worker: int) -> None:
        self._worker = Worker(self._setup, device_of(self._setup.options))
        self._events.append(Ready(worker))

    def give(self, worker: int, unit: Unit) -> None:
        assert self._worker is not None
        self._begun.append(self._worker.begin(unit))

    def events(self) -> list[Event]:
        if self._begun:
            assert self._worker is not None
            begun = self._begun.popleft()
            name = begun.unit.name
            self._written.append((name, self._worker.encode(begun, partial(self.on_rows, 0, name))))
        elif self._written and not self._events:
            self._take_written()
        while self._written and self._written[0][1].done():
            self._take_written()
        events, self._events = self._events, []
        return events

    def _take_written(self) -> None:
        name, written = self._written.popleft()
        written.result()
        self._events.append(Finished(0, name))

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
