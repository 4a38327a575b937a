"""A small server with vLLM's version of OpenAI's API: real HTTP, a real tiny model, and faults on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

Fault = Callable[[BaseHTTPRequestHandler, bytes], None]
"""Answers a request in another way than the body requests."""
Change = Callable[[dict[str, Any]], None]
"""Spoils a document before it is sent."""


class ModelServer(ThreadingHTTPServer):
    """Serves a model; `faults` are used up, one for each completion, `change` is applied to all of these."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, *, max_logprobs: int = 20, processed: bool = False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.name, self.max_logprobs, self.processed, self.max_model_len = str(folder), max_logprobs, processed, 512
        self.faults: list[Fault] = []
        self.change: Change = lambda document: None
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def logprobs(self, tokens: list[int]) -> np.ndarray:
        """Of the softmax after each token, float64."""
        with self.lock, torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([tokens])).logits[0].double(), -1).numpy()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the client's delayed acknowledgment holds each body for 40 ms
    server: ModelServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        card = {"id": self.server.name, "owned_by": "tests", "max_model_len": self.server.max_model_len}
        send(self, json.dumps({"object": "list", "data": [card]}).encode())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(body)
        server.headers.append(dict(self.headers))
        server.busy += 1
        server.most_busy = max(server.most_busy, server.busy)
        try:
            status, document = self._complete(body)
            if status == 200:
                server.change(document)
            data = json.dumps(document).encode()
            fault = server.faults.pop(0) if server.faults else None
            if fault is not None:
                fault(self, data)
            else:
                send(self, data, status=status)
        finally:
            server.busy -= 1

    def _complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not self.path.endswith("/completions"):
            return 404, {"error": {"message": "Not Found"}}
        server, prompt = self.server, body["prompt"]
        wanted = body.get("prompt_logprobs") or body["logprobs"]
        if wanted > server.max_logprobs:
            return 400, {"error": {"message": f"logprobs of {wanted}: greater than max allowed"}}
        if max(prompt) >= server.model.config.vocab_size:
            return 400, {"error": {"message": "Token id is out of vocabulary"}}
        if "prompt_logprobs" in body:
            after = server.logprobs(prompt)
            rows = [None, *(_entries(after[t], prompt[t + 1], wanted) for t in range(len(prompt) - 1))]
            return 200, {"choices": [{"index": 0, "prompt_logprobs": rows}]}
        rng, answer, tops = np.random.default_rng(body["seed"]), [], []
        for _ in range(body["max_tokens"]):
            raw = server.logprobs([*prompt, *answer])[-1]
            tempered = raw / (body["temperature"] or 1e-3)
            tempered -= np.log(np.exp(tempered - tempered.max()).sum()) + tempered.max()
            answer.append(int(rng.choice(raw.size, p=np.exp(tempered) / np.exp(tempered).sum())))
            entries = _entries(tempered if server.processed else raw, answer[-1], wanted)
            tops.append({f"token_id:{id_}": entry["logprob"] for id_, entry in entries.items()})
            if answer[-1] == server.model.config.eos_token_id:
                break
        reason = "stop" if answer[-1] == server.model.config.eos_token_id else "length"
        choice = {"index": 0, "token_ids": answer, "prompt_token_ids": prompt, "finish_reason": reason}
        return 200, {"choices": [{**choice, "logprobs": {"top_logprobs": tops}}]}


def _entries(logprobs: np.ndarray, label: int, count: int) -> dict[str, dict[str, Any]]:
    """The label first, then the best; a label among these is there once."""
    ids = [label, *np.argsort(-logprobs, kind="stable")[:count].tolist()]
    return {str(id_): {"logprob": float(logprobs[id_]), "rank": 1, "decoded_token": "x"} for id_ in ids}


def send(handler: BaseHTTPRequestHandler, data: bytes, *, status: int = 200, **headers: str) -> None:
    """A whole answer."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def refused(status: int, **headers: str) -> Fault:
    """An answer with this status; the body repeats the key, as some servers do."""
    return lambda handler, data: send(
        handler, f"no: {handler.headers['Authorization']}".encode(), status=status, **headers
    )


def cut(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """The connection breaks in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def hang_up(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """The connection breaks before any answer."""
    handler.close_connection = True


def garbage(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """A proxy's page in place of the document."""
    send(handler, b"<html>Bad gateway</html>")


def deep(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """JSON that is nested deeper than a stack."""
    send(handler, b"[" * 200_000)


def no_http(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """Another server listens at this port."""
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    handler.close_connection = True


def stalled(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """Half of the answer, and then nothing for two seconds."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    time.sleep(2)
    handler.close_connection = True


def dripping(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """Always a byte more, for two seconds."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b"1\r\n \r\n")
        time.sleep(0.05)
    handler.close_connection = True


def huge(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """An endless answer, in chunks."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[ModelServer]:
    """A server in a thread, until the block ends."""
    server = ModelServer(folder, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
