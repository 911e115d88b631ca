"""Workers on a Ray cluster: the same bytes, also when one is killed or a machine goes; and what is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.engine import EngineOptions
from preprocess.pipeline import preprocess
from tests.conftest import preprocess_options, write_data
from tests.preprocess.runs import contents
from tests.preprocess.workers import Killer

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
    """A cluster of two machines (in this one), of one core and of two."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False},
    )
    try:
        cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def at_cluster(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return cluster


def test_a_cluster_s_workers_of_which_one_is_killed_in_the_middle_make_the_same_bytes(
    at_cluster: Any,
    options: PreprocessConfig,
    reference: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    with Killer(cache) as killer:
        assert preprocess(replace(options, cache=str(cache), engine=RAY)) == 0
    assert len(killer.killed) == 1
    said = capsys.readouterr()
    assert "died (" in said.err
    assert "that it was making are made again" in said.err
    assert contents(cache) == reference
    assert not ray.is_initialized()
    # A cluster that was found is left running.
    ray.init(address=at_cluster.address, log_to_driver=False)
    try:
        assert sum(node["Alive"] for node in ray.nodes()) == 2
    finally:
        ray.shutdown()
