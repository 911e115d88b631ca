"""Where a cache's files are: in a folder of this machine, or at a URL that is read and written through one.

Names are relative to the cache, with forward slashes. Of a remote cache, lists (manifest, tables, indexes) are mirrored
as they are asked for; shards are fetched when they are needed, or somewhat before, into a local shard cache of bounded
size. What arrives is compared with its checksum.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import xxhash

from shared import atomic
from shared.cache import schema, shard_cache
from shared.cache.schema import CacheError
from shared.cache.shard_cache import SHARDS, Part, ShardCache
from shared.errors import UserError, disk_full
from shared.remote import FIRST_PAUSE_SECONDS, Info, MissingError, OtherSizeError, Remote
from shared.report import warn

FOLDER_VARIABLE = "UNDERDRAWING_CACHE_DIR"
LISTS = "lists"
TAR = ".tar"
DOWNLOADS_OF_ONE_FILE = 3
"""How often a file is fetched whose bytes do not have their checksum, before it is refused."""
RECENT = 16
"""Shards that stay held after their last use, besides those that are announced."""
UPLOADS_AHEAD = 8
"""Files that may wait for being uploaded; then whoever makes more waits too."""


@dataclass(frozen=True)
class RemoteOptions:
    """How a cache at a URL (s3://, gs://, hf://, https://) is used from here. Without effect for a local one."""

    folder: str | None = None
    """Where fetched shards are kept, for all caches and runs. Default: $UNDERDRAWING_CACHE_DIR, else
    ~/.cache/underdrawing. Take a fast local disk."""
    shard_cache_bytes: int = 100_000_000_000
    """The most that fetched shards may take there; those used longest ago are removed. What is read at a time (the
    loader's window) should fit in, or shards are fetched again and again."""
    downloads: int = 8
    """Shards that are fetched at the same time."""
    patience_seconds: float = 300.0
    """How long a server that does not answer is tried again before the run ends."""

    def check(self) -> None:
        """Refuse impossible values."""
        if self.shard_cache_bytes < 1:
            raise UserError(f"remote.shard_cache_bytes must be 1 or more, not {self.shard_cache_bytes}")
        if self.downloads < 1:
            raise UserError(f"remote.downloads must be 1 or more, not {self.downloads}")
        if self.patience_seconds < 0:
            raise UserError(f"remote.patience_seconds must be 0 or more, not {self.patience_seconds}")

    @property
    def local_folder(self) -> Path:
        """Where fetched shards are kept."""
        default = os.environ.get(FOLDER_VARIABLE) or "~/.cache/underdrawing"
        return Path(self.folder or default).expanduser()


class Listed(NamedTuple):
    """A file of a cache as the lists state it."""

    name: str
    num_bytes: int
    checksum: str
    """XXH3-128 of the file."""


class Storage(ABC):
    """A cache's files. Threads may share it; a process that is given one begins anew."""

    root: Path
    """The folder that files are written in, and lists read from: the cache itself, or the mirror of a remote one."""
    url: str
    """The cache as messages name it."""
    remote: bool

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a finished file; None where there is none."""

    @abstractmethod
    def listing(self, prefix: str = "") -> dict[str, int]:
        """The finished files whose names begin with `prefix`, and their sizes in bytes."""

    @abstractmethod
    def fetch(self, name: str, *, num_bytes: int | None = None, checksum: str | None = None) -> Path:
        """The path of the whole file on this machine.

        Of a remote cache it is fetched unless it is here, and compared with what is stated. Shards need both stated;
        of a list without a checksum the newest version comes. Raises `CacheError` where the file is missing or does not
        have its checksum, `UserError` where the server cannot be reached. A shard's path may be removed after some
        time: map it at once, in a `using` block where other threads fetch too. A local cache compares nothing: its
        readers do.
        """

    @contextmanager
    def using(self, file: Listed) -> Iterator[Path]:
        """`fetch`, and inside the block the file stays where it is."""
        yield self.fetch(file.name, num_bytes=file.num_bytes, checksum=file.checksum)

    def holds(self, name: str) -> bool:
        """Whether a shard that was fetched is still kept from being removed. Maps of others should be dropped, since
        they keep the disk space of a file that is gone."""
        return True

    def fetch_ahead(self, files: Sequence[Listed]) -> None:  # noqa: B027
        """Announce the shards of the coming samples, in the order of their use: they are fetched in that order and
        kept. Each call replaces the one before; what it names no more may be removed."""

    def check_writable(self) -> None:  # noqa: B027
        """Raises `UserError`, one sentence, where files cannot be written."""

    def synchronize(self) -> None:  # noqa: B027
        """Before writing, while no other process of this machine writes: upload what an interrupted run of this machine
        had finished, then `refresh`; what is no longer there goes here, too."""

    def refresh(self) -> None:  # noqa: B027
        """Learn what other machines have finished: the tables, indexes of shards and JSON files of the remote cache are
        in `root` afterwards. Not those of `index/`, which publishing makes anew."""

    def finished(self, name: str) -> None:  # noqa: B027
        """A file is whole in `root`: upload it, after all that were named before. A shard's tar comes before its index,
        and with the index leaves `root`: ask `fetch` for it."""

    def flush(self) -> None:  # noqa: B027
        """Wait until all that is `finished` is uploaded. Raises the `UserError` of an upload that failed."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def close(self) -> None:  # noqa: B027
        """Upload what waits, let everything go."""


class LocalStorage(Storage):
    """A folder: files are where they are."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, str(root)

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def listing(self, prefix: str = "") -> dict[str, int]:
        return dict(sorted(_files(self.root, prefix)))

    def fetch(self, name: str, *, num_bytes: int | None = None, checksum: str | None = None) -> Path:
        return self.root / name

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)


@dataclass
class _Held:
    """A fetched shard that this process keeps from being removed."""

    path: Path
    checksum: str
    handle: int
    users: int = 0
    """Blocks that use it just now."""


class RemoteStorage(Storage):
    """A cache at a URL.

    Below the local folder: HASH/lists is the mirror (and where shards are made), HASH/shards what was fetched or
    uploaded, with HASH of the URL.
    """

    remote = True

    def __init__(self, url: str, options: RemoteOptions) -> None:
        options.check()
        self._remote, self.options = Remote(url, options.patience_seconds), options
        self.url = self._remote.shown
        home = options.local_folder / hashlib.sha256(self._remote.url.encode()).hexdigest()[:16]
        self.root, self._shards = home / LISTS, home / SHARDS
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{home} cannot be made ({error.strerror}), where shards of {self.url} are to be kept; name another "
                f"folder: remote.folder or {FOLDER_VARIABLE}"
            ) from error
        self._cache = ShardCache(options.local_folder, options.shard_cache_bytes)
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._held: OrderedDict[str, _Held] = OrderedDict()
        """The one used last at the end."""
        self._verified: set[tuple[str, str]] = set()
        """(name, checksum) of files whose bytes this process has compared."""
        self._ahead: dict[str, Listed] = {}
        self._taken: set[str] = set()
        """Of those ahead: a thread is at it, or it failed, and whoever reads it will learn why."""
        self._threads: list[threading.Thread] = []
        self._sizes: dict[str, int] | None = None
        self._waiting: queue.Queue[str] = queue.Queue(maxsize=UPLOADS_AHEAD)
        self._uploader: threading.Thread | None = None
        self._failed: BaseException | None = None

    def _here(self) -> None:
        if self._process != os.getpid():  # forked: locks and threads are the parent's, and so is what it holds
            for held in self._held.values():
                os.close(held.handle)
            self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStorage, (self._remote.url, self.options)

    # Reading

    def size(self, name: str) -> int | None:
        self.flush()
        if self._sizes is not None and name in self._sizes:
            return self._sizes[name]
        info = self._remote.info(name)  # another process may have made it since the listing
        return None if info is None else info.num_bytes

    def listing(self, prefix: str = "") -> dict[str, int]:
        self.flush()
        if self._sizes is None:
            self._sizes = {name: info.num_bytes for name, info in self._remote.listing().items()}
        return {name: size for name, size in sorted(self._sizes.items()) if name.startswith(prefix)}

    def fetch(self, name: str, *, num_bytes: int | None = None, checksum: str | None = None) -> Path:
        self._here()
        if name.endswith(TAR):
            assert num_bytes is not None, "a shard is fetched by what the lists state of it"
            assert checksum is not None, "a shard is fetched by what the lists state of it"
            return self._hold(Listed(name, num_bytes, checksum)).path
        return self._fetch_newest(name) if checksum is None else self._fetch_list(name, num_bytes, checksum)

    @contextmanager
    def using(self, file: Listed) -> Iterator[Path]:
        self._here()
        held = self._hold(file, users=1)
        try:
            yield held.path
        finally:
            with self._changed:
                held.users -= 1

    def holds(self, name: str) -> bool:
        return self._process == os.getpid() and name in self._held

    def _fetch_newest(self, name: str) -> Path:
        """A list that nothing vouches for but itself: as the server has it now."""
        path = self.root / name
        info = self._remote.info(name) if path.is_file() else None
        if info is not None and info.changed is not None and _is_that(path, info.num_bytes, info.changed):
            return path
        try:
            data = self._remote.read(name)
        except MissingError as error:
            raise self._missing(name) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, since other processes may be doing the same.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=atomic.PART, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
        return path

    def _fetch_list(self, name: str, num_bytes: int | None, checksum: str) -> Path:
        path = self.root / name
        while (name, checksum) not in self._verified or not path.is_file():
            if path.is_file() and schema.file_checksum(path) == checksum:
                self._verified.add((name, checksum))
                break
            if num_bytes is None:
                info = self._remote.info(name)
                if info is None:
                    raise self._missing(name)
                num_bytes = info.num_bytes or len(self._remote.read(name))  # some web servers do not say
            if (part := shard_cache.begin(path, wait=True)) is not None:
                if path.is_file() and schema.file_checksum(path) == checksum:  # another process was here
                    part.give_up()
                    continue
                self._download(Listed(name, num_bytes, checksum), part)
                if (handle := part.finish()) is not None:
                    os.close(handle)
        return path

    def _hold(self, file: Listed, users: int = 0) -> _Held:
        """Fetch a shard unless it is here, and keep it from being removed."""
        with self._changed:
            if (held := self._held.get(file.name)) is not None and held.checksum == file.checksum:
                self._held.move_to_end(file.name)
                held.users += users
                return held
        if (self.root / file.name).is_file():
            self.flush()  # made here, and on its way there
        fetched = self._obtain(file, urgent=True)
        assert fetched is not None
        return self._keep(file.name, fetched, users)

    def _keep(self, name: str, fetched: _Held, users: int = 0) -> _Held:
        """Note what was fetched; what another thread has fetched meanwhile is that one."""
        with self._changed:
            held = self._held.get(name)
            if held is not None and held.checksum == fetched.checksum:
                os.close(fetched.handle)
            else:
                if held is not None:
                    os.close(held.handle)
                self._held[name] = held = fetched
            self._held.move_to_end(name)
            held.users += users
            self._let_go(keep=RECENT)
            self._changed.notify_all()
            return held

    def _let_go(self, *, keep: int, announced: bool = False) -> bool:
        """Let the shards used longest ago go, until `keep` are left that nobody announced. With `announced`, where
        there are none, the announced one that is needed last. Whether any was let go. Needs the lock."""
        free = [name for name, held in self._held.items() if name not in self._ahead and not held.users]
        going = free[: max(len(free) - keep, 0)]
        if not going and announced:
            there = [name for name in self._ahead if name in self._held and not self._held[name].users]
            going = there[-1:]
        for name in going:
            os.close(self._held.pop(name).handle)
        return bool(going)

    def _obtain(self, file: Listed, *, urgent: bool) -> _Held | None:
        """A shard that is here or is fetched now. None, unless it is urgent, where another process is fetching it or
        there is no room for it."""
        path = self._shards / file.name
        while True:
            if (handle := shard_cache.hold(path, file.num_bytes)) is not None:
                if (file.name, file.checksum) in self._verified or schema.file_checksum(path) == file.checksum:
                    self._verified.add((file.name, file.checksum))
                    return _Held(path, file.checksum, handle)
                os.close(handle)
            if (part := shard_cache.begin(path, wait=urgent)) is None:
                if not urgent:
                    return None
                continue
            try:
                if path.is_file():
                    if path.stat().st_size == file.num_bytes and schema.file_checksum(path) == file.checksum:
                        part.give_up()  # fetched by another process since this one looked
                        continue
                    path.unlink(missing_ok=True)  # another version of it, or damaged on this disk
                if not self._cache.make_room(part, file.num_bytes, lambda: self._make_room(urgent), crowd=urgent):
                    part.give_up()
                    return None
            except BaseException:
                part.give_up()
                raise
            self._download(file, part)
            if (handle := self._cache.finish(part)) is not None:
                self._verified.add((file.name, file.checksum))
                return _Held(path, file.checksum, handle)

    def _make_room(self, urgent: bool) -> bool:
        with self._changed:
            return self._let_go(keep=0, announced=urgent)

    def _download(self, file: Listed, part: Part) -> None:
        """Fetch a file into `part`, which is given up where that fails."""
        try:
            for attempt in range(DOWNLOADS_OF_ONE_FILE):
                os.ftruncate(part.handle, file.num_bytes)
                running, start, wrong = xxhash.xxh3_128(), 0, ""
                try:
                    for piece in self._remote.pieces(file.name, file.num_bytes):
                        os.pwrite(part.handle, piece, start)
                        running.update(piece)
                        start += len(piece)
                except OtherSizeError as size:
                    wrong = f"it has {size} bytes instead of {file.num_bytes}"
                else:
                    if running.hexdigest() == file.checksum:
                        return
                    wrong = "its bytes do not have the checksum that the cache states"
                if attempt + 1 < DOWNLOADS_OF_ONE_FILE:
                    warn(f"{self.url}/{file.name} came altered ({wrong}); fetching it again")
                    time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
            raise CacheError(
                f"{self.url}/{file.name} was altered: {wrong}, however often it is fetched; "
                "`make repair` encodes again what is damaged."
            )
        except BaseException as error:
            part.give_up()
            if isinstance(error, MissingError):
                raise self._missing(file.name) from error
            if isinstance(error, OSError) and (refusal := disk_full(error, f"keeping {file.name} in {part.path}")):
                raise UserError(f"{refusal} Or lower remote.shard_cache_bytes, or choose another remote.folder.") from (
                    error
                )
            raise

    def _missing(self, name: str) -> CacheError:
        return CacheError(f"{self.url}/{name} is missing; {schema.MEND}")

    # Reading ahead

    def fetch_ahead(self, files: Sequence[Listed]) -> None:
        self._here()
        with self._changed:
            self._ahead = {file.name: file for file in files}
            self._taken &= set(self._ahead)
            self._let_go(keep=RECENT)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            while self._ahead and len(self._threads) < self.options.downloads:
                thread = threading.Thread(target=self._work_ahead, name="fetch-ahead", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def _work_ahead(self) -> None:
        later: dict[str, float] = {}
        while True:
            with self._changed:
                if not self._ahead:
                    self._threads.remove(threading.current_thread())
                    return
                now = time.monotonic()
                file = self._next_ahead({name for name, when in later.items() if when > now})
                if file is None:
                    later = {name: when for name, when in later.items() if when > now}
                    self._changed.wait(timeout=0.1 if later else None)
                    continue
                self._taken.add(file.name)
            try:
                fetched = self._obtain(file, urgent=False)
            except UserError:
                continue  # it stays taken: who reads it tries again, and says what is wrong
            if fetched is not None:
                self._keep(file.name, fetched)
            else:
                later[file.name] = time.monotonic() + 0.2
            with self._changed:
                self._taken.discard(file.name)

    def _next_ahead(self, later: Set[str]) -> Listed | None:
        """The first announced shard that is neither here nor being fetched; of those that fit into the local folder
        together, so that none drives out one that is needed before it. Needs the lock."""
        room = self.options.shard_cache_bytes
        for name, file in self._ahead.items():
            room -= file.num_bytes
            if room < 0:
                return None
            if name not in self._held and name not in self._taken and name not in later:
                return file
        return None

    # Writing

    def check_writable(self) -> None:
        self._remote.check_writable()

    def synchronize(self) -> None:
        self._here()
        self.check_writable()
        self.flush()
        there = self._remote.listing()
        for name in sorted(name for name, _ in _files(self.root) if name.endswith(TAR)):
            index = name.removesuffix(TAR) + ".parquet"
            if index in there:
                (self.root / name).unlink()  # another machine has finished it
            elif (self.root / index).is_file():
                self.finished(name)
                self.finished(index)
        self.refresh()
        for name, _ in _files(self.root):
            if name.endswith(_LISTS) and name not in (self._sizes or {}):
                (self.root / name).unlink()  # of a cache that was there once

    def refresh(self) -> None:
        self.flush()
        there = self._remote.listing()
        self._sizes = {name: info.num_bytes for name, info in there.items()}
        wanted = queue.SimpleQueue[str]()
        for name, info in there.items():
            if name.endswith(_LISTS) and PurePosixPath(name).parts[0] not in _NOT_MIRRORED:
                path = self.root / name
                if not path.is_file() or info.changed is None or not _is_that(path, info.num_bytes, info.changed):
                    wanted.put(name)
        self._mirror(wanted, there)

    def _mirror(self, wanted: queue.SimpleQueue[str], there: Mapping[str, Info]) -> None:
        """Fetch these lists, several at a time."""
        failed: list[BaseException] = []

        def work() -> None:
            while not failed:
                try:
                    name = wanted.get_nowait()
                except queue.Empty:
                    return
                try:
                    path = self.root / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    atomic.write_bytes(path, self._remote.read(name))
                    _set_changed(path, there[name].changed)
                except MissingError:
                    continue  # removed since it was listed
                except BaseException as error:
                    failed.append(error)

        threads = [threading.Thread(target=work, name="mirror", daemon=True) for _ in range(self.options.downloads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def finished(self, name: str) -> None:
        self._here()
        self._raise_failed()
        if self._uploader is None:
            self._uploader = threading.Thread(target=self._upload, name="upload", daemon=True)
            self._uploader.start()
        self._waiting.put(name)

    def flush(self) -> None:
        self._here()
        self._waiting.join()
        self._raise_failed()

    def _raise_failed(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _upload(self) -> None:
        while True:
            name = self._waiting.get()
            try:
                if self._failed is None:  # else an index could come to a tar that is not there
                    self._upload_one(name)
            except BaseException as error:  # handed to whoever asks next; this thread goes on emptying the queue
                self._failed = error
            finally:
                self._waiting.task_done()

    def _upload_one(self, name: str) -> None:
        path = self.root / name
        info = self._remote.write(path, name)
        _set_changed(path, info.changed)
        if self._sizes is not None:
            self._sizes[name] = info.num_bytes
        tar = path.with_suffix(TAR)
        if path.suffix == ".parquet" and tar.is_file():
            kept = self._shards / tar.relative_to(self.root)
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(tar, kept)

    def remove(self, name: str) -> None:
        self._here()
        self.flush()
        self._remote.remove(name)
        for path in (self.root / name, self._shards / name):
            path.unlink(missing_ok=True)
        if self._sizes is not None:
            self._sizes.pop(name, None)

    def close(self) -> None:
        self.fetch_ahead(())
        try:
            self.flush()
        finally:
            with self._changed:
                for held in self._held.values():
                    os.close(held.handle)
                self._held.clear()


_LISTS = (".parquet", ".json")
"""Endings of the lists; what else is in the mirror is this machine's own."""
_NOT_MIRRORED = ("index",)
"""Folders of what publishing makes anew: large, and not needed for it."""


def open_storage(path_or_url: str | Path, options: RemoteOptions | None = None) -> Storage:
    """Where the cache at a path or a URL has its files. Nothing is connected to yet."""
    text = str(path_or_url)
    assert not re.match(r"[a-z][a-z0-9+.-]+:/[^/]", text), f"{text}: a URL went through Path, which drops a slash"
    if "://" not in text:
        return LocalStorage(Path(text))
    if text.startswith(("file://", "local://")):
        return LocalStorage(Path(text.split("://", 1)[1]))
    return RemoteStorage(text, options or RemoteOptions())


def is_remote(path_or_url: str | Path) -> bool:
    """Whether this is a URL of another machine."""
    return "://" in str(path_or_url) and not str(path_or_url).startswith(("file://", "local://"))


def _files(root: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(name, bytes) of the finished files below a folder."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if relative.startswith(prefix) and not name.endswith(atomic.PART) and name != atomic.LOCK:
                yield relative, path.stat().st_size


def _set_changed(path: Path, changed: float | None) -> None:
    """Give a file the time that the server states, so that `_is_that` knows it again."""
    if changed is not None:
        os.utime(path, (changed, changed))


def _is_that(path: Path, num_bytes: int, changed: float) -> bool:
    """Whether the file is the one that the server has: size and time, as rsync has it."""
    stat = path.stat()
    return stat.st_size == num_bytes and abs(stat.st_mtime - changed) < 0.001
