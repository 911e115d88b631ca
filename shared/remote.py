"""Bytes to and from a URL (s3://, gs://, hf://, https:// ...), with patience: what passes by itself is waited for.

A server that restarts, a connection that breaks in the middle of a file, an answer that is cut short: all is tried
again, with growing pauses, for as long as `patience_seconds` says. What does not pass by itself (credentials, a bucket
that is not there) is refused at once.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec

from shared.atomic import PART
from shared.errors import UserError
from shared.report import say, warn

T = TypeVar("T")

PIECE_BYTES = 16 << 20
"""What is asked for at once: so much is lost where a connection breaks in the middle of a file."""
READ_ONLY = ("http", "https")
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 10.0
ANOTHER_OUTAGE_SECONDS = 120
"""So long after the last failure, the next one begins another outage. More than any call takes to fail."""
_WHOLE_OR_ABSENT = ("s3", "s3a", "gs", "gcs", "hf", "abfs", "abfss", "az", "oss", "oci")
"""Stores whose uploads are seen when they are complete and not before. On others a file is written beside its name."""
_LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "httpcore", "httpx", "requests", "urllib3")
"""Whose errors are the network's."""
_HOW_TO_ENTER = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (a public bucket: FSSPEC_S3_ANON=true)",
    "gs": "run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "run `hf auth login` or set HF_TOKEN",
}


class Info(NamedTuple):
    """What a store says of a file."""

    num_bytes: int
    changed: float | None
    """Seconds since 1970; None where the store does not say."""
    version: str | None
    """An ETag or the like: whenever the bytes change, so does it. None where the store has none."""


class MissingError(Exception):
    """There is no file of this name; the text says how the store put it."""


