"""vLLM's engine with a thread of its own: calls of any threads in, finished requests out. Public vLLM only.

One thread starts the engine, gives it requests and steps it. All requests of a call are queued before the next step;
calls that overlap share the engine's steps, so that it stays full while the last long answers of one call drain.
"""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable


class Request(NamedTuple):
    """Prompt token ids and vLLM's sampling parameters."""

    token_ids: list[int]
    parameters: Any


class _Call:
    """Requests whose outputs are awaited together."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self.outputs: list[Any] = [None] * len(requests)
        self.missing = len(requests)
        self.done: Future[list[Any]] = Future()


class Engine:
    """A started engine. Its methods may be called from several threads."""

    def __init__(self, config: TeacherConfig, arguments: dict[str, Any]):
        """Start it. Raises `TeacherUnusable`."""
        self.steps = 0
        self.processes: tuple[int, ...] = ()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._owners: dict[str, tuple[_Call, int]] = {}
        self._names = itertools.count()
        self._broken: Exception | None = None
        started: Future[None] = Future()
        threading.Thread(target=self._run, args=(arguments, started), name="engine", daemon=True).start()
        try:
            started.result()
        except (ValueError, OSError) as error:
            raise TeacherUnusable(
                f"teacher.model {config.model}",
                found=" ".join(str(error).split())[:600],
                wanted="a model and engine_args that vLLM takes",
            ) from error

    def run(self, requests: Sequence[Request]) -> list[Any]:
        """vLLM's outputs of the requests, in their order. Raises what the engine raised."""
        if not requests:
            return []
        call = _Call(requests)
        self._inbox.put(lambda: self._add(call))
        return call.done.result()

    def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all worker processes, between two steps."""
        answer: Future[list[Any]] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._llm.collective_rpc(method, args=arguments))
            except Exception as error:
                answer.set_exception(error)

        self._inbox.put(ask)
        return answer.result()

    def _run(self, arguments: dict[str, Any], started: Future[None]) -> None:
        import vllm

        before = {process.pid for process in multiprocessing.active_children()}
        try:
            self._llm = vllm.LLM(**arguments)
        except BaseException as error:
            started.set_exception(error)
            return
        self._engine = self._llm.llm_engine
        children = {process.pid for process in multiprocessing.active_children()}
        self.processes = tuple(pid for pid in children - before if pid)
        started.set_result(None)
        while True:
            self._take_in()
            try:
                outputs = self._engine.step()
            except Exception as error:
                self._fail(error)
                continue
            self.steps += 1
            for output in outputs:
                if output.finished and output.request_id in self._owners:
                    self._deliver(output)

    def _take_in(self) -> None:
        """Do what has been asked; waits where there is nothing to step for."""
        while not self._owners or not self._inbox.empty():
            self._inbox.get()()

    def _add(self, call: _Call) -> None:
        names = []
        try:
            if self._broken:
                raise self._broken
            with _paused(self._engine):
                for index, request in enumerate(call.requests):
                    name = str(next(self._names))
                    self._engine.add_request(name, {"prompt_token_ids": request.token_ids}, request.parameters)
                    self._owners[name] = (call, index)
                    names.append(name)
        except Exception as error:
            for name in names:
                del self._owners[name]
            if names and not self._broken:
                self._engine.abort_request(names)
            call.done.set_exception(error)

    def _deliver(self, output: Any) -> None:
        call, index = self._owners.pop(output.request_id)
        call.outputs[index] = output
        call.missing -= 1
        if not call.missing:
            call.done.set_result(call.outputs)

    def _fail(self, error: Exception) -> None:
        """After an exception in a step nothing is known of what is in the engine: no further step is made."""
        self._broken = error
        calls = {id(call): call for call, _ in self._owners.values()}
        self._owners.clear()
        for call in calls.values():
            call.done.set_exception(error)


class _paused:
    """While requests are added, an engine in a process of its own makes no step: its schedule would hang on timing."""

    def __init__(self, engine: Any):
        self._core = engine.engine_core if hasattr(engine.engine_core, "call_utility") else None

    def __enter__(self) -> None:
        if self._core:
            self._core.call_utility("pause_scheduler", "keep", False)

    def __exit__(self, *raised: object) -> None:
        if self._core:
            self._core.call_utility("resume_scheduler")
