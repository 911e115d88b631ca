"""A cache in a bucket, behind a server process that speaks S3: written whole or not at all, and taken up again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from shared import remote
from shared.cache import schema
from shared.cache.schema import CacheError
from shared.cache.storage import Listed, RemoteOptions, RemoteStorage, open_storage
from shared.errors import UserError
from tests.shared.servers import BUCKET, needs_nginx, nginx, s3_server, use_s3


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of an empty cache that no other test has."""
    use_s3(server, monkeypatch)
    return f"s3://{BUCKET}/{request.node.name}"


def opened(url: str, local: Path, **options: Any) -> RemoteStorage:
    storage = open_storage(url, RemoteOptions(folder=str(local), **{"patience_seconds": 20.0, **options}))
    assert isinstance(storage, RemoteStorage)
    return storage


def write(storage: RemoteStorage, name: str, num_bytes: int = 1000) -> Listed:
    """A file as the cache's writer leaves it, not yet uploaded."""
    data = np.random.default_rng(len(name) + sum(name.encode())).bytes(num_bytes)
    path = storage.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Listed(name, num_bytes, schema.checksum(data))


def write_shard(storage: RemoteStorage, stem: str, num_bytes: int = 1000) -> tuple[Listed, Listed]:
    return write(storage, f"{stem}.tar", num_bytes), write(storage, f"{stem}.parquet", 100)


def fetched(storage: RemoteStorage, file: Listed) -> bytes:
    return storage.fetch(file.name, num_bytes=file.num_bytes, checksum=file.checksum).read_bytes()


def is_whole(storage: RemoteStorage, file: Listed) -> bool:
    return schema.checksum(fetched(storage, file)) == file.checksum


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def test_what_is_finished_is_there_for_another_machine(bucket: str, tmp_path: Path) -> None:
    storage = opened(bucket, tmp_path / "here")
    shards = [write_shard(storage, f"latents-1/{i:05d}") for i in range(3)]
    for shard in shards:
        for file in shard:
            storage.finished(file.name)
    assert storage.listing("latents-1/") == {file.name: file.num_bytes for shard in shards for file in shard[::-1]}
    there = opened(bucket, tmp_path / "there")
    assert there.listing() == storage.listing()
    for tar, index in shards:
        assert there.size(tar.name) == tar.num_bytes
        assert is_whole(there, tar)
        assert is_whole(there, index)
        assert is_whole(storage, tar)
        assert not (storage.root / tar.name).exists()  # it has become one of the fetched ones
        assert (storage.root / index.name).is_file()
    with pytest.raises(CacheError, match=r"s3://.*/latents-1/00009\.tar is missing; run the same"):
        fetched(there, Listed("latents-1/00009.tar", 1, ""))
    storage.remove(shards[0][0].name)
    assert opened(bucket, tmp_path / "there").size(shards[0][0].name) is None


def test_a_large_file_goes_up_in_parts_and_comes_down_in_pieces(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 5 << 20)  # the smallest part that S3 takes
    storage = opened(bucket, tmp_path / "here")
    tar, index = write_shard(storage, "a/00000", 16_000_000)
    storage.finished(tar.name)
    storage.finished(index.name)
    storage.flush()
    assert is_whole(opened(bucket, tmp_path / "there"), tar)


UPLOAD = """
import sys
from shared import remote
from shared.cache.storage import RemoteOptions, open_storage
remote.PIECE_BYTES = 5 << 20
storage = open_storage(sys.argv[1], RemoteOptions(folder=sys.argv[2]))
storage.finished("a/00000.tar")
storage.finished("a/00000.parquet")
storage.flush()
"""


@needs_nginx
def test_an_upload_that_is_killed_is_never_seen_and_is_done_by_the_next_run(
    bucket: str, server: str, tmp_path: Path
) -> None:
    storage = opened(bucket, tmp_path / "here")
    tar, index = write_shard(storage, "a/00000", 31_000_000)
    with nginx(tmp_path / "nginx", "proxy_request_buffering off", upstream=server) as between:
        environment = {**os.environ, "FSSPEC_S3_ENDPOINT_URL": between.url}
        command = [sys.executable, "-c", UPLOAD, bucket, str(tmp_path / "here")]
        process = subprocess.Popen(command, env=environment)
        until(lambda: len(between.requests("00000.tar", "PUT")) >= 1)  # of seven parts, four at a time
        process.kill()
        assert process.wait() != 0
    there = opened(bucket, tmp_path / "there")
    assert there.listing() == {}
    storage.synchronize()
    assert opened(bucket, tmp_path / "there").listing() == {index.name: 100, tar.name: 31_000_000}
    assert is_whole(there, tar)


def test_an_index_is_not_uploaded_where_its_tar_was_not(bucket: str, tmp_path: Path) -> None:
    storage = opened(bucket, tmp_path / "here")
    index = write(storage, "a/00000.parquet")
    storage.finished("a/00000.tar")  # which somebody has removed
    storage._waiting.join()
    for ask in (lambda: storage.finished(index.name), storage.flush):
        with pytest.raises(FileNotFoundError, match=r"00000\.tar"):
            ask()
    assert opened(bucket, tmp_path / "there").listing() == {}


