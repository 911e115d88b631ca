"""Makes units: holds one open producer, and keeps it busy by reading ahead of it and writing behind it.

Four things go on at once: threads load the next batch (of the next unit too), one caller encodes, threads make bytes
of the batch before, one thread writes the one before that. Batches never span units, so that a unit's bytes depend on
nothing but the unit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from preprocess import encode
from preprocess.config import PreprocessConfig
from preprocess.encode import Producer, Row
from preprocess.layers import Layers, PlannedLayer, components
from preprocess.lookahead import Ahead
from preprocess.units import Unit
from shared import families
from shared.cache import writer
from shared.cache.storage import Storage
from shared.errors import UserError
from shared.model_folder import ModelFolder, resolve

_BATCHES_BEHIND = 2
"""Batches that wait for the writer at most: memory is bounded, and a disk's hiccup does not stop the encoder."""

OnRows = Callable[[int], None]
"""Called with the number of rows that were just made."""


@dataclass(frozen=True)
class Setup:
    """What a worker must know beside its units: the same for all of a run."""

    options: PreprocessConfig
    model: ModelFolder
    storage: Storage
    """The cache's."""
    num_threads: int
    """Of torch, as in the process that started the run: sums of another number of threads round otherwise."""
    working_folder: str = "."
    """What relative paths in options and units are relative to."""


@dataclass
class Begun:
    """A unit whose first rows are being loaded."""

    unit: Unit
    loading: Ahead[Any, Any] | None
    """None: its shard is finished."""


class Worker:
    """Makes units into the cache's shards. `make` may be called by several threads: their units overlap."""

    def __init__(self, setup: Setup, device: str, *, elsewhere: bool = False) -> None:
        """Loads nothing yet. `elsewhere`: this is another machine than the one that planned the run, so that it must be
        seen whether its models are the same. Raises `UserError` where the model is not to be had."""
        torch.set_num_threads(setup.num_threads)
        options = setup.options
        self.device, self._elsewhere = device, elsewhere
        self._storage = setup.storage
        self._layers = Layers(options, _found(setup) if elsewhere else setup.model)
        self._readers = ThreadPoolExecutor(options.encode.workers, "read")
        self._finishers = ThreadPoolExecutor(options.encode.workers, "finish")
        self._writer = ThreadPoolExecutor(1, "write")
        self._room = threading.Semaphore(_BATCHES_BEHIND)
        self._encoding = threading.Lock()
        self._opened = ExitStack()
        self._layer: str | None = None
        self._producer: Producer | None = None

    def make(self, unit: Unit, on_rows: OnRows = lambda rows: None) -> None:
        """Make the unit's shard. Where it is finished already, by a try that was taken for lost, nothing happens.

        Raises `UserError` where the run cannot go on; what is wrong with one row is that row's reason.
        """
        self.encode(self.begin(unit), on_rows).result()

    def begin(self, unit: Unit) -> Begun:
        """Begin to load the unit's first batch."""
        layer = self._layers[unit.layer]
        if self._is_finished(unit):
            return Begun(unit, None)
        ahead = layer.batch_size + self._layers.options.encode.workers
        return Begun(unit, Ahead(partial(encode.load, self._storage), unit.items, self._readers, ahead))

    def _is_finished(self, unit: Unit) -> bool:
        folder = self._storage.root / unit.folder
        return writer.is_finished(folder, unit.number, unit.rows, self._storage)

    def encode(self, begun: Begun, on_rows: OnRows) -> Future[None]:
        """Encode the unit, in the caller's thread; the future is done when its shard is written."""
        if begun.loading is None:
            on_rows(len(begun.unit.items))
            done: Future[None] = Future()
            done.set_result(None)
            return done
        with self._encoding, closing(begun.loading) as loading:
            batches = _Batches(self._room)
            written = self._writer.submit(self._write, begun.unit, batches, on_rows)
            try:
                self._encode(begun.unit, loading, batches)
            except _UnwantedError:
                batches.end(whole=False)  # the writer's error is the one to be heard
            except BaseException:
                batches.end(whole=False)
                raise
            else:
                batches.end(whole=True)
            return written

    def _encode(self, unit: Unit, loading: Ahead[Any, Any], batches: _Batches) -> None:
        layer = self._layers[unit.layer]
        try:
            producer = self._open(layer, unit.fingerprint)
            for items in encode.batched(unit.items, layer.batch_size):
                loaded = [next(loading) for _ in items]
                batches.put(
                    [self._finishers.submit(finish) for finish in producer.batch(items, loaded, layer.batch_size)]
                )
        except torch.OutOfMemoryError as error:
            size = getattr(self._layers.options.encode, layer.batch_option)
            raise UserError(
                f"the GPU's memory is too small to make {layer.name} with encode.{layer.batch_option}={size}; lower it "
                "and run again: what is finished stays"
            ) from error

    def _open(self, layer: PlannedLayer, fingerprint: str) -> Producer:
        if self._layer != layer.name:
            self._close_producer()
            if self._elsewhere and layer.fingerprint != fingerprint:
                raise UserError(
                    f"on this worker's machine, what makes {layer.name} is not what it is where the run was started; "
                    "see to it that both have the same model and detectors"
                )
            self._producer = self._opened.enter_context(layer.open(self.device))
            self._layer = layer.name
        assert self._producer is not None
        return self._producer

    def _close_producer(self) -> None:
        self._layer = self._producer = None
        self._opened.close()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _write(self, unit: Unit, batches: _Batches, on_rows: OnRows) -> None:
        """By the writer's thread: the shard of the unit, of what the encoder puts there."""
        inputs = dict(unit.rows)
        try:
            with writer.ShardWriter(self._storage.root / unit.folder, unit.number, self._storage) as shard:
                for batch in batches:
                    for future in batch:
                        row = future.result()
                        if row.members is None:
                            shard.add_error(row.key, inputs[row.key], row.error or "unknown")
                        else:
                            shard.add(row.key, inputs[row.key], row.members)
                    on_rows(len(batch))
                if self._is_finished(unit):
                    raise _UnwantedError  # another try of this unit, when this one was taken for lost
            self._storage.flush()  # what is done is done where the cache is
        except _UnwantedError:
            pass
        finally:
            batches.give_up()

    def close(self) -> None:
        """Write what was encoded, drop what was not, and give back the memory."""
        self._readers.shutdown(cancel_futures=True)
        self._finishers.shutdown()
        self._writer.shutdown()
        self._close_producer()


