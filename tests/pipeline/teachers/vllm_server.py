"""A real `vllm serve` of a tiny model on the CPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import urllib3

KEY, START_S = "sk-of-this-test", 400


@contextmanager
def vllm_server(
    folder: Path, log: Path, *, top_k: int, max_length: int, arguments: tuple[str, ...] = ()
) -> Iterator[str]:
    """Started as the engine's own message says, with more log-probs than vLLM allows by default."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--max-logprobs", str(top_k), "--logprobs-mode", "raw_logprobs"]
    command += ["--max-model-len", str(max_length + 1), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--api-key", KEY, *arguments]
    settings = {
        "TORCHDYNAMO_DISABLE": "1",  # compiling costs more than it saves, and fails where a folder's name has a space
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "auto",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **settings}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(address: str) -> bool:
    try:
        return urllib3.request("GET", address, retries=False, timeout=5).status == 200
    except urllib3.exceptions.HTTPError:
        return False
