"""A small stand-in for the Hub's HTTP API on loopback, so that the real client can push and pull without a network.

Written from what huggingface_hub sends: making a repository and a branch, refs, commits, the tree, preupload, LFS batch
and PUT, commit, validation of a card, and resolve with ranges. Parquet files are LFS, others git blobs. Of the tokens
`writer` may do all and `reader` may read; without one only public repositories are there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

FIRST = "0" * 40


@dataclass
class Repository:
    """Branches, newest state only: path -> content."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})


@dataclass
class Fault:
    """What happens to the next request of this method whose path starts so."""

    method: str
    start: str
    status: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    """The connection is cut instead of an answer; with `late`, after the request has been carried out."""
    late: bool = False
    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class HubStandIn:
    """`url` of the endpoint, what it holds, what was asked, and the faults that tests ask for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.ignored: str = "no such file"
        self.quota = 1 << 40
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()

    def asked(self, method: str, start: str) -> list[str]:
        """Paths of the requests so far."""
        return [path for asked, path in self.requests if asked == method and path.startswith(start)]


def serve() -> Iterator[HubStandIn]:
    """A stand-in for as long as a fixture needs it."""
    hub = HubStandIn()
    yield hub
    hub.stop()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(status, code)
        self.status, self.code, self.headers = status, code, headers or {}


class _Cut(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the client's delayed acknowledgment holds each body for 40 ms
    hub: HubStandIn
    _cut_answer = False

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append((self.command, path))
        try:
            self._meet_fault(path)
            for method, pattern, answer in _ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    return answer(self, body, **match.groupdict())
            raise _Refused(404, "EntryNotFound")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, **refused.headers}
            self._send(json.dumps({"error": refused.code}).encode(), refused.status, headers)
        except _Cut:
            self._cut()

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _meet_fault(self, path: str) -> None:
        for fault in self.hub.faults:
            if fault.method == self.command and path.startswith(fault.start) and fault.times > 0:
                fault.times -= 1
                fault.arrived.set()
                if fault.late:
                    self._cut_answer = True
                    return
                if fault.cut:
                    raise _Cut
                if not fault.status:
                    fault.released.wait(60)
                raise _Refused(fault.status or 500, headers=fault.headers)

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self._cut_answer:
            self._cut_answer = False
            return self._cut()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # a client that was killed
                self.wfile.write(data)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _require_writer(self) -> None:
        if self._token() != "writer":
            raise _Refused(403 if self._token() == "reader" else 401)

    def _files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and self._token() not in ("writer", "reader")):
            raise _Refused(404 if self._token() else 401, "RepoNotFound")
        if revision not in repository.branches:
            raise _Refused(404, "RevisionNotFound")
        return repository.branches[revision]

    def create(self, body: bytes) -> None:
        self._require_writer()
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._json({"url": f"{self.hub.url}/datasets/{name}"}, status=409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[name] = Repository(private=private)
        return self._json({"url": f"{self.hub.url}/datasets/{name}"})

    def facts(self, _: bytes, repo: str, revision: str = "main") -> None:
        self._files(repo, revision)
        self._json({"id": repo, "sha": FIRST, "siblings": [], "tags": [], "private": False})

    def refs(self, _: bytes, repo: str) -> None:
        self._files(repo)
        names = self.hub.repositories[repo].branches
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": FIRST} for name in names]
        self._json({"branches": branches, "converts": [], "tags": []})

    def commits(self, _: bytes, repo: str, revision: str) -> None:
        self._files(repo, revision)
        self._json([{"id": FIRST, "authors": [], "date": "2024-01-01T00:00:00.000Z", "title": "", "message": ""}])

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        self._require_writer()
        assert json.loads(body)["startingPoint"] == FIRST
        self.hub.repositories[repo].branches[revision] = {".gitattributes": b""}
        self._json({})

    def tree(self, _: bytes, repo: str, revision: str, folder: str = "") -> None:
        files = {name: data for name, data in self._files(repo, revision).items() if name.startswith(folder)}
        if folder and not files:
            raise _Refused(404, "EntryNotFound")
        entries: dict[str, dict[str, Any]] = {}
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["False"])[0].lower() in ("true", "1")
        for name, data in files.items():
            below = name.removeprefix(folder).lstrip("/")
            if "/" in below and not recursive:
                path = f"{folder}/{below.split('/')[0]}".lstrip("/")
                entries[path] = {"type": "directory", "path": path, "oid": FIRST, "size": 0}
            else:
                entries[name] = _file_entry(name, data)
        self._json(list(entries.values()))

    def paths_info(self, body: bytes, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        self._json([_file_entry(name, files[name]) for name in parse_qs(body.decode())["paths"] if name in files])

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._require_writer()
        there = self._files(repo, revision)
        answer = []
        for file in json.loads(body)["files"]:
            name = file["path"]
            mode = "lfs" if _is_large(name) else "regular"
            oid = _file_entry(name, there[name])["oid"] if name in there else None
            ignored = name.endswith(self.hub.ignored)
            answer.append({"path": name, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self._json({"files": answer})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._require_writer()
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["size"] > self.hub.quota:
                item["error"] = {"code": 403, "message": "storage quota exceeded"}
            elif item["oid"] not in self.hub.large:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self._json({"objects": objects, "transfer": "basic"})

    def lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._send(b"")

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        self._require_writer()
        files = self._files(repo, revision)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self._json({"commitUrl": f"{self.hub.url}/datasets/{repo}/commit/{FIRST}", "commitOid": FIRST})

    def validate(self, body: bytes) -> None:
        refused = "not: [valid" in json.loads(body)["content"]
        answer = {"errors": [{"message": "bad yaml"}] if refused else [], "warnings": []}
        self._json(answer, 400 if refused else 200)

    def resolve(self, _: bytes, repo: str, revision: str, name: str) -> None:
        data = self._files(repo, revision).get(name)
        if data is None:
            raise _Refused(404, "EntryNotFound")
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            part = data[int(asked[1]) : int(asked[2]) + 1]
            return self._send(part, 206, {"Content-Range": f"bytes {asked[1]}-{asked[2]}/{len(data)}"})
        return self._send(data)


def _is_large(name: str) -> bool:
    return name.endswith(".parquet")


def _file_entry(name: str, data: bytes) -> dict[str, Any]:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(data).hexdigest()}\n".encode()
    stored = pointer + b"size %d\n" % len(data) if _is_large(name) else data
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
    if _is_large(name):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": len(stored)}
    return entry


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = f"/api/datasets/{_REPO}"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("GET", f"{_API}/commits/(?P<revision>[^/]+)", _Handler.commits),
    ("POST", f"{_API}/branch/(?P<revision>[^/]+)", _Handler.branch),
    ("GET", f"{_API}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", f"{_API}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Handler.tree),
    ("POST", f"{_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", f"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"{_API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", f"{_API}/revision/(?P<revision>[^/]+)", _Handler.facts),
    ("GET", _API, _Handler.facts),
    ("POST", rf"/datasets/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET HEAD", f"/datasets/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
]
