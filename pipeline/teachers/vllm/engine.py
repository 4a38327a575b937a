"""vLLM's engine: its start arguments, and the thread that steps it.

Only what is public in vLLM is used. Calls from any threads enter a queue. One thread starts the engine, adds their
requests and steps it. All requests of a call are queued before the next step; overlapping calls share the engine's
steps, so that it stays full while the last long answers of one call end.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import sysconfig
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.teachers.adapter import Adapter
from coldstill.pipeline.teachers.checkpoint import way_out
from coldstill.storage_schema.header import DatasetHeader

_REFUSED = {
    "speculative_config": "several logit rows belong to one token under speculative decoding",
    "max_logprobs": "teacher.top_k sets it",
    "logprobs_mode": "the log-probs are those of the raw logits",
    "worker_extension_cls": "Coldstill sets it to load the tap",
    "model": "teacher.model sets it",
    "dtype": "teacher.dtype sets it",
}

_REFUSED_WITH_IMAGES = {
    "limit_mm_per_prompt": "teacher.max_images sets it",
    "mm_processor_kwargs": "the header records the processor's settings; change them in the model's own files",
    "media_io_kwargs": "Coldstill decodes images, so that teacher and student are shown the same pixels",
    # With a cache, an image's tensors are sent once, and calls that overlap would break the order of both its ends.
    # And an image that an earlier unit has left in a cache would change the schedule, and so the bits.
    "mm_processor_cache_gb": "requests are added in another order than their images are prepared",
    "language_model_only": "the dataset has images",
    "mm_encoder_only": "the dataset has targets",
}
"""Of a teacher that sees images."""

_NO_ADAPTERS = "teacher.adapter names an adapter, and sets it"


def engine_arguments(config: TeacherConfig, header: DatasetHeader, adapter: Adapter | None = None) -> dict[str, Any]:
    """Arguments of vLLM's LLM class: ours, then `teacher.engine_args`. Raises `TeacherUnusable` for refused ones."""
    refused = dict(_REFUSED)
    if config.tap == "public" or header.order == "exact":
        refused["enable_prefix_caching"] = "positions in a cached prefix are never computed"
    sees_images = header.about.processor is not None
    if sees_images:
        refused |= _REFUSED_WITH_IMAGES
    refused |= {name: _NO_ADAPTERS for name, value in config.engine_args.items() if "lora" in name and value}
    for name, reason in refused.items():
        if name in config.engine_args:
            raise TeacherUnusable(
                f"teacher.engine_args.{name}",
                found=config.engine_args[name],
                wanted="no such argument",
                fix=f"remove it: {reason}",
            )
    arguments: dict[str, Any] = {
        "model": config.model,
        "revision": config.revision,
        # Not config.dtype: of `auto` and weights in float32, vLLM makes bfloat16.
        "dtype": header.teacher.dtype,
        # vLLM needs room for one sampled token after the prompt.
        "max_model_len": config.read_length + 1,
        # The self-check needs as many from the public path.
        "max_logprobs": config.top_k,
        "logprobs_mode": "raw_logprobs",
        "enable_prefix_caching": False,
        # Inside a Ray placement group vLLM would choose Ray, and wait for the GPUs that this actor holds.
        "distributed_executor_backend": "uni" if config.devices == 1 else "mp",
        "enforce_eager": not _can_compile(),
        "seed": 0,
    }
    if header.order == "exact" or header.mode == "generate":
        # A step that runs ahead of its results depends on timing, and the tap would lack the tokens of an answer.
        arguments["async_scheduling"] = False
    if not torch.cuda.is_available():
        # By itself vLLM takes nearly all memory of the machine. The user's VLLM_CPU_KVCACHE_SPACE, if set, is stronger.
        arguments["kv_cache_memory_bytes"] = 1 << 30
        if header.mode == "generate":
            # vLLM 0.32 on a CPU fails when a request with its own seed is prefilled in chunks.
            arguments["enable_chunked_prefill"] = False
    if sees_images:
        arguments["limit_mm_per_prompt"] = {"image": config.max_images, "video": 0, "audio": 0}
        arguments["mm_processor_cache_gb"] = 0
    if adapter is not None:
        arguments |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": adapter.vllm_rank,
            # A head in an adapter's wrapper would read the rows of a batch that the tap does not have.
            "lora_target_modules": list(adapter.suffixes),
        }
    if config.tap == "worker":
        arguments["worker_extension_cls"] = "coldstill.pipeline.teachers.vllm.tap.TapExtension"
    if header.teacher.head_dtype != header.teacher.dtype:
        arguments["hf_overrides"] = {"head_dtype": header.teacher.head_dtype}
    return {**arguments, **config.engine_args}


