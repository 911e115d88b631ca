"""Workers in processes of their own: the same bytes, also when one is killed, when all are, and when a unit kills."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from preprocess import engine
from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.engine import Engine, EngineOptions, open_workers
from preprocess.engines import processes
from preprocess.layers import Layers
from preprocess.pipeline import preprocess
from preprocess.plan import unit_order
from preprocess.sources import File
from preprocess.units import PlacedImage, Unit
from preprocess.worker import Setup
from shared.cache.reader import Cache
from shared.cache.storage import LocalStorage
from shared.errors import EXIT_INTERRUPTED, UserError
from shared.model_folder import ModelFolder
from tests import forked
from tests.conftest import preprocess_options, write_data
from tests.preprocess.runs import contents
from tests.preprocess.test_kill import Children
from tests.preprocess.workers import Killer, alive, writers

COUNT = 40
ONE, TWO = EngineOptions(processes=1), EngineOptions(processes=2)


@pytest.fixture(scope="module")
def options(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreprocessConfig:
    """Of a run that has some fifty units; its cache is there."""
    folder = tmp_path_factory.mktemp("processes")
    data = write_data(folder / "data", COUNT)
    encode = EncodeOptions(image_batch=2, text_batch=4, workers=2, shard_rows=4)
    options = preprocess_options(data, folder / "local", tiny_model, encode=encode)
    assert preprocess(options) == 0
    return options


@pytest.fixture(scope="module")
def reference(options: PreprocessConfig) -> dict[str, bytes]:
    return contents(Path(options.cache))


@pytest.fixture
def _with_imports_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers that this process starts are forked where they have imported already. Those that other processes
    start, in two of the tests, begin from nothing as they do elsewhere."""
    monkeypatch.setattr(processes, "multiprocessing", forked.Multiprocessing())


@pytest.mark.usefixtures("_with_imports_done")
def test_two_processes_of_which_one_is_killed_in_the_middle_make_the_same_bytes(
    options: PreprocessConfig, reference: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Killer(tmp_path / "cache") as killer:
        assert preprocess(replace(options, cache=str(tmp_path / "cache"), engine=TWO)) == 0
    assert len(killer.killed) == 1
    assert "died (killed by SIGKILL)" in capsys.readouterr().err
    assert contents(tmp_path / "cache") == reference


def test_ctrl_c_stops_the_processes_and_another_engine_resumes_to_the_same_bytes(
    options: PreprocessConfig, reference: dict[str, bytes], tmp_path: Path
) -> None:
    for attempt in range(5):
        cache = tmp_path / f"cache-{attempt}"
        process = Children().start(replace(options, cache=str(cache), engine=ONE), tmp_path / "err")
        while not list(cache.glob("*/*.parquet")) or not (busy := {pid for pid, _ in writers(cache)}):
            assert process.is_alive(), (tmp_path / "err").read_text()
            time.sleep(0.001)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join()
        if process.exitcode != 0:
            break  # else it was done before it heard of it, as on a busy machine it may be
    assert process.exitcode == EXIT_INTERRUPTED
    said = (tmp_path / "err").read_text()
    assert "interrupted: run the same command again to resume" in said
    assert "Traceback" not in said
    assert not [pid for pid in busy if alive(pid)]
    assert not list(cache.rglob("*.part"))
    made = contents(cache)
    assert 0 < len(made) < len(reference)
    assert preprocess(replace(options, cache=str(cache))) == 0
    assert contents(cache) == reference


def test_workers_end_when_the_process_that_started_them_is_killed(
    options: PreprocessConfig, reference: dict[str, bytes], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    process = Children().start(replace(options, cache=str(cache), engine=ONE), tmp_path / "err")
    while not (busy := {pid for pid, _ in writers(cache)}):
        assert process.is_alive(), (tmp_path / "err").read_text()
        time.sleep(0.001)
    process.kill()
    process.join()
    until = time.monotonic() + 60
    while any(alive(pid) for pid in busy) and time.monotonic() < until:
        time.sleep(0.01)
    assert not [pid for pid in busy if alive(pid)]
    assert preprocess(replace(options, cache=str(cache))) == 0
    assert contents(cache) == reference


@dataclass(frozen=True)
class Deadly:
    """The bytes of an image that kill whoever reads them, as a flaw in a decoder might."""

    where: str = "deadly.png"
    place: list[Any] = field(default_factory=list)

    def read(self) -> bytes:
        signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)  # sent to the process, it might come a little late
        raise AssertionError

    def at_rest(self) -> Deadly:
        return self


@pytest.mark.usefixtures("_with_imports_done")
def test_a_unit_that_kills_every_process_that_it_is_given_to_is_named_and_the_others_are_made(
    options: PreprocessConfig,
    reference: dict[str, bytes],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "MOST_DEATHS", 2)
    setup = Setup(options, ModelFolder(str(tiny_model), None, tiny_model), LocalStorage(tmp_path), 1)
    canny = Layers(options, setup.model)["canny"]
    samples = sorted(Cache(Path(options.cache)).samples.values(), key=unit_order)
    units = []
    for number in range(3):
        some = samples[4 * number : 4 * number + 4]
        items = tuple(PlacedImage(sample, "image", File(options.data, sample.source)) for sample in some)
        units.append(Unit("canny", canny.fingerprint, number, items))
    flawed = PlacedImage(samples[6], "image", Deadly())
    units[1] = replace(units[1], items=(*units[1].items[:2], flawed, *units[1].items[3:]))
    with (
        Engine(open_workers(ONE, setup), lambda layer, rows: None) as running,
        pytest.raises(
            UserError, match=r"a worker has died 2 times of the same 4 row.* of canny .killed by SIGSEGV"
        ) as no,
    ):
        list(running.map(units, len(units)))
    assert all(sample.source in str(no.value) for sample in samples[4:8])
    made = {name: data for name, data in contents(tmp_path).items() if not name.endswith(".part")}
    assert {name: reference[name] for name in made} == made
    assert f"{canny.folder}/00000.tar" in made
    assert f"{canny.folder}/00001.tar" not in made
