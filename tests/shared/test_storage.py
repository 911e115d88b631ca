"""A cache behind a web server: nginx with range requests, killed, restarted, slow, and with altered files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared import remote
from shared.cache import schema
from shared.cache.schema import CacheError
from shared.cache.storage import Listed, RemoteOptions, RemoteStorage, Storage, is_remote, open_storage
from shared.errors import UserError
from tests.shared.servers import Nginx, needs_nginx, nginx

SHARD_BYTES = 300_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Nginx]:
    with nginx(tmp_path / "nginx") as started:
        yield started


def put(server: Nginx, name: str, num_bytes: int = SHARD_BYTES) -> Listed:
    """A file of the cache that the server serves, as the cache's lists would state it."""
    data = np.random.default_rng(len(name) + sum(name.encode())).bytes(num_bytes)
    path = server.root / "cache" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Listed(name, num_bytes, schema.checksum(data))


def shards(server: Nginx, count: int) -> list[Listed]:
    return [put(server, f"latents-1/{i:05d}.tar") for i in range(count)]


def opened(server: Nginx, local: Path, **options: float) -> RemoteStorage:
    chosen = RemoteOptions(folder=str(local), **{"patience_seconds": 20.0, **options})  # type: ignore[arg-type]
    storage = open_storage(f"{server.url}/cache", chosen)
    assert isinstance(storage, RemoteStorage)
    return storage


def fetched(storage: Storage, file: Listed) -> Path:
    return storage.fetch(file.name, num_bytes=file.num_bytes, checksum=file.checksum)


def is_whole(path: Path, file: Listed) -> bool:
    return schema.file_checksum(path) == file.checksum


def kept(local: Path) -> list[str]:
    """The shards in the local folder, unfinished ones too."""
    return sorted(path.name for path in local.glob("*/shards/**/*") if path.is_file())


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


# A local cache


def test_a_local_cache_is_used_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "00000.tar").write_bytes(b"four")
    (tmp_path / "a" / "00001.tar.part").write_bytes(b"unfinished")
    for storage in (open_storage(tmp_path), open_storage(str(tmp_path)), open_storage(f"file://{tmp_path}")):
        assert not storage.remote
        assert storage.root == tmp_path
        assert storage.fetch("a/00000.tar") == tmp_path / "a" / "00000.tar"
        assert storage.size("a/00000.tar") == 4
        assert storage.size("a/00001.tar") is None
        assert storage.listing("a/") == {"a/00000.tar": 4}
        storage.synchronize()
        storage.finished("a/00000.tar")
        storage.flush()
    storage.remove("a/00000.tar")
    assert storage.listing() == {}


def test_a_url_is_told_from_a_path() -> None:
    assert [is_remote(text) for text in ("s3://b/c", "https://h/c", "cache", "/a/b", "file:///a/b")] == [
        True, True, False, False, False,
    ]  # fmt: skip


# Reading


@needs_nginx
def test_what_arrives_is_what_was_put_there_and_is_fetched_once(server: Nginx, tmp_path: Path) -> None:
    files = shards(server, 2)
    table = put(server, "index/samples.arrow", 50_000)
    storage = opened(server, tmp_path / "local")
    for file in [*files, table] * 2:
        assert is_whole(fetched(storage, file), file)
    with storage.using(files[0]) as path:
        assert is_whole(path, files[0])
    assert storage.size(table.name) == 50_000
    assert storage.size("index/none.arrow") is None
    assert [len(server.requests(Path(file.name).name)) for file in [*files, table]] == [1, 1, 1]


@needs_nginx
def test_a_later_process_finds_what_an_earlier_one_fetched(server: Nginx, tmp_path: Path) -> None:
    file, table = *shards(server, 1), put(server, "index/samples.arrow")
    for _ in range(2):
        storage = opened(server, tmp_path / "local")
        assert is_whole(fetched(storage, file), file)
        assert is_whole(fetched(storage, table), table)
        storage.close()
    assert len(server.requests("00000.tar")) == len(server.requests("samples.arrow")) == 1


