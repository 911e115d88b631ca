"""A cache that is made where no folder is: in a bucket, behind a server process that speaks S3."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from preprocess.config import PreprocessConfig
from preprocess.engine import EngineOptions
from preprocess.engines import processes
from preprocess.pipeline import preprocess
from preprocess.prior import PriorOptions
from shared.cache.storage import RemoteOptions
from shared.errors import UserError
from tests import forked
from tests.conftest import preprocess_options
from tests.preprocess.runs import contents, ran
from tests.preprocess.test_kill import Children
from tests.shared.servers import BUCKET, s3_server, use_s3


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def url(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Of a cache that is not there yet."""
    use_s3(server, monkeypatch)
    return f"s3://{BUCKET}/{request.node.name}"


def options_of(data: Path, model: Path, url: str, machine: Path, **changes: Any) -> PreprocessConfig:
    """To be run on a machine whose local folder this is."""
    remote = RemoteOptions(folder=str(machine), patience_seconds=20.0)
    return dataclasses.replace(preprocess_options(data, machine, model, remote=remote, **changes), cache=url)


def in_bucket(url: str) -> dict[str, bytes]:
    """Every file of the cache, by its name relative to it; without the note of the options, as `contents`."""
    files, path = fsspec.filesystem("s3", skip_instance_cache=True), url.removeprefix("s3://")
    found = {name.removeprefix(f"{path}/"): files.cat_file(name) for name in files.find(path)}
    found.pop("options.json", None)
    return found


def in_folder(cache: Path) -> dict[str, bytes]:
    """`contents`, without what is remembered of images that were read, which stays on each machine."""
    return {name: data for name, data in contents(cache).items() if not name.startswith("scan/")}


def test_a_remote_cache_has_the_bytes_of_a_local_one_and_is_known_on_another_machine(
    url: str, tiny_data: Path, tiny_model: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ran(options_of(tiny_data, tiny_model, url, tmp_path / "one"), capsys)
    assert first.code == 0
    assert in_bucket(url) == in_folder(tiny_cache)
    again = ran(options_of(tiny_data, tiny_model, url, tmp_path / "another"), capsys)
    assert not any(again.made.values())
    assert again.kept == first.made
    assert in_bucket(url) == in_folder(tiny_cache)


def test_class_images_of_a_remote_cache_are_painted_on_one_machine_and_known_on_another(
    url: str, tiny_data: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = PriorOptions(prompt="a box", images=2, steps=1)
    first = ran(options_of(tiny_data, tiny_model, url, tmp_path / "one", condition=(), prior=prior), capsys)
    assert first.code == 0
    assert "painting 2 of 2 class images" in first.out
    there = in_bucket(url)
    assert [name.partition("/")[2] for name in there if name.startswith("prior-")] == [
        "00000.png", "00001.png", "prior.json",
    ]  # fmt: skip
    again = ran(options_of(tiny_data, tiny_model, url, tmp_path / "another", condition=(), prior=prior), capsys)
    assert "painting" not in again.out
    assert not any(again.made.values())
    assert in_bucket(url) == there


def child(options: PreprocessConfig, environment: dict[str, str]) -> None:
    """In another process, begun with another environment."""
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    preprocess(options)


def test_a_run_that_is_killed_is_completed_by_another_machine(
    url: str, tiny_data: Path, tiny_model: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of(tiny_data, tiny_model, url, tmp_path / "one")
    process = Children().context.Process(target=child, args=(options, dict(os.environ)))
    process.start()
    files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    while sum(name.endswith(".parquet") for name in files.find(url)) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    left = in_bucket(url)
    assert all(name.replace(".parquet", ".tar") in left for name in left), "no index without its tar"
    completed = ran(options_of(tiny_data, tiny_model, url, tmp_path / "another"), capsys)
    assert sum(completed.kept.values()) > 0
    assert in_bucket(url) == in_folder(tiny_cache)


def test_several_processes_make_the_same_remote_cache(
    url: str, tiny_data: Path, tiny_model: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "multiprocessing", forked.Multiprocessing())
    engine = EngineOptions(processes=2)
    assert preprocess(options_of(tiny_data, tiny_model, url, tmp_path / "one", engine=engine)) == 0
    assert in_bucket(url) == in_folder(tiny_cache)


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_encoded(
    url: str, tiny_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="s3://nowhere/cache: there is no such bucket"):
        preprocess(options_of(tiny_data, tiny_model, "s3://nowhere/cache", tmp_path / "one"))


def test_a_web_server_is_refused(url: str, tiny_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a cache can be read from it, not written to it"):
        preprocess(options_of(tiny_data, tiny_model, "http://127.0.0.1:9/cache", tmp_path / "one"))
