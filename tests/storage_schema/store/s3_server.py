"""A real S3 protocol server on loopback: moto behind a front that can fail or hold a request, as a network does.

The front lets one request through at a time: S3's conditional PUT is atomic, moto's looks first and writes then.

moto is imported when a server starts, not when tests are collected: it brings Flask, whose proxies raise whenever
someone looks at them, and vLLM looks at every object of every imported module when an engine starts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import fsspec
import pytest

_ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"


@dataclass
class Fault:
    """What happens to `times` requests of this method whose path ends so, `after` so many of them."""

    method: str
    ending: str
    status: str = ""
    code: str = ""
    applied: bool = False
    held: bool = False
    times: int = 1
    after: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class S3Server:
    """`url` of the endpoint, `requests` so far (method, path), prefixes of the `lists` among them, and the faults that
    tests ask for."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, type: str, message: str, *args: Any) -> None:
                """Nothing on the terminal."""

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self._one_at_a_time = threading.Lock()
        self._faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lists: list[str] = []
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()

    def forget(self) -> None:
        """No faults, and no requests so far."""
        self._faults.clear()
        self.requests.clear()
        self.lists.clear()

    def fail(
        self,
        method: str,
        ending: str,
        status: str,
        code: str,
        *,
        applied: bool = False,
        held: bool = False,
        times: int = 1,
        after: int = 0,
    ) -> Fault:
        """Answer with an error; `applied`: the request has its effect, and only its answer is lost."""
        fault = Fault(method, ending, status, code, applied=applied, held=held, times=times, after=after)
        self._faults.append(fault)
        return fault

    def hold(self, method: str, ending: str) -> Fault:
        """Keep the next such request waiting until `released` is set; it never has an effect."""
        self._faults.append(Fault(method, ending, "503 Service Unavailable", "ServiceUnavailable", held=True))
        return self._faults[-1]

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._one_at_a_time:
            self.requests.append((method, path))
            query = parse_qs(environ["QUERY_STRING"])
            if "list-type" in query:
                self.lists.append("".join(query.get("prefix", [])))
            fault = next((f for f in self._faults if f.method == method and path.endswith(f.ending) and f.times), None)
            if fault and fault.after:
                fault.after -= 1
                fault = None
            if fault:
                fault.times -= 1
            if fault is None:
                return list(self._app(environ, start_response))
            if fault.applied:
                list(self._app(environ, lambda *_: None))
        fault.arrived.set()
        if fault.held:
            fault.released.wait(60)
        body = _ERROR.format(code=fault.code).encode()
        start_response(fault.status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


def serve() -> Iterator[S3Server]:
    """A server for as long as a fixture needs it."""
    server = S3Server()
    yield server
    server.stop()


def login(monkeypatch: pytest.MonkeyPatch, server: S3Server, key: str = "testing", secret: str = "testing") -> None:
    """Let s3fs find `server`, and none of the machine's own settings."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