def set_environment(config: TeacherConfig, arguments: dict[str, Any]) -> None:
    """Set the variables that vLLM reads at import, except those that the user has set."""
    # In one process the engine dies with its worker and cannot hang it. Several GPUs need several processes.
    one_process = arguments["distributed_executor_backend"] == "uni"
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if one_process else "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1" if config.runner == "v2" else "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # The one sampled token may exceed the model's context; it is never read.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    if not _can_compile():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


class Request(NamedTuple):
    """vLLM's inputs, `{"prompt_token_ids": ...}` or the result of `Engine.render`, and its sampling parameters.

    `is_adapted`: whether the engine's adapter applies, if it has one.
    """

    inputs: Mapping[str, Any]
    parameters: Any
    is_adapted: bool = True


class _Call:
    """The requests of one call, and their outputs."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self.outputs: list[Any] = [None] * len(requests)
        self.missing = len(requests)
        self.done: Future[list[Any]] = Future()


class Engine:
    """A started engine. Thread-safe."""

    def __init__(self, config: TeacherConfig, arguments: dict[str, Any], adapter: Adapter | None = None):
        """Start the engine. Raises `TeacherUnusable`."""
        self._adapter_folder = str(adapter.folder) if adapter else None
        self._adapter: Any = None
        self.steps, self.rendered = 0, 0
        """Steps made, and prompts with images rendered."""
        self.processes: tuple[int, ...] = ()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._owners: dict[str, tuple[_Call, int]] = {}
        self._names = itertools.count()
        self._rendering = threading.Lock()  # a processor is not thread-safe
        self._broken: Exception | None = None
        started: Future[None] = Future()
        threading.Thread(target=self._run, args=(arguments, started), name="engine", daemon=True).start()
        try:
            started.result()
        except (ValueError, OSError, ImportError, TypeError) as error:  # TypeError: of an unknown argument
            raise TeacherUnusable(
                f"teacher.model {config.model}",
                found=" ".join(str(error).split())[:600],
                wanted="a model and engine_args that vLLM accepts",
                fix=way_out(error),
            ) from error

    def run(self, requests: Sequence[Request]) -> list[Any]:
        """vLLM's outputs of the requests, in order. Raises what the engine raised."""
        if not requests:
            return []
        call = _Call(requests)
        self._inbox.put(lambda: self._add(call))
        return call.done.result()

    def render(self, prompt: dict[str, Any]) -> Mapping[str, Any]:
        """vLLM's inputs of a prompt with `multi_modal_data`: images expanded, and their tensors.

        In the caller's thread, so that the engine makes its steps meanwhile. Raises what the model's processor raises.
        """
        with self._rendering:
            self.rendered += 1
            rendered: list[Mapping[str, Any]] = self._engine.renderer.render_cmpl([prompt])
        return rendered[0]

    @property
    def quantization(self) -> str | None:
        """The quantization that vLLM has loaded the weights with, by its own name."""
        found = self._engine.vllm_config.model_config.quantization
        return None if found is None else str(found)

    def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all worker processes, between two steps, and return their results in rank order."""
        answer: Future[list[Any]] = Future()

        def call() -> None:
            try:
                answer.set_result(self._llm.collective_rpc(method, args=arguments))
            except Exception as error:
                answer.set_exception(error)

        self._inbox.put(call)
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
        if self._adapter_folder is not None:
            from .tap import ADAPTER_ID, LoRARequest

            self._adapter = LoRARequest("teacher.adapter", ADAPTER_ID, self._adapter_folder)
        children = {process.pid for process in multiprocessing.active_children()}
        self.processes = tuple(pid for pid in children - before if pid)
        started.set_result(None)
        while True:
            self._run_queued_calls()
            try:
                outputs = self._engine.step()
            except Exception as error:
                self._fail(error)
                continue
            self.steps += 1
            for output in outputs:
                if output.finished and output.request_id in self._owners:
                    self._deliver(output)

    def _run_queued_calls(self) -> None:
        """Run the queued calls; wait for one if the engine has no requests."""
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
                    adapter = self._adapter if request.is_adapted else None
                    self._engine.add_request(name, request.inputs, request.parameters, lora_request=adapter)
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
        """After an exception in a step the engine's state is unknown: it makes no further step."""
        self._broken = error
        calls = {id(call): call for call, _ in self._owners.values()}
        self._owners.clear()
        for call in calls.values():
            call.done.set_exception(error)


class _paused:
    """While requests are added, an engine in its own process makes no step: its schedule would depend on timing."""

    def __init__(self, engine: Any):
        self._core = engine.engine_core if hasattr(engine.engine_core, "call_utility") else None

    def __enter__(self) -> None:
        if self._core:
            self._core.call_utility("pause_scheduler", "keep", False)

    def __exit__(self, *raised: object) -> None:
        if self._core:
            self._core.call_utility("resume_scheduler")


def _can_compile() -> bool:
    """False if a path holds a space: torch.compile passes its include paths to the C++ compiler without quotes."""
    return not any(character.isspace() for character in sysconfig.get_path("purelib"))