class Remote:
    """The files below a URL. Threads may share it; a process that is given one connects anew."""

    def __init__(self, url: str, patience_seconds: float) -> None:
        """Nothing is connected to yet. `patience_seconds`: how long a call tries again before it raises `UserError`."""
        self.url, self.patience_seconds = url.rstrip("/"), patience_seconds
        self.protocol = url.split("://", 1)[0]
        self._connect()

    def _connect(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._connected: tuple[Any, str] | None = None
        self._out_since: float | None = None
        self._last_failure = 0.0
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self.url, self.patience_seconds)

    @property
    def shown(self) -> str:
        """The URL as messages show it: without a password."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def writable(self) -> bool:
        """Whether files can be put there at all."""
        return self.protocol not in READ_ONLY

    def read(self, name: str) -> bytes:
        """A whole file, for small ones. Raises `MissingError`."""
        return self._patiently(name, lambda fs, path: fs.cat_file(f"{path}/{name}"))

    def pieces(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """A file of `num_bytes`, piece by piece; each is asked for again until it is whole. Raises `MissingError`, and
        `OtherSizeError` where the file's size is another one."""
        start = 0
        while start < num_bytes:
            stop = min(start + PIECE_BYTES, num_bytes)
            piece = self._from(name, start, stop, num_bytes)
            yield piece
            start += len(piece)

    def piece(self, name: str, start: int, stop: int, num_bytes: int) -> bytes:
        """Bytes `start` to `stop` of a file of `num_bytes`. Raises as `pieces`."""
        return self._from(name, start, stop, num_bytes)[: stop - start]

    def _from(self, name: str, start: int, stop: int, num_bytes: int) -> bytes:
        """`piece`, or all from `start` on where the server sends nothing less."""

        def ask(fs: Any, path: str) -> bytes:
            try:
                data: bytes = fs.cat_file(f"{path}/{name}", start=start, end=stop)
            except Exception as error:
                if _status(error) == 416:  # nothing is there from this byte on
                    raise OtherSizeError(f"fewer than {start + 1}") from error
                raise
            if len(data) == num_bytes > stop - start:
                return data[start:]  # a server that cannot do ranges sends everything
            if len(data) != stop - start:
                if (is_now := self._info(fs, f"{path}/{name}").num_bytes) != num_bytes:
                    raise OtherSizeError(str(is_now))
                raise ConnectionError(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return self._patiently(name, ask)

    def info(self, name: str) -> Info | None:
        """What the store says of a file; None where there is none."""
        try:
            return self._patiently(name, lambda fs, path: self._info(fs, f"{path}/{name}"))
        except MissingError:
            return None

    def listing(self) -> dict[str, Info]:
        """Every file, by its name relative to the URL. A web server cannot say: `UserError`."""
        if self.protocol in READ_ONLY:
            raise UserError(f"{self.shown} is a web server's: it can be read, but not listed")

        def find(fs: Any, path: str) -> dict[str, Info]:
            fs.invalidate_cache()
            found = fs.find(path, detail=True)
            return {name[len(path) + 1 :]: _info_of(info) for name, info in found.items()}

        try:
            return self._patiently("", find)
        except MissingError as error:
            raise self._no_such_store(str(error)) from error

    def write(self, local: Path, name: str) -> Info:
        """Put a file there, whole or not at all. What the store then says of it comes back."""
        self.check_writable()
        num_bytes = local.stat().st_size

        def put(fs: Any, path: str) -> Info:
            # Small parts, few at once: 64 MiB in memory. Whoever dies here leaves parts that no reader sees.
            options: dict[str, Any] = {"chunksize": PIECE_BYTES} if self.protocol in ("s3", "s3a") else {}
            if self.protocol in _WHOLE_OR_ABSENT:
                fs.put_file(str(local), f"{path}/{name}", **options)
            else:
                fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
                fs.put_file(str(local), f"{path}/{name}{PART}")
                fs.mv(f"{path}/{name}{PART}", f"{path}/{name}")
            fs.invalidate_cache()
            there = self._info(fs, f"{path}/{name}")
            if there.num_bytes != num_bytes:
                raise ConnectionError(f"{there.num_bytes} bytes arrived of {num_bytes}")
            return there

        try:
            return self._patiently(name, put)
        except MissingError as error:
            raise self._no_such_store(str(error)) from error

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self.check_writable()
        try:
            self._patiently(name, lambda fs, path: fs.rm_file(f"{path}/{name}"))
        except MissingError:
            return

    def check_writable(self) -> None:
        """Raises `UserError` where nothing can be written."""
        if not self.writable:
            raise UserError(
                f"{self.shown} is a web server's: a cache can be read from it, not written to it; "
                "write it to a folder, s3://, gs:// or hf://, and serve that"
            )

    def _no_such_store(self, reason: str) -> UserError:
        return UserError(f"{self.shown}: there is no such bucket or repository ({reason}); create it, or mend the URL")

    def _info(self, fs: Any, path: str) -> Info:
        try:
            return _info_of(fs.info(path))
        except FileNotFoundError as error:
            # fsspec's web file system says this of a server that is down, too.
            if isinstance(error.__cause__, Exception) and _kind(error.__cause__) != "absent":
                raise error.__cause__ from None
            raise

    def _file_system(self) -> tuple[Any, str]:
        with self._lock:
            if self._connected is None:
                self._connected = _connected(self.url, self.protocol)
            return self._connected

    def _patiently(self, name: str, call: Callable[[Any, str], T]) -> T:
        """`call` with the file system and its path of the URL, again and again while it fails for a passing reason."""
        if self._process != os.getpid():
            self._connect()  # forked: threads, locks and connections are the parent's
        began: float | None = None
        for attempt in itertools.count():
            try:
                result = call(*self._file_system())
            except Exception as error:
                kind = _kind(error)
                where = f"{self.shown}/{name}" if name else self.shown
                if kind == "absent":
                    if "bucket" in str(error) and "exist" in str(error):
                        raise self._no_such_store(_reason(error)) from error
                    raise MissingError(_reason(error)) from error
                if kind == "refused":
                    how = next((how for key, how in _HOW_TO_ENTER.items() if self.protocol.startswith(key)), None)
                    raise UserError(
                        f"{where}: no permission ({_reason(error)})" + (f"; {how}" if how else "")
                    ) from error
                if kind == "lasting":
                    raise UserError(f"{where} cannot be had: {_reason(error)}") from error
                if kind is None:
                    raise
                now = time.monotonic()
                began = now if began is None else began
                spent = max(now - began, now - self._failed(now, error, attempt))
                if spent >= self.patience_seconds:
                    raise UserError(
                        f"{where} was not reachable for {spent:.0f} s ({_reason(error)}). What is finished is kept: "
                        "check the network and the server, then run the same command again."
                    ) from error
                pause = min(FIRST_PAUSE_SECONDS * 2 ** min(attempt, 16), LONGEST_PAUSE_SECONDS)
                time.sleep(min(pause * random.uniform(0.5, 1), self.patience_seconds - spent))
            else:
                self._succeeded()
                return result
        raise AssertionError

    def _failed(self, now: float, error: Exception, attempt: int) -> float:
        """Note a failure; when this outage began comes back. Many threads meet one outage, which is told once."""
        with self._lock:
            if self._out_since is None or now - self._last_failure > ANOTHER_OUTAGE_SECONDS:
                self._out_since, self._warned = now, False
            self._last_failure = now
            if attempt and not self._warned:  # once is nothing: a busy store says so now and then
                self._warned = True
                seconds = f"{self.patience_seconds:.0f} s"
                warn(f"{self.shown} is not reachable ({_reason(error)}): trying again for up to {seconds}")
            return self._out_since

    def _succeeded(self) -> None:
        if self._out_since is None:
            return
        with self._lock:
            if self._warned and self._out_since is not None:
                say(f"{self.shown} is reachable again after {time.monotonic() - self._out_since:.0f} s")
            self._out_since, self._warned = None, False


class OtherSizeError(Exception):
    """The file has another size than it should have; the text says which."""


def _connected(url: str, protocol: str) -> tuple[Any, str]:
    """A file system of this process's own, and its path of the URL."""
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    configured = fsspec.config.conf.get(protocol, {})
    if protocol in ("s3", "s3a"):
        ours = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 1}}
        options |= {"max_concurrency": 4, "config_kwargs": {**ours, **configured.get("config_kwargs", {})}}
    try:
        if protocol in READ_ONLY:
            import aiohttp

            # No limit for a whole answer, which may be long, but for every wait in it.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
            options["client_kwargs"] = {"timeout": timeout, **configured.get("client_kwargs", {})}
        file_system, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gc": "gcsfs", "ht": "aiohttp"}.get(protocol[:2])
        what = f"the package {package}: pip install {package}" if package else f"another package: {error}"
        raise UserError(f"{protocol}:// needs {what}") from error
    except ValueError as error:
        raise UserError(f"{url} cannot be used ({error}); what can: a folder, s3://, gs://, hf://, https://") from error
    if protocol in ("s3", "s3a"):
        file_system.retries = 1  # ours are longer, and say what they do
    return file_system, path


