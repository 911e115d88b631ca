"""A web server that answers for ranges, counts what it sends, and fails where a test wants it to."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class RangeServer:
    """The files of a folder, at `url`."""

    folder: Path
    url: str = ""
    gets: list[tuple[str, int]] = field(default_factory=list)
    """Name and number of bytes of each answer."""
    failures: int = 0
    """So many of the next answers are an error of the server."""
    cuts: int = 0
    """So many of the next answers break off in the middle."""
    tags: bool = True
    """Whether it says anything by which another version is known."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sent(self, name: str) -> int:
        """Bytes of a file that were sent."""
        return sum(size for sent, size in self.gets if sent == name)


@contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    """A server on a free port of the loopback interface, until the block ends."""
    state = RangeServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            name = self.path.lstrip("/").partition("?")[0]
            with state.lock:
                fails, cut = state.failures > 0 and with_body, state.cuts > 0 and with_body
                state.failures -= fails
                state.cuts -= cut and not fails
            if fails:
                self.send_error(503)
                return
            if not (state.folder / name).is_file():
                self.send_error(404)
                return
            content = (state.folder / name).read_bytes()
            body, code = content, 200
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                body = content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
                code = 206
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Accept-Ranges", "bytes")
            if state.tags:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:16]}"')
            if code == 206:
                first = int(wanted[1]) if wanted else 0
                self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(content)}")
            self.end_headers()
            if with_body and cut:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
            elif with_body:
                with state.lock:
                    state.gets.append((name, len(body)))
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
