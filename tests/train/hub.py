"""A stand-in of the hub on the loopback interface: as much of its HTTP interface as an upload speaks."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "t" * 34


@dataclass
class Hub:
    """Repositories by name, at `url`."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """Repositories that were made, and whether each is private."""
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    """(repository, message, files) of each commit, in order."""
    large: dict[str, bytes] = field(default_factory=dict)
    """Files that are stored beside git, by SHA-256."""
    uploads: int = 0
    """Large files whose bytes were sent."""
    forbidden: bool = False
    """Whether the token may write nothing."""
    failures: int = 0
    """So many of the next commits are refused."""


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub on a free port, until the block ends."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, content: Any, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_POST(self) -> None:
            body, path = self.body(), self.path.partition("?")[0]
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer({"error": "Invalid username or password."}, 401)
            elif path == "/api/repos/create":
                self.create(json.loads(body))
            elif path == "/api/validate-yaml":
                self.validate(json.loads(body)["content"])
            elif path.endswith("/preupload/main"):
                files = [
                    {
                        "path": file["path"], "shouldIgnore": False, "oid": None,
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    }
                    for file in json.loads(body)["files"]
                ]  # fmt: skip
                self.answer({"files": files})
            elif path.endswith(".git/info/lfs/objects/batch"):
                self.batch(json.loads(body)["objects"])
            elif path.endswith("/commit/main"):
                self.commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
            else:
                self.nothing()

        def do_PUT(self) -> None:
            body, name = self.body(), self.path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != name:
                self.answer({"error": "other bytes than announced"}, 400)
                return
            state.large[name] = body
            state.uploads += 1
            self.answer({})

        def do_GET(self) -> None:
            self.nothing()

        def do_HEAD(self) -> None:
            self.nothing()

        def nothing(self) -> None:
            self.answer({"error": "not found"}, 404)

        def create(self, asked: dict[str, Any]) -> None:
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            if state.forbidden:
                self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
            elif name in state.private:
                self.answer({"error": "You already created this model repo", "url": f"{state.url}/{name}"}, 409)
            else:
                state.private[name] = asked.get("private") or asked.get("visibility") == "private"
                self.answer({"url": f"{state.url}/{name}", "name": name, "id": "0"})

        def validate(self, card: str) -> None:
            metadata = yaml.safe_load(card.split("---")[1])
            known = {"license", "library_name"} <= {*metadata}
            errors = [] if known else [{"message": "no licence"}]
            self.answer({"errors": errors, "warnings": []}, 200 if known else 400)

        def batch(self, objects: list[dict[str, Any]]) -> None:
            def actions(oid: str) -> dict[str, Any]:
                return {} if oid in state.large else {"actions": {"upload": {"href": f"{state.url}/large/{oid}"}}}

            self.answer({"transfer": "basic", "objects": [{**item, **actions(item["oid"])} for item in objects]})

        def commit(self, repo: str, body: bytes) -> None:
            if state.failures:
                state.failures -= 1
                self.answer({"error": "the quota is used up"}, 400)
                return
            message, files = "", {}
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    message = value["summary"]
                elif item["key"] == "lfsFile":
                    files[value["path"]] = state.large[value["oid"]]
                else:
                    files[value["path"]] = base64.b64decode(value["content"])
            state.commits.append((repo, message, files))
            oid = hashlib.sha1(body).hexdigest()
            self.answer({"success": True, "commitOid": oid, "commitUrl": f"{state.url}/{repo}/commit/{oid}"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
