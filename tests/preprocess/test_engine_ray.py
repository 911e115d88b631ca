"""Workers on a Ray cluster: the same bytes, also when one is killed or a machine goes; and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preprocess import pipeline
from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.engine import EngineOptions, open_workers
from preprocess.engines.ray import _Actor
from preprocess.pipeline import preprocess
from preprocess.worker import Setup
from shared.cache.storage import LocalStorage
from shared.config import to_yaml
from shared.errors import EXIT_INTERRUPTED, UserError
from shared.model_folder import ModelFolder
from tests.conftest import preprocess_options, write_data
from tests.preprocess.runs import contents
from tests.preprocess.workers import Killer, alive, parent_of, writers

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-ray.txt")

COUNT = 40
STORE_BYTES = 80 << 20
RAY = EngineOptions(kind="ray")


@pytest.fixture(scope="module")
def options(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreprocessConfig:
    """Of a run that has some fifty units; its cache is there."""
    folder = tmp_path_factory.mktemp("ray")
    data = write_data(folder / "data", COUNT)
    encode = EncodeOptions(image_batch=2, text_batch=4, workers=2, shard_rows=4)
    options = preprocess_options(data, folder / "local", tiny_model, encode=encode)
    assert preprocess(options) == 0
    return options


@pytest.fixture(scope="module")
def reference(options: PreprocessConfig) -> dict[str, bytes]:
    return contents(Path(options.cache))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one machine without a core for anyone; others may join."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def at_cluster(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return cluster


@contextmanager
def machines(cluster: Any, *num_cpus: int) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Machines with so many cores each, of the cluster for a while: what starts workers there, by its number."""
    nodes = [cluster.add_node(num_cpus=count, object_store_memory=STORE_BYTES) for count in num_cpus]
    raylets = [node.all_processes["raylet"][0].process for node in nodes]
    try:
        yield {raylet.pid: raylet for raylet in raylets}
    finally:
        for node in nodes:
            cluster.remove_node(node)


def test_with_a_worker_killed_in_the_middle_and_then_a_machine_gone_the_bytes_are_the_same(
    at_cluster: Any,
    options: PreprocessConfig,
    reference: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.chdir(Path(options.data).parent)  # where the machines have not been started
    with machines(at_cluster, 2, 1) as raylets:
        first = Killer(cache)
        then = Killer(cache, lambda pid: first.killed not in ([], [pid]), lambda pid: raylets[parent_of(pid)].kill())
        with first, then:
            assert preprocess(replace(options, data=Path(options.data).name, cache=str(cache), engine=RAY)) == 0
    assert [len(first.killed), len(then.killed)] == [1, 1]
    # A worker whose machine is going may yet be done with what it was given.
    assert "that it was making are made again" in capsys.readouterr().err
    assert contents(cache) == reference
    assert not ray.is_initialized()
    # A cluster that was found is left running.
    ray.init(address=at_cluster.address, log_to_driver=False)
    try:
        assert any(node["Alive"] for node in ray.nodes())
    finally:
        ray.shutdown()


def test_what_stops_a_worker_is_one_sentence_here(
    at_cluster: Any, options: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(options.data, tmp_path / "data"))

    def change_then_open(*arguments: Any) -> Any:
        shutil.copy(data / "001.png", data / "007.png")
        return open_workers(*arguments)

    monkeypatch.setattr(pipeline, "open_workers", change_then_open)
    sentence = r"^\S*007\.png changed while it was being preprocessed; run the same command"
    with machines(at_cluster, 1), pytest.raises(UserError, match=sentence):
        preprocess(replace(options, data=str(data), cache=str(tmp_path / "cache"), engine=RAY))
    assert not ray.is_initialized()


def test_a_cluster_without_room_for_a_worker_is_refused(
    at_cluster: Any, options: PreprocessConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"1 machine\(s\)\) has no room for a worker of 1 CPU and 0 GPU: add machines"):
        preprocess(replace(options, cache=str(tmp_path / "cache"), engine=RAY))
    assert not ray.is_initialized()


def test_started_on_the_spot_it_is_quiet_and_ends_with_ctrl_c_and_another_engine_resumes_to_the_same_bytes(
    options: PreprocessConfig, reference: dict[str, bytes], tmp_path: Path
) -> None:
    for attempt in range(4):
        there = replace(options, cache=str(tmp_path / f"cache-{attempt}"))
        if (busy := interrupted(there, tmp_path)) is not None:
            break
    assert busy is not None, "it was finished each time before it heard of the interruption"
    until = time.monotonic() + 60
    while any(alive(pid) for pid in busy) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(busy) > 2  # the worker, and what Ray itself is made of
    assert not [pid for pid in busy if alive(pid)]
    made = contents(Path(there.cache))
    assert 0 < len(made) < len(reference)
    assert preprocess(there) == 0
    assert contents(Path(there.cache)) == reference


def interrupted(options: PreprocessConfig, folder: Path) -> set[int] | None:
    """The stage on a cluster of its own, stopped by Ctrl-C in the middle: the processes that were at work. None where
    it was finished before it heard of it, as on a busy machine it may be."""
    cache, out, err = Path(options.cache), folder / "out", folder / "err"
    there = replace(options, engine=replace(RAY, ray_workers=1, ray_cpus_per_worker=0.5))
    (folder / "recipe.yaml").write_text(to_yaml(there))
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "preprocess", "--recipe", str(folder / "recipe.yaml")],
            cwd=Path(__file__).parents[2], stdout=stdout, stderr=stderr,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        )  # fmt: skip
        while not list(cache.glob("*/*.parquet")) or not (busy := {pid for pid, _ in writers(cache)}):
            if process.poll() == 0:
                return None
            assert process.poll() is None, err.read_text()
            time.sleep(0.001)
        processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        busy |= {pid for pid in processes if alive(pid) and parent_of(pid) == process.pid}
        process.send_signal(signal.SIGINT)
        if (code := process.wait()) == 0:
            return None
        assert code == EXIT_INTERRUPTED
    assert err.read_text() == "interrupted: run the same command again to resume\n"
    assert not re.search("ray|INFO|WARN", out.read_text())
    return busy


def test_a_worker_that_does_not_see_the_cache_is_refused(options: PreprocessConfig, tmp_path: Path) -> None:
    setup = Setup(options, ModelFolder("model", None, tmp_path), LocalStorage(tmp_path), 1)
    with pytest.raises(UserError, match=rf"does not see the cache: {tmp_path}/cache is not the same folder there"):
        _Actor().start(setup, False, "home", tmp_path / "cache" / "marker.part")


def test_an_address_where_nobody_answers_is_refused_at_once(
    options: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(UserError, match=rf"no Ray cluster answers at RAY_ADDRESS=127.0.0.1:{port} .Connection refused"):
        preprocess(replace(options, cache=str(tmp_path / "cache"), engine=RAY))
    assert not (tmp_path / "cache").exists()


def test_without_ray_its_absence_is_one_sentence(
    options: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"is not installed: pip install -r requirements-ray\.txt"):
        preprocess(replace(options, cache=str(tmp_path / "cache"), engine=RAY))
    assert not (tmp_path / "cache").exists()
