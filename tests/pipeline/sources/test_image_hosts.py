"""Laws of reading images over http: only named hosts are read, within bounds, and their failures are named."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from coldstill.pipeline.errors import ImageHostFailed
from coldstill.pipeline.sources import image_reader
from tests.pipeline.sources.image_reading import RED, read_image, refusal_of


class _Server(ThreadingHTTPServer):
    """Answers by path; `failures` is how often /later fails first."""

    failures = 0
    asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        status, headers, body = 200, {}, RED
        if self.path == "/absent.png":
            status, body = 404, b""
        elif self.path == "/elsewhere.png":
            status, headers, body = 302, {"Location": "http://localhost:1/x.png"}, b""
        elif self.path == "/file.png":
            status, headers, body = 302, {"Location": "file:///etc/passwd"}, b""
        elif self.path == "/near.png":
            status, headers, body = 302, {"Location": "/x.png"}, b""
        elif self.path == "/later.png" and self.server.failures:
            self.server.failures -= 1
            status, body = 503, b""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(image_reader, "_PAUSE_S", 0.01)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _host(server: _Server) -> str:
    return f"127.0.0.1:{server.server_port}"


def test_an_allowed_host_is_read_and_another_is_not_asked(server: _Server) -> None:
    host = _host(server)
    assert read_image(f"http://{host}/a b/ä.png?x=1#part", image_hosts=(host,)) == RED
    assert server.asked == ["/a%20b/%C3%A4.png?x=1"]
    reason, detail = refusal_of(f"http://{host}/x.png")
    assert reason == "image_not_found"
    assert detail.endswith(f"host {host} is not in source.image_hosts")
    assert len(server.asked) == 1


def test_redirects_are_followed_to_allowed_hosts_only(server: _Server) -> None:
    host = _host(server)
    assert read_image(f"http://{host}/near.png", image_hosts=(host,)) == RED
    for place in ("elsewhere", "file"):
        reason, detail = refusal_of(f"http://{host}/{place}.png", image_hosts=(host,))
        assert reason == "image_not_found"
        assert detail.endswith("a redirect to a host that is not in source.image_hosts")


def test_an_address_without_an_image_rejects_the_row_and_a_host_without_an_answer_fails_the_unit(
    server: _Server,
) -> None:
    host = _host(server)
    assert refusal_of(f"http://{host}/absent.png", image_hosts=(host,))[1].endswith("HTTP status 404")
    server.failures = 2
    assert read_image(f"http://{host}/later.png", image_hosts=(host,)) == RED
    server.failures = 3
    with pytest.raises(ImageHostFailed, match=r"take 127\.0\.0\.1:\d+ out of source\.image_hosts"):
        read_image(f"http://{host}/later.png", image_hosts=(host,))


def test_a_download_is_bounded(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_reader, "MAX_IMAGE_BYTES", len(RED) - 1)
    host = _host(server)
    assert refusal_of(f"http://{host}/x.png", image_hosts=(host,))[0] == "image_too_large"