class _UnwantedError(Exception):
    """Nobody wants the rest of this unit."""


class _Batches:
    """Rows of one unit on their way from the encoder to the writer, in batches."""

    def __init__(self, room: threading.Semaphore) -> None:
        """`room` for batches that wait, of all units together."""
        self._room = room
        self._queue: SimpleQueue[list[Future[Row]] | bool] = SimpleQueue()
        self._given_up = self._ended = False

    def put(self, batch: list[Future[Row]]) -> None:
        """The encoder's: waits while the writer is far behind. Raises `_UnwantedError` where it writes no more."""
        self._room.acquire()
        if self._given_up:
            self._room.release()
            raise _UnwantedError
        self._queue.put(batch)

    def end(self, *, whole: bool) -> None:
        """The encoder's last word: all is there, or nothing more comes."""
        self._queue.put(whole)

    def __iter__(self) -> Iterator[list[Future[Row]]]:
        """The writer's. Raises `_UnwantedError` where the rest will not come."""
        while isinstance(batch := self._take(), list):
            yield batch
        if not batch:
            raise _UnwantedError

    def give_up(self) -> None:
        """The writer's, when it writes no more: let the encoder not wait for room."""
        self._given_up = True
        while not self._ended:
            self._take()

    def _take(self) -> list[Future[Row]] | bool:
        batch = self._queue.get()
        if isinstance(batch, bool):
            self._ended = True
        else:
            self._room.release()
        return batch


def _found(setup: Setup) -> ModelFolder:
    """The model on this machine, which may keep it elsewhere than the one that planned the run."""
    if setup.model.path.is_dir():
        return setup.model
    return resolve(setup.model.name, components(families.get(setup.options.family)), setup.model.revision)


def device_of(options: PreprocessConfig, gpu: int | None = None) -> str:
    """The device of a worker in this process: a GPU where there is one and the options do not say otherwise."""
    if options.device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return "cuda" if gpu is None else f"cuda:{gpu}"
