"""Training from a cache that comes over a network: from a web server, or from a server that speaks S3."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch

from shared.cache import shard_cache
from shared.cache.reader import Cache, CacheError
from shared.cache.storage import RemoteOptions, RemoteStorage
from shared.families.base import Batch
from tests.shared.servers import BUCKET, needs_nginx, nginx, s3_server, use_s3
from tests.train.conftest import flux, losses, train_options
from train.loader import CachedSamples, Loader, LoaderOptions
from train.trainer import train

pytestmark = needs_nginx  # S3 is reached through it too, so that it can be killed without losing its buckets

KILLED = 4
"""The batch before which the server is killed."""


@pytest.fixture(scope="module")
def s3(tiny_cache: Path) -> Iterator[str]:
    """The URL of an S3 server that has the cache in its bucket."""
    with s3_server() as url, pytest.MonkeyPatch.context() as environment:
        use_s3(url, environment)
        fsspec.filesystem("s3", skip_instance_cache=True).put(f"{tiny_cache}/", f"{BUCKET}/cache/", recursive=True)
        yield url


@pytest.fixture(params=["http", "s3"])
def served(
    request: pytest.FixtureRequest, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """A copy of the cache at a `url`, behind an nginx that can be killed and started again."""
    if request.param == "http":
        with nginx(tmp_path / "nginx") as server:
            for path in tiny_cache.rglob("*"):
                if path.is_file():
                    copy = server.root / "cache" / path.relative_to(tiny_cache)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(path.read_bytes())
            yield SimpleNamespace(url=f"{server.url}/cache", server=server)
    else:
        with nginx(tmp_path / "nginx", upstream=request.getfixturevalue("s3")) as server:
            use_s3(server.url, monkeypatch)
            yield SimpleNamespace(url=f"s3://{BUCKET}/cache", server=server)


def remote_options(local: Path, **changes: Any) -> RemoteOptions:
    return RemoteOptions(folder=str(local), **{"patience_seconds": 30.0, "downloads": 2, **changes})


def loader_of(cache: Cache, **options: Any) -> Loader:
    chosen = LoaderOptions(**{"batch_size": 2, "order": "window", "window": 4, "lookahead": 3, **options})
    return Loader(CachedSamples(cache, flux(), "canny", "train"), chosen, seed=3, device=torch.device("cpu"))


def batches(loader: Loader) -> Iterator[Batch]:
    """Three epochs."""
    with closing(iter(loader)) as steps:
        for step in itertools.islice(steps, 3 * loader.batches_per_epoch):
            yield from step


def same(one: Batch, other: Batch) -> bool:
    return one.keys == other.keys and all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


def all_same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) > KILLED and all(same(a, b) for a, b in zip(one, other, strict=True))


def shard_bytes(folder: Path, pattern: str) -> list[int]:
    sizes = []
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another thread has just finished or removed it
            sizes.append(path.stat().st_size)
    return sizes


def held_bytes(folder: Path) -> int:
    """Of all shards in the local folder, at one instant: nobody makes room meanwhile, and a file that gets its final
    name counts once."""
    with open(folder / shard_cache.LOCK, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {}
        for path in folder.glob(f"*/{shard_cache.SHARDS}/*/*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found[stat.st_ino] = stat.st_size
    return sum(found.values())


def test_batches_are_those_of_a_local_copy_within_a_small_local_folder(
    served: Any, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = list(batches(loader_of(Cache(tiny_cache))))
    sizes = shard_bytes(tiny_cache, "*/*.tar")
    bound = max(sum(sizes) // 2, max(sizes))
    cache = Cache(served.url, remote_options(tmp_path / "local", shard_cache_bytes=bound))
    came = []
    for batch in batches(loader_of(cache)):
        came.append(batch)
        assert held_bytes(tmp_path / "local") <= bound < sum(sizes)
    assert all_same(came, expected)
    assert "in use at once" not in capsys.readouterr().err


def test_what_is_peeked_at_far_ahead_is_what_comes(served: Any, tiny_cache: Path, tmp_path: Path) -> None:
    cache = Cache(served.url, remote_options(tmp_path / "local"))
    loader = loader_of(cache)
    with ThreadPoolExecutor(1) as thread:  # while batches are being fetched
        coming = thread.submit(loader.peek, range(3 * loader.batches_per_epoch), ["clip"])
        came = list(batches(loader))
        for peeked, batch in zip(coming.result(), came, strict=True):
            assert torch.equal(peeked[flux().pooled], batch.tensors[flux().pooled])
            assert peeked.keys() == {flux().pooled}


def test_batches_are_the_same_when_the_server_is_killed_and_restarted_in_an_epoch(
    served: Any, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = list(batches(loader_of(Cache(tiny_cache))))
    # So little room that shards are fetched until the end.
    bound = max(shard_bytes(tiny_cache, "*/*.tar"))
    cache = Cache(served.url, remote_options(tmp_path / "local", shard_cache_bytes=bound))
    assert isinstance(cache.storage, RemoteStorage)
    warned = cache.storage._remote

    def restart() -> None:
        while not warned._warned:
            time.sleep(0.01)
        served.server.start()

    came = []
    for i, batch in enumerate(batches(loader_of(cache, workers=1, prefetch=1))):
        came.append(batch)
        if i == KILLED:
            served.server.kill()
            threading.Thread(target=restart).start()
    assert all_same(came, expected)
    printed = capsys.readouterr()
    assert printed.err.count("is not reachable") == 1
    assert printed.out.count("is reachable again") == 1


def test_bytes_that_were_altered_on_the_server_are_refused(served: Any, tmp_path: Path) -> None:
    cache = Cache(served.url, remote_options(tmp_path / "local"))
    tar = cache.layer("latents").tar(0)
    if served.url.startswith("s3:"):
        files: Any = fsspec.filesystem("s3", skip_instance_cache=True)
        path = f"{BUCKET}/cache/{tar.name}"
    else:
        files, path = fsspec.filesystem("file"), f"{served.server.root}/cache/{tar.name}"
    sound = files.cat_file(path)
    files.pipe_file(path, sound[:-2000] + bytes([sound[-2000] ^ 1]) + sound[-1999:])
    try:
        with pytest.raises(CacheError, match=rf"{served.url}/{tar.name} was altered: .* `make repair`"):
            list(batches(loader_of(cache)))
    finally:
        files.pipe_file(path, sound)


@pytest.mark.parametrize("served", ["http"], indirect=True)
def test_a_run_is_that_of_a_local_copy_and_goes_on_from_either(served: Any, tiny_cache: Path, tmp_path: Path) -> None:
    order: dict[str, Any] = {"loader": {"order": "window", "window": 4}, "remote": remote_options(tmp_path / "local")}
    assert train(train_options(tiny_cache, tmp_path / "whole", **order)) == 0
    for steps, cache in ((2, served.url), (4, str(tiny_cache)), (6, served.url)):
        options = train_options(tiny_cache, tmp_path / "parts", steps=steps, **order)
        assert train(dataclasses.replace(options, cache=cache)) == 0
    assert len(losses(tmp_path / "whole" / "run")) == 6
    assert losses(tmp_path / "parts" / "run") == losses(tmp_path / "whole" / "run")
