"""Data sets at a URL: what is there, ranges of a file, and a file that is read forwards. The patience is `Remote`'s.

fsspec and the store's own package are imported when the first URL is met.
"""

from __future__ import annotations

import functools
import io
import re
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from shared.errors import UserError

if TYPE_CHECKING:
    from shared.remote import Info, Remote

PATIENCE_SECONDS: Final = 300.0
"""How long a server that does not answer is tried again before the run ends. It is not the image's fault."""
BLOCK_BYTES: Final = 8 << 20
"""Of one request where a file is read forwards."""

_num_bytes: dict[str, int] = {}
"""Of each file that was asked about: with it, an answer that is too short is told from a file that is."""


def is_remote(path: str) -> bool:
    """Whether this is a URL and no path of this machine."""
    return "://" in path


@functools.lru_cache(maxsize=64)
def _remote(folder: str) -> Remote:
    from shared.remote import Remote

    return Remote(folder, PATIENCE_SECONDS)


def _split(url: str) -> tuple[str, str]:
    """The URL of the folder, and the file's name with what a web server is asked beside it."""
    address = url.partition("?")[0] if url.startswith(("http://", "https://")) else url
    folder = address.rpartition("/")[0]
    return folder, url[len(folder) + 1 :]


def info(url: str) -> Info | None:
    """What the store says of a file; None where there is none. Raises `UserError` where it does not answer for long."""
    folder, name = _split(url)
    found = _remote(folder).info(name)
    if found is not None:
        _num_bytes[url] = found.num_bytes
    return found


def files_below(folder: str) -> list[str]:
    """The URLs of all files below a folder, sorted. Raises `UserError` as `info`, and where the store cannot list."""
    folder = folder.rstrip("/")
    return [f"{folder}/{name}" for name in sorted(_remote(folder).listing())]


def glob(pattern: str) -> list[str]:
    """The URLs of the files that match, sorted: `*` and `?` stop at a slash, `**` does not. Raises as `files_below`."""
    folder = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern)
    expression = "".join(words.get(t) or (t.replace("[!", "[^") if len(t) > 1 else re.escape(t)) for t in tokens)
    return [url for url in files_below(folder) if re.fullmatch(expression, url)]


def fetch(url: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`.

    Raises `UserError` where the store does not answer for long, and where the file is no longer there or another one.
    """
    from shared.remote import MissingError, OtherSizeError

    if length == 0:
        return b""
    if url not in _num_bytes:
        info(url)
    folder, name = _split(url)
    try:
        return _remote(folder).piece(name, offset, offset + length, _num_bytes.get(url, offset + length))
    except MissingError as error:
        raise UserError(f"{url} is not there; check the name, and run the same command again when it is") from error
    except OtherSizeError as error:
        raise UserError(
            f"{url} has {error} bytes instead of {_num_bytes.get(url)}: it changed while it was read; run the same "
            "command again"
        ) from error


class RemoteFile(io.RawIOBase):
    """A remote file for readers that want a file. What is read forwards is fetched in blocks, each once; what is larger
    than a block, in one piece."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` where there is no such file."""
        if url not in _num_bytes and info(url) is None:
            raise UserError(f"{url} is not there; check the name, and run the same command again when it is")
        self._url, self._num_bytes, self._position = url, _num_bytes[url], 0
        self._blocks: deque[tuple[int, bytes]] = deque(maxlen=2)
        """Where each begins. Two, for whoever steps back a little."""

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; nothing is fetched."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes, fewer only at the end. Raises as `fetch`."""
        end = self._num_bytes if size is None or size < 0 else min(self._num_bytes, self._position + size)
        pieces = []
        while self._position < end:
            start, block = self._block(end)
            piece = block[self._position - start : end - start]
            pieces.append(piece)
            self._position += len(piece)
        return b"".join(pieces)

    def _block(self, end: int) -> tuple[int, bytes]:
        """The block that holds the position, fetched up to `end` at least where none does."""
        for start, block in self._blocks:
            if start <= self._position < start + len(block):
                return start, block
        stop = min(max(end, self._position + BLOCK_BYTES), self._num_bytes)
        self._blocks.append((self._position, fetch(self._url, self._position, stop - self._position)))
        return self._blocks[-1]

    def readinto(self, buffer: Any) -> int:
        """`read` into a buffer; how many bytes it was."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