@needs_nginx
def test_what_was_damaged_on_the_local_disk_is_fetched_again(server: Nginx, tmp_path: Path) -> None:
    file, table = *shards(server, 1), put(server, "index/samples.arrow")
    for storage in (opened(server, tmp_path / "local"), opened(server, tmp_path / "local")):
        for listed in (file, table):
            path = fetched(storage, listed)
            assert is_whole(path, listed)
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        storage.close()
    assert len(server.requests("00000.tar")) == len(server.requests("samples.arrow")) == 2


@needs_nginx
def test_a_list_that_nothing_vouches_for_is_the_newest(server: Nginx, tmp_path: Path) -> None:
    manifest = server.root / "cache" / "cache.json"
    manifest.parent.mkdir()
    storage = opened(server, tmp_path / "local")
    for content in ("one", "two", "three"):
        manifest.write_text(content)
        assert storage.fetch("cache.json").read_text() == content


@needs_nginx
def test_another_version_of_a_shard_takes_the_place_of_the_one_before(server: Nginx, tmp_path: Path) -> None:
    storage = opened(server, tmp_path / "local")
    before = put(server, "a/00000.tar")
    assert is_whole(fetched(storage, before), before)
    data = bytes(SHARD_BYTES)
    (server.root / "cache" / before.name).write_bytes(data)
    after = Listed(before.name, SHARD_BYTES, schema.checksum(data))
    assert is_whole(fetched(storage, after), after)


@needs_nginx
def test_a_server_that_ignores_ranges_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 100_000)
    with nginx(tmp_path / "nginx", "max_ranges 0") as server:
        (file,) = shards(server, 1)
        assert is_whole(fetched(opened(server, tmp_path / "local"), file), file)


# Bounded


