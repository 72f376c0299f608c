"""As much of the Hugging Face Hub as a download asks of it: revisions, trees and files of models, on a local port.

Each model is a folder; what was asked for is kept. A model named in `gated` is refused as the Hub refuses it, and a
file named in `slow` never comes whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

COMMIT = "c0ffee" * 6 + "c0de"


class HubServer:
    """Serves `models`, name -> folder, at `endpoint`; every model has the revisions main and v1."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.slow: set[str] = set()
        self.requests: list[str] = []
        self.halted = threading.Event()
        self.waiting = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.halted.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def files_fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {path.rpartition("/")[2] for path in self.requests if path.startswith("GET") and "/resolve/" in path}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def _serve(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        name, revision = (found[1], api[3] if api else found[2]) if found else ("", "")
        if name in self.hub.gated:
            return self._refuse(403, "GatedRepo")
        if name not in self.hub.models:
            return self._refuse(404, "RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        folder = self.hub.models[name]
        if api and api[2] == "revision":
            return self._send(json.dumps({"id": name, "modelId": name, "sha": COMMIT, "siblings": []}).encode())
        if api:
            entries = [_entry(entry, folder) for entry in sorted(folder.rglob("*")) if entry.is_file()]
            return self._send(json.dumps(entries).encode())
        assert file is not None
        content = (folder / file[3]).read_bytes()
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT}
        self._send(content, headers, with_body, slow=file[3] in self.hub.slow)

    def _refuse(self, code: int, reason: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(
        self, body: bytes, headers: dict[str, str] | None = None, with_body: bool = True, slow: bool = False
    ) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and slow:
            self.wfile.write(body[:1])
            self.hub.waiting.set()
            self.hub.halted.wait(60)
            self.close_connection = True
        elif with_body:
            self.wfile.write(body)


def _entry(path: Path, folder: Path) -> dict[str, object]:
    content = path.read_bytes()
    name = path.relative_to(folder).as_posix()
    return {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
