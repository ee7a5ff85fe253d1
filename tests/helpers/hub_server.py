"""A small Hugging Face hub on loopback: what huggingface_hub's client asks for when it downloads a model.

Answers model info, tree listings and file downloads, with the headers and error codes of the real hub. Large files
(*.safetensors) are redirected to a second origin, as the real hub does with its content network. Every request is
recorded. Faults are set on the repository.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class HubRepo:
    """`commits` maps commit hashes to files by name, `branches` names to commit hashes."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    is_gated: bool = False
    announced_sizes: dict[str, int] = field(default_factory=dict)  # instead of the real ones, in listings
    cut_after_bytes: dict[str, list[int]] = field(default_factory=dict)  # per file: break off the next downloads here
    failing_statuses: list[int] = field(default_factory=list)  # answers to the next requests for model info
    failing_message: str = "It failed."
    broken_files: set[str] = field(
        default_factory=set
    )  # whose download fails with status 410, as long as they are here
    bytes_per_s: float = float("inf")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]


class HubServer:
    """`repos` by model id; `requests` in the order of their arrival."""

    def __init__(self) -> None:
        self.repos: dict[str, HubRepo] = {}
        self.requests: list[Request] = []
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler()) for _ in range(2)]
        self.endpoint = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.cdn = f"http://localhost:{self._servers[1].server_port}"

    def add(self, model_id: str, files: dict[str, bytes], **settings: Any) -> HubRepo:
        """Publish a model whose main branch is one commit with these files."""
        commit = hashlib.sha1(model_id.encode()).hexdigest()
        self.repos[model_id] = HubRepo({commit: files}, {"main": commit}, **settings)
        return self.repos[model_id]

    def downloads(self, name: str) -> list[Request]:
        """The GET requests for one file's content."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(f"/{name}")]

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in self._servers]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server, thread in zip(self._servers, threads, strict=True):
                server.shutdown()
                thread.join()
                server.server_close()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(_HubHandler):
            pass

        Handler.hub = hub
        return Handler


class _HubHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        match [unquote(part) for part in path.strip("/").split("/")]:  # an escaped slash is part of a branch's name
            case ["api", "models", owner, name, *rest]:
                self._answer_api(f"{owner}/{name}", *rest)
            case ["cdn", owner, name, commit, *file]:
                self._send_file(self.hub.repos[f"{owner}/{name}"], commit, "/".join(file))
            case [owner, name, "resolve", revision, *file]:
                self._answer_resolve(f"{owner}/{name}", revision, "/".join(file))
            case _:
                self._send(404, b"")

    def _answer_api(self, model_id: str, kind: str = "revision", revision: str = "main") -> None:
        repo = self._find(model_id)
        if repo is None:
            return
        if repo.failing_statuses:
            self._send(repo.failing_statuses.pop(0), b"", {"X-Error-Message": repo.failing_message})
            return
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
            return
        files = [(name, self._listed_size(repo, name, data), data) for name, data in repo.commits[commit].items()]
        if kind == "tree":
            self._send_json([{"type": "file", "path": n, "size": size, "oid": _sha1(data)} for n, size, data in files])
            return
        siblings = [{"rfilename": name, "size": size, "blobId": _sha1(data)} for name, size, data in files]
        self._send_json({"_id": "0", "id": model_id, "sha": commit, "private": False, "siblings": siblings, "tags": []})

    def _answer_resolve(self, model_id: str, revision: str, file: str) -> None:
        repo = self._find(model_id)
        if repo is None:
            return
        if repo.is_gated:
            status = 403 if "Authorization" in self.headers else 401
            self._send(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            return
        commit = repo.branches.get(revision, revision)
        data = repo.commits[commit].get(file)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif file.endswith(".safetensors"):
            headers = {
                "Location": f"{self.hub.cdn}/cdn/{model_id}/{commit}/{file}",
                "X-Linked-Size": str(self._listed_size(repo, file, data)),
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": commit,
            }
            self._send(302, b"", headers)
        else:
            self._send_file(repo, commit, file)

    def _find(self, model_id: str) -> HubRepo | None:
        """The repository; else answers as the hub does: it tells strangers nothing about what is private."""
        if model_id in self.hub.repos:
            return self.hub.repos[model_id]
        status = 404 if "Authorization" in self.headers else 401
        self._send(status, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return None

    def _send_file(self, repo: HubRepo, commit: str, file: str) -> None:
        if file in repo.broken_files:
            self._send(410, b"")
            return
        data = repo.commits[commit][file]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        body = data[start:]
        headers = {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = repo.cut_after_bytes.get(file, [])
        if self.command == "GET" and cuts:
            self._send_start(206 if start else 200, len(body), headers)
            self._write_slowly(body[: cuts.pop(0)], repo.bytes_per_s)
            self.close_connection = True
            return
        self._send_start(206 if start else 200, len(body), headers)
        if self.command == "GET":
            self._write_slowly(body, repo.bytes_per_s)

    def _write_slowly(self, body: bytes, bytes_per_s: float) -> None:
        step = len(body) if bytes_per_s == float("inf") else max(1, int(bytes_per_s / 20))
        for start in range(0, len(body), step or 1):
            self.wfile.write(body[start : start + step])
            self.wfile.flush()
            if start + step < len(body):
                time.sleep(step / bytes_per_s)

    def _listed_size(self, repo: HubRepo, name: str, data: bytes) -> int:
        return repo.announced_sizes.get(name, len(data))

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._send_start(status, len(body), headers or {})
        if self.command == "GET":
            self.wfile.write(body)

    def _send_start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
