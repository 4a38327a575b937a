"""An HTTP client for JSON from one server, with bounded responses, retries and named errors.

The client does not depend on models. Responses are untrusted until `read` has checked them.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError

from coldstill.common.retry import LONGEST_WAIT_S, retrying
from coldstill.pipeline.errors import EndpointFailed, EndpointRefused, TeacherOutputInvalid, TeacherUnusable

KEY_VARIABLE = "OPENAI_API_KEY"
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of a server that is busy or starting, or of a proxy in front of it."""
NAN_MESSAGE = "not JSON compliant"
"""Part of the message of a Python server that fails to write NaN as JSON; vLLM passes it on with status 400."""
_CONNECT_S = 10.0
_CHUNK = 1 << 20
_MOST_SHOWN = 400

Result = TypeVar("Result")


class EndpointClient:
    """A client of one server, for several threads at once.

    The key in OPENAI_API_KEY, if there is one, is sent to this server only: redirects are not followed, and no message
    holds it.
    """

    def __init__(self, url: str, *, connections: int, timeout_s: float, attempts: int):
        self.url = _checked(url)
        self._key = _key()
        self._timeout_s, self._attempts = timeout_s, attempts
        self._pool = urllib3.PoolManager(maxsize=connections, block=True)
        self._parsing = threading.Lock()
        self._counting = threading.Lock()
        self.progress = 0

    def get(self, path: str, *, at_most: int, read: Callable[[object], Result]) -> Result:
        """The result of `read` on the JSON at `path`; see `post`."""
        return self._request("GET", path, None, at_most, read)

    def post(self, path: str, body: Mapping[str, Any], *, at_most: int, read: Callable[[object], Result]) -> Result:
        """The result of `read` on the JSON response to `body`, which has `at_most` bytes.

        Documents are parsed one at a time: a parsed one takes many times its bytes, and Python's lock would serialize
        the parsing anyway. Raises `EndpointRefused` for a response that a retry would repeat, `EndpointFailed` after
        the last attempt, `TeacherOutputInvalid` for a longer response, and what `read` raises.
        """
        return self._request("POST", path, json.dumps(body).encode(), at_most, read)

    def _request(
        self, method: str, path: str, body: bytes | None, at_most: int, read: Callable[[object], Result]
    ) -> Result:
        attempts = retrying(lambda error: isinstance(error, _Transient), attempts=self._attempts)
        try:
            return attempts(self._attempt, method, path, body, at_most, read)
        except _Transient as error:
            raise EndpointFailed(
                f"{method} {self.url}{path}",
                found=f"{error} (the last of {self._attempts} attempts)",
                wanted="a response",
                fix="check that the server runs and that the workers can reach it; then re-run the same command to "
                "resume: committed units are kept",
            ) from None

    def _attempt(
        self, method: str, path: str, body: bytes | None, at_most: int, read: Callable[[object], Result]
    ) -> Result:
        try:
            status, headers, data = self._exchange(method, path, body, at_most)
            if status == HTTPStatus.OK:
                with self._parsing:
                    return read(_parsed(data))
            problem = f"status {status}: {self._shown(data)}"
            if status not in _TRANSIENT or NAN_MESSAGE in problem:
                raise EndpointRefused(
                    f"{method} {self.url}{path}",
                    found=problem,
                    wanted="status 200",
                    fix=f"check teacher.endpoint, and {KEY_VARIABLE} if the server requires a key",
                )
            transient = _Transient(problem, retry_after_s=_seconds(headers.get("Retry-After")))
        except (HTTPError, _NotJson) as error:
            transient = _Transient(f"{type(error).__name__}: {self._shown(str(error).encode())}")
        self._count()
        raise transient

    def _exchange(
        self, method: str, path: str, body: bytes | None, at_most: int
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of one attempt."""
        deadline = time.monotonic() + self._timeout_s
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        response = self._pool.request(
            method,
            self.url + path,
            body=body,
            headers=headers,
            timeout=urllib3.Timeout(connect=_CONNECT_S, read=self._timeout_s),
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        try:
            data = bytearray()
            for chunk in response.stream(_CHUNK, decode_content=False):
                self._count()
                data += chunk
                if len(data) > at_most:
                    raise TeacherOutputInvalid(
                        f"{method} {self.url}{path}", found="a longer response", wanted=f"at most {at_most} bytes"
                    )
                if time.monotonic() > deadline:
                    raise HTTPError(f"no complete response after {self._timeout_s} s")
        except BaseException:
            response.close()
            raise
        finally:
            response.release_conn()  # a closed one too, or its place in the pool is lost
        return response.status, response.headers, bytes(data)

    def _count(self) -> None:
        with self._counting:
            self.progress += 1

    def _shown(self, data: bytes) -> str:
        """The start of a message, as text without the key: some servers repeat it."""
        text = " ".join(data[: 4 * _MOST_SHOWN].decode(errors="replace").split())
        return (text.replace(self._key, "***") if self._key else text)[:_MOST_SHOWN]


class _Transient(Exception):
    """A failure that a retry may resolve. `retrying` waits for `retry_after_s`, which the server set."""

    def __init__(self, problem: str, *, retry_after_s: float = 0.0):
        super().__init__(problem)
        self.retry_after_s = retry_after_s


class _NotJson(Exception):
    """A response that is not JSON: an incomplete one, or a proxy's page."""


def _parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _NotJson(f"{error}; it begins with {data[:40]!r}") from None


def _seconds(value: str | None) -> float:
    """The seconds of a Retry-After header, capped; 0 for one that holds a date."""
    return min(float(value), LONGEST_WAIT_S) if value and value.isascii() and value.isdigit() else 0.0


def _checked(url: str) -> str:
    try:
        parts = urllib3.util.parse_url(url)
    except LocationParseError:
        parts = urllib3.util.Url()
    if parts.scheme not in ("http", "https") or not parts.host or parts.auth or parts.query or parts.fragment:
        raise TeacherUnusable(
            "teacher.endpoint",
            found="a URL with a name or key in it" if parts.auth or parts.query else url,
            wanted="a plain URL such as http://host:8000/v1",
            fix=f"a key belongs in the environment variable {KEY_VARIABLE}, on each worker",
        )
    return url.rstrip("/")


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise TeacherUnusable(
            f"the environment variable {KEY_VARIABLE}",
            found="characters that a header cannot carry",
            wanted="a key, or nothing",
        )
    return key