def test_another_machine_takes_up_where_this_one_stopped(bucket: str, tmp_path: Path) -> None:
    here, there = opened(bucket, tmp_path / "here"), opened(bucket, tmp_path / "there")
    finished = [*write_shard(here, "a/00000"), write(here, "cache.json"), write(here, "index/a.arrow")]
    for file in finished:
        here.finished(file.name)
    here.flush()
    there.synchronize()
    lists = sorted(path.relative_to(there.root).as_posix() for path in there.root.rglob("*") if path.is_file())
    assert lists == ["a/00000.parquet", "cache.json"]
    # It redoes the manifest; and what this machine had of an earlier state gives way.
    changed = write(there, "cache.json", 2000)
    there.finished(changed.name)
    there.flush()
    write_shard(here, "b/00000")[0]
    (here.root / "b" / "00000.tar").unlink()
    here.synchronize()
    assert (here.root / "cache.json").stat().st_size == 2000
    assert not (here.root / "b" / "00000.parquet").exists()


def test_what_another_machine_finishes_meanwhile_is_seen_after_a_refresh(bucket: str, tmp_path: Path) -> None:
    here, there = opened(bucket, tmp_path / "here"), opened(bucket, tmp_path / "there")
    here.synchronize()
    waiting, _ = write_shard(here, "b/00000")  # not finished yet: nobody else's business
    tar, index = write_shard(there, "a/00000")
    for file in (tar, index):
        there.finished(file.name)
    there.flush()
    assert here.size(tar.name) == 1000
    here.refresh()
    assert sorted(here.listing()) == [index.name, tar.name]
    assert schema.file_checksum(here.root / index.name) == index.checksum
    assert (here.root / waiting.name).is_file()


def test_a_shard_that_another_machine_has_finished_is_not_uploaded_over(bucket: str, tmp_path: Path) -> None:
    here, there = opened(bucket, tmp_path / "here"), opened(bucket, tmp_path / "there")
    write_shard(here, "a/00000", 500)  # finished here, and then the run was killed
    tar, index = write_shard(there, "a/00000")
    for file in (tar, index):
        there.finished(file.name)
    there.flush()
    here.synchronize()
    assert here.listing() == {index.name: 100, tar.name: 1000}
    assert is_whole(here, tar)
    assert not (here.root / tar.name).exists()


@needs_nginx
def test_a_server_that_is_away_while_files_go_up_is_waited_for(
    bucket: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with nginx(tmp_path / "nginx", upstream=server) as between:
        use_s3(between.url, monkeypatch)
        storage = opened(bucket, tmp_path / "here")
        storage.synchronize()
        shards = [write_shard(storage, f"a/{i:05d}", 100_000) for i in range(3)]
        between.kill()
        for file in [file for shard in shards for file in shard]:
            storage.finished(file.name)
        until(lambda: storage._remote._warned)
        between.start()
        storage.flush()
        assert capsys.readouterr().err.count("is not reachable") == 1
        there = opened(bucket, tmp_path / "there")
        assert len(there.listing()) == 6
        between.kill()
        reader = threading.Thread(target=lambda: [fetched(there, tar) for tar, _ in shards])
        reader.start()
        until(lambda: there._remote._warned)
        between.start()
        reader.join()
        assert all(is_whole(there, tar) for tar, _ in shards)


def test_a_bucket_that_is_not_there_is_named(bucket: str, tmp_path: Path) -> None:
    storage = opened("s3://nowhere/cache", tmp_path / "here")
    write(storage, "cache.json")
    for ask in (storage.synchronize, storage.listing, lambda: storage.fetch("options.json")):
        with pytest.raises(UserError, match="s3://nowhere/cache: there is no such bucket"):
            ask()
    storage.finished("cache.json")
    with pytest.raises(UserError, match="there is no such bucket"):
        storage.flush()


def test_missing_credentials_are_refused_at_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    storage = opened(bucket, tmp_path / "here")
    for ask in (storage.synchronize, lambda: storage.fetch("cache.json")):
        with pytest.raises(UserError, match=r"no permission .*; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            ask()
    assert "not reachable" not in capsys.readouterr().err


def test_credentials_that_the_server_refuses_are_refused_at_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3_server({"INITIAL_NO_AUTH_ACTION_COUNT": "0"}) as strict:
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": strict})
        with pytest.raises(UserError, match=r"no permission .*; set AWS_ACCESS_KEY_ID"):
            opened(bucket, tmp_path / "here").fetch("cache.json")
    assert "not reachable" not in capsys.readouterr().err


def test_a_store_that_shows_unfinished_files_is_given_them_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fsspec.filesystem("memory")
    seen: list[list[str]] = []
    put_file = type(files).put_file

    def watched(self: Any, local: str, name: str, **more: Any) -> None:
        put_file(self, local, name, **more)
        seen.append(self.find("/watched"))

    monkeypatch.setattr(type(files), "put_file", watched)
    storage = opened("memory://watched/cache", tmp_path / "here")
    storage.finished(write(storage, "a/00000.parquet").name)
    storage.flush()
    assert seen == [["/watched/cache/a/00000.parquet.part"]]
    assert storage.listing() == {"a/00000.parquet": 1000}
    files.rm("/watched", recursive=True)
