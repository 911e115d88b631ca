"""Real servers on the loopback interface: nginx, which answers for ranges, and moto's, which speaks S3. They can be
killed and started again."""

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
from pathlib import Path

import fsspec
import pytest

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt install nginx-light)")


def unused_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nginx:
    """nginx on a folder of its own: `root` is served, or `upstream` is passed on to."""

    def __init__(self, folder: Path, upstream: str | None = None) -> None:
        self.folder, self.root, self.upstream = folder, folder / "root", upstream
        self.root.mkdir(parents=True)
        self.port = unused_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> list[str]:
        """One line for each answer: method, path, range, status, body bytes."""
        path = self.folder / "access.log"
        return path.read_text().splitlines() if path.is_file() else []

    def requests(self, name: str, method: str = "GET") -> list[str]:
        """The lines about one file."""
        return [line for line in self.log if re.match(rf"{method} \S*/{re.escape(name)} ", line)]

    def start(self, *directives: str) -> None:
        """Start, with directives of the server block (`limit_rate 1m`), and wait until it answers."""
        where = f"proxy_pass {self.upstream}; proxy_set_header Host $http_host;" if self.upstream else ""
        more = " ".join(text if text.endswith("}") else f"{text};" for text in directives)
        temporary = "".join(
            f"{kind}_temp_path {self.folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (self.folder / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {self.folder}/pid; error_log {self.folder}/error.log;\n"
            "events {}\n"
            "http {\n"
            "  log_format plain '$request_method $uri $http_range $status $body_bytes_sent';\n"
            f"  access_log {self.folder}/access.log plain; {temporary} client_max_body_size 0;\n"
            f"  server {{ listen 127.0.0.1:{self.port}; root {self.root}; {more} location / {{ {where} }} }}\n"
            "}\n"
        )
        assert NGINX is not None
        command = [NGINX, "-c", str(self.folder / "nginx.conf"), "-e", str(self.folder / "error.log")]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for_port(self.port, self._process)

    def kill(self) -> None:
        """SIGKILL: every connection breaks, and new ones are refused."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def nginx(folder: Path, *directives: str, upstream: str | None = None) -> Iterator[Nginx]:
    """A started nginx, killed at the end."""
    server = Nginx(folder, upstream)
    server.start(*directives)
    try:
        yield server
    finally:
        server.kill()


BUCKET = "bucket"


def use_s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// is at this server from now on, for this process and those that it starts; with a bucket."""
    environment = {
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "FSSPEC_S3_ENDPOINT_URL": endpoint,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})  # it has read the environment already
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    if not files.exists(BUCKET):
        files.mkdir(BUCKET)


@contextmanager
def s3_server(environment: dict[str, str] | None = None) -> Iterator[str]:
    """The URL of an S3 server, a process of its own; its buckets end with it."""
    port = unused_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until something listens there."""
    for _ in range(1200):
        assert process.poll() is None, "the server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server did not start")
