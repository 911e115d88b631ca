"""A worker: what goes on while it encodes, what a unit's bytes depend on, and what it does with units that are done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from preprocess.config import EncodeOptions
from preprocess.layers import Layers
from preprocess.units import Text, Unit
from preprocess.worker import Setup, Worker
from shared import atomic, families
from shared.cache import writer
from shared.cache.schema import Caption
from shared.cache.storage import LocalStorage, Storage
from shared.errors import UserError
from shared.families.base import Encode
from shared.model_folder import ModelFolder
from tests.conftest import preprocess_options
from tests.preprocess.runs import contents

FLUX = families.get("flux")
BATCH, WORKERS, SHARD = 2, 2, 6
SECONDS = 20
"""How long a test waits for what must come; nothing is asserted about how long it took."""


@dataclass(frozen=True)
class Given:
    """An item of a unit of latents whose pixels are its number."""

    number: int
    read: Callable[[int], None] = lambda number: None

    @property
    def key(self) -> str:
        return f"key{self.number}"

    @property
    def input(self) -> str:
        return f"input{self.number}"

    @property
    def name(self) -> str:
        return f"{self.number}.png"

    def load(self, storage: Storage) -> NDArray[np.uint8]:
        self.read(self.number)
        return np.full((64, 64, 3), self.number, np.uint8)


class Setting:
    """A worker of tiny layers, into an empty folder."""

    def __init__(self, model: Path, folder: Path, name: str = "cache") -> None:
        options = preprocess_options(folder, folder / name, model, encode=EncodeOptions(BATCH, BATCH, WORKERS, SHARD))
        self.folder = folder / name
        self.setup = Setup(options, ModelFolder(str(model), None, model), LocalStorage(self.folder), 1)
        self.layers = Layers(options, self.setup.model)

    @contextmanager
    def worker(self, **more: Any) -> Iterator[Worker]:
        worker = Worker(self.setup, "cpu", **more)
        try:
            yield worker
        finally:
            worker.close()

    def unit(self, number: int, read: Callable[[int], None] = lambda number: None, layer: str = "latents") -> Unit:
        """Six rows, numbered on from unit to unit."""
        items: Any = tuple(Given(number * SHARD + i, read) for i in range(SHARD))
        return Unit(layer, self.layers[layer].fingerprint, number, items)

    def text(self, number: int, *texts: str) -> Unit:
        return Unit("t5", self.layers["t5"].fingerprint, number, tuple(Text(Caption.of(text)) for text in texts))


@pytest.fixture
def setting(tiny_model: Path, tmp_path: Path) -> Setting:
    return Setting(tiny_model, tmp_path)


def encoder_that(calls: Callable[[NDArray[np.uint8]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE is one that first calls this with its batch."""

    def open_encoder(*arguments: Any) -> Encode:
        def encode(batch: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
            calls(batch)
            return {"mean": torch.from_numpy(batch).float().mean((1, 2, 3))[:, None], "std": torch.ones(len(batch), 1)}

        return encode

    monkeypatch.setattr(type(FLUX), "open_encoder", open_encoder)


# --- what goes on at once ---


def test_while_one_batch_is_encoded_the_next_is_read_that_of_the_next_unit_too(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[int, threading.Event] = {number: threading.Event() for number in range(2 * SHARD)}
    seen: list[bool] = []

    def encode(batch: NDArray[np.uint8]) -> None:
        following = [number for number in range(batch.max() + 1, batch.max() + 1 + BATCH) if number in read]
        seen.append(all(read[number].wait(SECONDS) for number in following))

    encoder_that(encode, monkeypatch)
    with setting.worker() as worker:
        first, second = (worker.begin(setting.unit(number, lambda n: read[n].set())) for number in range(2))
        written = [worker.encode(begun, lambda rows: None) for begun in (first, second)]
        assert [future.result() for future in written] == [None, None]
    assert seen == [True] * (2 * SHARD // BATCH)


def test_the_encoder_goes_on_while_what_it_made_is_written(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = [threading.Event() for _ in range(2 * SHARD // BATCH)]
    add = writer.ShardWriter.add

    def wait_then_add(self: Any, key: str, *rest: Any) -> None:
        batch = int(key.removeprefix("key")) // BATCH
        # While the first row of a batch is being written, the next two batches are encoded, of the next unit too.
        assert all(event.wait(SECONDS) for event in encoded[: batch + 3])
        add(self, key, *rest)

    monkeypatch.setattr(writer.ShardWriter, "add", wait_then_add)
    encoder_that(lambda batch: encoded[int(batch.min()) // BATCH].set(), monkeypatch)
    with setting.worker() as worker:
        begun = [worker.begin(setting.unit(number)) for number in range(2)]
        written = [worker.encode(one, lambda rows: None) for one in begun]
        assert [future.result() for future in written] == [None, None]


def test_no_more_is_in_memory_than_some_batches_however_slow_the_disk(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = threading.Lock()
    in_memory, most = 0, 0
    go = threading.Event()
    add = writer.ShardWriter.add

    def read(number: int) -> None:
        nonlocal in_memory, most
        with lock:
            in_memory += 1
            most = max(most, in_memory)

    def count_then_add(self: Any, *rest: Any) -> None:
        nonlocal in_memory
        go.wait(0.3)  # as much as can pile up does
        with lock:
            in_memory -= 1
        add(self, *rest)

    monkeypatch.setattr(writer.ShardWriter, "add", count_then_add)
    encoder_that(lambda batch: None, monkeypatch)
    unit = setting.unit(0, read)
    many = replace(unit, items=tuple(replace(unit.items[0], number=n) for n in range(60)))  # type: ignore[call-arg]
    with setting.worker() as worker:
        begun = worker.begin(many)
        thread = threading.Thread(target=lambda: worker.encode(begun, lambda rows: None).result())
        thread.start()
        threading.Event().wait(1)
        go.set()
        thread.join()
    # Being read or read: the next batch and one for each thread, and one more. Then the encoder's, two that wait for
    # the writer, and the writer's.
    assert most <= (BATCH + WORKERS + 1) + BATCH + 2 * BATCH + BATCH


def test_units_that_overlap_have_the_bytes_of_units_one_after_the_other(tiny_model: Path, tmp_path: Path) -> None:
    one_by_one, at_once = Setting(tiny_model, tmp_path, "one by one"), Setting(tiny_model, tmp_path, "at once")
    with one_by_one.worker() as worker:
        for number in range(5):
            worker.make(one_by_one.unit(number))
    with at_once.worker() as worker, ThreadPoolExecutor(3) as callers:
        list(callers.map(worker.make, [at_once.unit(number) for number in (3, 1, 0, 4, 2)]))
    assert len(contents(one_by_one.folder)) == 10
    assert contents(one_by_one.folder) == contents(at_once.folder)


def test_rows_are_counted_as_they_are_written(setting: Setting) -> None:
    counted: list[int] = []
    with setting.worker() as worker:
        worker.make(setting.unit(0), counted.append)
    assert counted == [BATCH] * (SHARD // BATCH)


# --- one producer ---


def test_an_encoder_stays_open_from_unit_to_unit_and_goes_when_another_comes(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_encoder = type(FLUX).open_encoder

    def opening(self: Any, kind: Any, *arguments: Any) -> Encode:
        opened.append(kind.name)
        return open_encoder(self, kind, *arguments)

    monkeypatch.setattr(type(FLUX), "open_encoder", opening)
    with setting.worker() as worker:
        for unit in (setting.unit(0), setting.unit(1), setting.text(0, "a", ""), setting.text(1, "b"), setting.unit(2)):
            worker.make(unit)
    assert opened == ["latents", "t5", "latents"]


# --- what was done before, or is done by another ---


def test_a_unit_whose_shard_is_finished_is_not_made_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    with setting.worker() as worker:
        worker.make(setting.unit(0))
    before = contents(setting.folder)
    monkeypatch.setattr(type(FLUX), "open_encoder", None)
    counted: list[int] = []
    with setting.worker() as worker:
        worker.make(setting.unit(0, lambda number: pytest.fail("it is read again")), counted.append)
    assert contents(setting.folder) == before
    assert counted == [SHARD]


def test_of_two_tries_at_once_one_shard_comes_and_nothing_stays_of_the_other(
    setting: Setting, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The worker was taken for dead, and its unit was given to another, which finishes first.
    reference = Setting(tiny_model, tmp_path, "reference")
    with reference.worker() as worker:
        worker.make(reference.unit(0))
    stuck, go = threading.Event(), threading.Event()

    def read(number: int) -> None:
        if number == SHARD - 1:
            stuck.set()
            assert go.wait(SECONDS)

    with setting.worker() as lost, setting.worker() as other, ThreadPoolExecutor(1) as callers:
        first = callers.submit(lost.make, setting.unit(0, read))
        assert stuck.wait(SECONDS)
        atomic.write_as("another process")
        other.make(setting.unit(0))
        go.set()
        first.result()
    assert contents(setting.folder) == contents(reference.folder)


def test_a_row_that_cannot_be_written_stops_the_unit_and_leaves_nothing_of_it(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = writer.ShardWriter.add

    def fail_at_the_third(self: Any, key: str, *rest: Any) -> None:
        if key == "key2":
            raise UserError("no room")
        add(self, key, *rest)

    encoded: list[int] = []
    encoder_that(lambda batch: encoded.append(int(batch.min())), monkeypatch)
    with monkeypatch.context() as patch, setting.worker() as worker:
        patch.setattr(writer.ShardWriter, "add", fail_at_the_third)
        with pytest.raises(UserError, match="no room"):
            worker.make(setting.unit(0))
    assert contents(setting.folder) == {}
    with setting.worker() as worker:
        worker.make(setting.unit(0))
    assert len(contents(setting.folder)) == 2


def test_an_encoder_that_fails_leaves_nothing_of_its_unit_and_the_one_before_is_written(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: NDArray[np.uint8]) -> None:
        if batch.max() > SHARD + BATCH:
            raise ZeroDivisionError("in the encoder")

    encoder_that(fail, monkeypatch)
    with setting.worker() as worker:
        first, second = worker.begin(setting.unit(0)), worker.begin(setting.unit(1))
        written = worker.encode(first, lambda rows: None)
        with pytest.raises(ZeroDivisionError):
            worker.encode(second, lambda rows: None)
        written.result()
    assert [name.rpartition("/")[2] for name in contents(setting.folder)] == ["00000.parquet", "00000.tar"]


# --- on another machine ---


def test_another_machine_with_other_weights_is_refused_before_it_makes_anything(
    setting: Setting, tiny_model: Path, tmp_path: Path
) -> None:
    other = FLUX.tiny(tmp_path / "another", seed=1)
    there = Setting(tiny_model, tmp_path)
    there.setup = replace(setting.setup, model=replace(setting.setup.model, path=other))
    with (
        there.worker(elsewhere=True) as worker,
        pytest.raises(UserError, match="what makes latents is not what it is where the run was started"),
    ):
        worker.make(setting.unit(0))
    assert contents(setting.folder) == {}
    with setting.worker(elsewhere=True) as worker:
        worker.make(setting.unit(0))
    assert len(contents(setting.folder)) == 2


def test_another_machine_without_the_model_s_folder_is_refused(setting: Setting, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    setting.setup = replace(setting.setup, model=ModelFolder(str(nowhere), None, nowhere))
    with pytest.raises(UserError, match="no such model"), setting.worker(elsewhere=True):
        pass