def _info_of(info: dict[str, Any]) -> Info:
    names = ("LastModified", "Last-Modified", "updated", "last_modified", "mtime")
    changed: Any = next((info[name] for name in names if info.get(name)), None)
    if isinstance(changed, str):
        try:
            changed = parsedate_to_datetime(changed) if "," in changed else datetime.fromisoformat(changed)
        except ValueError:
            changed = None
    if isinstance(changed, datetime):
        changed = changed.timestamp()
    tags = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "content_md5", "blob_id")
    version = next((f"{tag} {info[tag]}" for tag in tags if info.get(tag)), None)
    return Info(int(info["size"] or 0), changed if isinstance(changed, int | float) else None, version)


def _kind(error: BaseException) -> Literal["absent", "refused", "lasting", "passing"] | None:
    """What kind of failure this is; None where it is none of the network's."""
    names = {kind.__name__ for kind in type(error).__mro__}
    status = _status(error)
    if isinstance(error, UserError | OtherSizeError):
        return None
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "absent"
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        return "refused"
    if any("Credential" in name for name in names):
        return "refused"
    if status is not None and status < 500 and status not in (408, 425, 429):
        return "lasting"
    if status is not None:
        return "passing"
    if names & {"OfflineModeIsEnabled", "ParamValidationError", "ProfileNotFound", "InvalidURL"}:
        return "lasting"
    if isinstance(error, OSError | EOFError | TimeoutError):
        return "passing"
    return "passing" if type(error).__module__.startswith(_LIBRARIES) else None


def _status(error: BaseException) -> int | None:
    """The HTTP status that the error, or the one it came from, carries."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):  # botocore's
            candidates = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
        else:
            candidates = [getattr(response, "status_code", None), vars(seen).get("status"), vars(seen).get("code")]
        for candidate in candidates:
            if isinstance(candidate, int | str) and str(candidate).isdigit() and 100 <= int(candidate) < 600:
                return int(candidate)
        seen = seen.__cause__
    return None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