@needs_nginx
def test_the_local_folder_stays_within_its_bytes_and_what_was_used_longest_ago_goes(
    server: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.cache.storage.RECENT", 0)
    files = shards(server, 5)
    storage = opened(server, tmp_path / "local", shard_cache_bytes=3 * SHARD_BYTES + 1000)
    for i in (0, 1, 2, 0, 3):
        fetched(storage, files[i])
    assert kept(tmp_path / "local") == ["00000.tar", "00002.tar", "00003.tar"]
    fetched(storage, files[4])
    assert kept(tmp_path / "local") == ["00000.tar", "00003.tar", "00004.tar"]


@needs_nginx
def test_what_a_process_uses_stays_and_more_than_the_bound_is_said(
    server: Nginx, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = shards(server, 3)
    one, other = (opened(server, tmp_path / "local", shard_cache_bytes=SHARD_BYTES + 1000) for _ in range(2))
    with one.using(files[0]) as path:
        assert is_whole(fetched(other, files[1]), files[1])
        assert is_whole(path, files[0])
        assert one.holds(files[0].name)
        assert "the shards in use at once need 299,000 bytes more than" in capsys.readouterr().err
    other.close()
    assert is_whole(fetched(one, files[2]), files[2])
    assert kept(tmp_path / "local") == ["00002.tar"]
    assert not one.holds(files[0].name)


@needs_nginx
def test_a_disk_with_less_room_than_the_limit_is_the_limit(
    server: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room_for_two(_: Path) -> SimpleNamespace:
        return SimpleNamespace(
            free=2 * SHARD_BYTES + 1000 - sum(p.stat().st_size for p in tmp_path.glob("local/**/*.tar"))
        )

    monkeypatch.setattr("shared.cache.storage.RECENT", 0)
    monkeypatch.setattr("shared.cache.shard_cache.shutil.disk_usage", room_for_two)
    storage = opened(server, tmp_path / "local")
    for file in shards(server, 4):
        assert is_whole(fetched(storage, file), file)
    assert kept(tmp_path / "local") == ["00002.tar", "00003.tar"]


@needs_nginx
def test_what_a_killed_process_left_unfinished_is_counted_and_goes(server: Nginx, tmp_path: Path) -> None:
    files = shards(server, 2)
    storage = opened(server, tmp_path / "local", shard_cache_bytes=2 * SHARD_BYTES)
    left = fetched(storage, files[0]).with_name("00007.tar.part")
    left.write_bytes(bytes(SHARD_BYTES))
    os.utime(left, (0, 0))
    fetched(storage, files[1])
    assert kept(tmp_path / "local") == ["00000.tar", "00001.tar"]


# Ahead


@needs_nginx
def test_announced_shards_come_in_order_and_are_kept(server: Nginx, tmp_path: Path) -> None:
    files = shards(server, 6)
    storage = opened(server, tmp_path / "local", downloads=1)
    storage.fetch_ahead(files[::-1])
    until(lambda: all(storage.holds(file.name) for file in files))
    asked = [line.split()[1] for line in server.log]
    assert asked == [f"/cache/{file.name}" for file in files[::-1]]
    for file in files:
        assert is_whole(fetched(storage, file), file)
    assert len(server.log) == 6
    storage.close()


@needs_nginx
def test_announcing_more_than_fits_fetches_the_first_and_goes_on_as_they_are_used(
    server: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shared.cache.storage.RECENT", 0)
    files = shards(server, 6)
    storage = opened(server, tmp_path / "local", shard_cache_bytes=2 * SHARD_BYTES, downloads=3)
    for i, file in enumerate(files):
        storage.fetch_ahead(files[i:])
        until(lambda i=i: {f.name for f in files if storage.holds(f.name)} == {f.name for f in files[i : i + 2]})  # type: ignore[misc]
        assert is_whole(fetched(storage, file), file)
        assert len(kept(tmp_path / "local")) <= 2
    assert [len(server.requests(f"{i:05d}.tar")) for i in range(6)] == [1] * 6
    assert "in use at once" not in capsys.readouterr().err
    storage.close()


@needs_nginx
def test_a_shard_that_is_needed_now_takes_the_place_of_the_one_needed_last(server: Nginx, tmp_path: Path) -> None:
    files = shards(server, 4)
    storage = opened(server, tmp_path / "local", shard_cache_bytes=3 * SHARD_BYTES, downloads=2)
    storage.fetch_ahead(files[:3])
    until(lambda: all(storage.holds(file.name) for file in files[:3]))
    with storage.using(files[3]) as path:
        assert is_whole(path, files[3])
        assert [storage.holds(file.name) for file in files] == [True, True, False, True]
    until(lambda: storage.holds(files[2].name))  # it is still announced
    storage.close()


@needs_nginx
def test_what_could_not_be_fetched_ahead_says_why_when_it_is_read(server: Nginx, tmp_path: Path) -> None:
    files = shards(server, 2)
    (server.root / "cache" / files[0].name).unlink()
    storage = opened(server, tmp_path / "local")
    storage.fetch_ahead(files)
    until(lambda: storage.holds(files[1].name))
    with pytest.raises(CacheError, match=r"00000\.tar is missing; run the same"):
        fetched(storage, files[0])
    storage.close()


# Several processes

FETCH_ALL = """
import sys
from shared.cache.storage import Listed, RemoteOptions, open_storage
url, folder, ahead, *files = sys.argv[1:]
files = [Listed(name, int(size), checksum) for name, size, checksum in (file.split(":") for file in files)]
storage = open_storage(url, RemoteOptions(folder=folder, downloads=2))
storage.fetch_ahead(files if ahead == "ahead" else [])
for file in files:
    print(storage.fetch(file.name, num_bytes=file.num_bytes, checksum=file.checksum).stat().st_size)
"""


@needs_nginx
@pytest.mark.parametrize("ahead", ["ahead", "on demand"])
def test_two_processes_at_once_fetch_every_shard_once(tmp_path: Path, ahead: str) -> None:
    with nginx(tmp_path / "nginx", "limit_rate 2m") as server:  # long enough for them to meet
        files = shards(server, 6)
        command = [sys.executable, "-c", FETCH_ALL, f"{server.url}/cache", str(tmp_path / "local"), ahead]
        command += [f"{file.name}:{file.num_bytes}:{file.checksum}" for file in files]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for process in both:
            assert process.communicate()[0].split() == [str(SHARD_BYTES)] * 6
            assert process.returncode == 0
        assert [len(server.requests(f"{i:05d}.tar")) for i in range(6)] == [1] * 6


def _fetch_in_child(storage: Storage, file: Listed) -> bool:
    return is_whole(fetched(storage, file), file)


@needs_nginx
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_storage_given_to_another_process_connects_anew(
    server: Nginx, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    files = shards(server, 3)
    storage = opened(server, tmp_path / "local")
    fetched(storage, files[0])
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert pool.submit(_fetch_in_child, storage, files[1]).result()
    assert is_whole(fetched(storage, files[2]), files[2])
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.url == storage.url
    assert copy.options == storage.options


# Faults


@needs_nginx
def test_altered_bytes_on_the_server_are_refused(server: Nginx, tmp_path: Path) -> None:
    file, table = *shards(server, 1), put(server, "index/samples.arrow")
    storage = opened(server, tmp_path / "local")
    for listed in (file, table):
        path = server.root / "cache" / listed.name
        data = bytearray(path.read_bytes())
        data[SHARD_BYTES // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(CacheError, match=r"was altered: its bytes do not have the checksum .* `make repair`"):
            fetched(storage, listed)
        assert len(server.requests(path.name)) == 3
    assert kept(tmp_path / "local") == []


@needs_nginx
@pytest.mark.parametrize("left", [0, 100, SHARD_BYTES - 1])
def test_a_file_cut_off_on_the_server_is_refused(
    server: Nginx, tmp_path: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 100_000)
    (file,) = shards(server, 1)
    os.truncate(server.root / "cache" / file.name, left)
    with pytest.raises(CacheError, match=r"was altered: it has .* bytes instead of 300000"):
        fetched(opened(server, tmp_path / "local"), file)


@needs_nginx
def test_bytes_that_were_altered_on_their_way_are_fetched_again(
    server: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = shards(server, 1)
    path = server.root / "cache" / file.name
    sound = path.read_bytes()
    path.write_bytes(bytes(SHARD_BYTES))
    # The server is mended while the client waits before its next attempt.
    monkeypatch.setattr("shared.cache.storage.time.sleep", lambda _: path.write_bytes(sound))
    assert is_whole(fetched(opened(server, tmp_path / "local"), file), file)
    assert "came altered" in capsys.readouterr().err


@needs_nginx
def test_a_server_that_is_killed_and_restarted_between_files_is_waited_for(
    server: Nginx, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = shards(server, 4)
    storage = opened(server, tmp_path / "local")
    fetched(storage, files[0])
    server.kill()
    paths: list[Path] = []
    reader = threading.Thread(target=lambda: paths.extend(fetched(storage, file) for file in files))
    reader.start()
    until(lambda: storage._remote._warned)
    server.start()
    reader.join()
    assert all(is_whole(path, file) for path, file in zip(paths, files, strict=True))
    printed = capsys.readouterr()
    assert printed.err.count("is not reachable") == 1
    assert "trying again for up to 20 s" in printed.err
    assert printed.out.count("is reachable again after") == 1


@needs_nginx
def test_a_server_killed_in_the_middle_of_a_file_costs_only_the_piece_that_was_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 1_000_000)
    with nginx(tmp_path / "nginx", "limit_rate 4m") as server:
        file = put(server, "a/00000.tar", 8_000_000)
        storage = opened(server, tmp_path / "local")
        paths: list[Path] = []
        reader = threading.Thread(target=lambda: paths.append(fetched(storage, file)))
        reader.start()
        until(lambda: len(server.requests("00000.tar")) >= 3)
        server.kill()
        until(lambda: storage._remote._out_since is not None)
        server.start()
        reader.join()
        assert is_whole(paths[0], file)
        whole = [line.split()[2] for line in server.requests("00000.tar") if line.endswith(" 206 1000000")]
        assert whole == [f"bytes={i * 1_000_000}-{(i + 1) * 1_000_000 - 1}" for i in range(8)]


@needs_nginx
def test_a_server_that_stays_away_ends_in_one_sentence(server: Nginx, tmp_path: Path) -> None:
    (file,) = shards(server, 1)
    storage = opened(server, tmp_path / "local", patience_seconds=0.5)
    server.kill()
    asking: list[Callable[[], object]] = [lambda: fetched(storage, file), lambda: storage.size("cache.json")]
    for ask in [*asking, lambda: storage.fetch("cache.json")]:
        with pytest.raises(UserError, match=r"/cache/\S+ was not reachable for .* run the same command again"):
            ask()


@needs_nginx
def test_a_busy_server_is_asked_again_and_a_closed_one_is_not(tmp_path: Path) -> None:
    busy, secret = "if (-f $document_root/busy) { return 503; }", "location /secret { deny all; }"
    with nginx(tmp_path / "nginx", busy, secret) as s:
        (file,) = shards(s, 1)
        (s.root / "busy").touch()
        storage = opened(s, tmp_path / "local")
        paths: list[Path] = []
        reader = threading.Thread(target=lambda: paths.append(fetched(storage, file)))
        reader.start()
        until(lambda: len(s.log) >= 2)
        (s.root / "busy").unlink()
        reader.join()
        assert is_whole(paths[0], file)
        before = len(s.log)
        with pytest.raises(UserError, match="no permission"):
            open_storage(f"{s.url}/secret", storage.options).fetch("cache.json")
        assert len(s.log) == before + 1


@needs_nginx
def test_a_full_local_disk_says_what_to_do(server: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (file,) = shards(server, 1)
    monkeypatch.setattr("shared.cache.storage.os.pwrite", full)
    with pytest.raises(UserError, match=r"the disk is full: .* lower remote\.shard_cache_bytes"):
        fetched(opened(server, tmp_path / "local"), file)
    assert kept(tmp_path / "local") == []


# What cannot be


@needs_nginx
def test_writing_to_a_web_server_is_refused(server: Nginx, tmp_path: Path) -> None:
    storage = opened(server, tmp_path / "local")
    for refused in (storage.check_writable, storage.synchronize, lambda: storage.remove("a")):
        with pytest.raises(UserError, match="a cache can be read from it, not written to it"):
            refused()
    with pytest.raises(UserError, match="it can be read, but not listed"):
        storage.listing()
    (storage.root / "cache.json").write_text("{}")
    storage.finished("cache.json")
    with pytest.raises(UserError, match="not written to it"):
        storage.flush()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("shared.cache.shard_cache.fcntl.flock", cannot)
    storage = open_storage("https://host/cache", RemoteOptions(folder=str(tmp_path)))
    with pytest.raises(UserError, match=r"cannot be locked .* choose a remote\.folder on a local disk"):
        storage.fetch("a/00000.tar", num_bytes=1, checksum="0")


def test_a_missing_package_and_an_unknown_protocol_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RemoteOptions(folder=str(tmp_path))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match="gs:// needs the package gcsfs: pip install gcsfs"):
        open_storage("gs://bucket/cache", options).fetch("cache.json")
    with pytest.raises(UserError, match="Protocol not known: carrier"):
        open_storage("carrier://pigeon/cache", options).fetch("cache.json")


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    storage = open_storage("https://user:secret@host:1/cache/", RemoteOptions(folder=str(tmp_path)))
    assert storage.url == "https://host:1/cache"


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    for field in ("shard_cache_bytes", "downloads", "patience_seconds"):
        impossible: dict[str, Any] = {field: -1}
        with pytest.raises(UserError, match=f"remote.{field}"):
            RemoteOptions(**impossible).check()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be made .* UNDERDRAWING_CACHE_DIR"):
        open_storage("s3://bucket/cache", RemoteOptions(folder=str(tmp_path / "file")))


def test_the_local_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERDRAWING_CACHE_DIR", str(tmp_path / "here"))
    assert open_storage("s3://bucket/cache").root.is_relative_to(tmp_path / "here")
