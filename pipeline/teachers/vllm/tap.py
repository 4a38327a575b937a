"""The tap: what runs inside vLLM's worker processes. The only file that imports vLLM's internals.

vLLM appends `TapExtension` to its worker class (`worker_extension_cls`), so that `LLM.collective_rpc` can call its
methods by name. It wraps the runner's own prompt log-prob step, which follows the forward pass of each step and takes
the hidden states of all scheduled tokens, final norm applied, before the head. `scoring.py` does the rest.

`compatibility.py` lists the parts of vLLM that the tap uses, and checks them before anything is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.lora.request import LoRARequest as LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.linear import LinearBase

from coldstill.pipeline.teachers.adapter import squared_norm

from .compatibility import problems_of_config, problems_of_runner
from .scoring import SPEC_KEY, Piece, StepScorer, TappedRequest, TapSettings

_BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Memory of a block, below the peak that vLLM measures at its start: those activations are free again when the tap
runs. On a CPU, 8 to 32 MiB are 1.1 times as fast as 64 and 128 at V = 8,192, and 32 MiB is the fastest at 151,936. The
cause is not proven: larger blocks may need new pages each time."""


ADAPTER_ID = 1
"""vLLM's number of the teacher's adapter."""


class TapExtension:
    """Methods of the worker, called in the process of every rank; one rank keeps the results and returns them."""

    model_runner: Any
    vllm_config: Any

    def coldstill_install(self, settings: dict[str, Any], runner: str) -> dict[str, Any]:
        """Wrap the runner's hook, unless there are `problems`. Returns these, or facts about the engine."""
        problems = [*problems_of_config(self.vllm_config), *problems_of_runner(self.model_runner, runner)]
        if problems:
            return {"problems": problems}
        self._coldstill = Tap(
            self.model_runner,
            keeps=get_tensor_model_parallel_rank() == 0 and get_pp_group().is_last_rank,
            is_split=get_tensor_model_parallel_world_size() > 1,
        )
        self._coldstill.configure(TapSettings(**settings))
        (_wrap_v2 if runner == "v2" else _wrap_v1)(self.model_runner, self._coldstill)
        return {
            "problems": [],
            "runner": runner,
            "quantized_layers": sum(map(_is_quantized, self.model_runner.model.modules())),
            "vocab_size": self.model_runner.model_config.get_vocab_size(),
            "threads": torch.get_num_threads(),
            "batched_tokens": self.vllm_config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": bool(self.vllm_config.scheduler_config.async_scheduling),
        }

    def coldstill_configure(self, settings: dict[str, Any]) -> None:
        """Change the settings of later requests."""
        self._coldstill.configure(TapSettings(**settings))

    def coldstill_take(self, numbers: list[int], positions: list[int]) -> list[list[Any]] | None:
        """Remove these finished requests and return the first `positions` of each one's wanted positions, as
        `[problem, whether all logits are finite, recomputed positions, padding mass, *arrays as bytes]`.
        """
        return self._coldstill.take(numbers, positions)

    def coldstill_drop(self, numbers: list[int]) -> int:
        """Remove these requests, whose results nobody will take. Returns how many requests the tap still holds."""
        return self._coldstill.drop(numbers)

    def coldstill_adapter(self, modules: list[str]) -> dict[str, float]:
        """`||scale B A||^2` of the adapter in these layers, as the file names them; only of those that this process
        has. Call it after a request with the adapter."""
        manager = self.model_runner.lora_manager._adapter_manager
        if ADAPTER_ID not in manager.lora_index_to_id:
            return {}
        slot = manager.lora_index_to_id.index(ADAPTER_ID)
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        packed = {part: (name, i) for name, parts in manager.packed_modules.items() for i, part in enumerate(parts)}
        norms = {}
        for module in modules:
            file_name = f"base_model.model.{module}.lora_A.weight"
            name, _ = parse_fine_tuned_lora_name(file_name, mapper.get_rename_mapper() if mapper else None)
            whole, part = packed.get(name, (name, None))
            if whole in manager.modules:
                layer = manager.modules[whole]
                pairs = list(zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True))
                norms[module] = sum(
                    squared_norm(down[slot, 0], up[slot, 0]) for down, up in (pairs if part is None else [pairs[part]])
                )
        return norms

    def coldstill_arithmetic(self) -> dict[str, Any]:
        """What the self-check's limits depend on; see `self_check.Arithmetic`."""
        return self._coldstill.arithmetic()


def _is_quantized(layer: torch.nn.Module) -> bool:
    method = getattr(layer, "quant_method", None)
    is_matrix = isinstance(layer, LinearBase) or "MoE" in type(layer).__name__
    return is_matrix and method is not None and not type(method).__name__.startswith("Unquantized")


class Tap:
    """The wrapped runner of one worker process, and its unfinished requests."""

    def __init__(self, runner: Any, *, keeps: bool, is_split: bool):
        """`keeps`, `is_split`: see `StepScorer`."""
        self.requests: dict[int, TappedRequest] = {}
        self._runner, self._keeps, self._is_split = runner, keeps, is_split

    def configure(self, settings: TapSettings) -> None:
        """Set what is kept of each distribution."""
        self.settings = settings
        self._scorer = StepScorer(
            settings,
            vocab_size=self._runner.model_config.get_vocab_size(),
            block_bytes=_BLOCK_BYTES.get(self._runner.device.type, _BLOCK_BYTES["cuda"]),
            keeps=self._keeps,
            is_split=self._is_split,
        )

    def request(self, sampling_params: Any, prompt: Sequence[int] | None) -> TappedRequest | None:
        """The request with these parameters, if it is one of the tap's. vLLM's own request id cannot be the key: vLLM
        appends a random suffix to it."""
        spec = (getattr(sampling_params, "extra_args", None) or {}).get(SPEC_KEY)
        if spec is None or prompt is None:
            return None
        number = int(spec["number"])
        if number not in self.requests:
            self.requests[number] = TappedRequest(spec, prompt=prompt, settings=self.settings)
        return self.requests[number]

    def step(self, pieces: Callable[[], list[Piece]], hidden: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """Score a step. Never raises: an exception would end the engine and all its requests."""
        try:
            self._scorer.score(pieces(), hidden, head)
        except Exception as error:
            for request in self.requests.values():
                request.fail(f"{type(error).__name__}: {error}")

    def take(self, numbers: Sequence[int], positions: Sequence[int]) -> list[list[Any]] | None:
        """See `TapExtension.coldstill_take`."""
        self._scorer.settle()
        taken = [(self.requests.pop(number, None), count) for number, count in zip(numbers, positions, strict=True)]
        if not self._keeps:
            return None
        return [
            _result(request, count) if request else ["vLLM never scheduled it", True, 0, 0.0]
            for request, count in taken
        ]

    def drop(self, numbers: Sequence[int]) -> int:
        """See `TapExtension.coldstill_drop`."""
        try:
            self._scorer.settle()
        finally:
            for number in numbers:
                self.requests.pop(number, None)
        return len(self.requests)

    def arithmetic(self) -> dict[str, Any]:
        """See `TapExtension.coldstill_arithmetic`."""
        return {"largest_logit": self._scorer.largest_logit, "width": self._scorer.width}


def _result(request: TappedRequest, count: int) -> list[Any]:
    """See `TapExtension.coldstill_take`. Of a request that cannot be stored no arrays are sent."""
    problem, is_finite = request.problem(count), request.is_finite(count)
    arrays = request.arrays.to_wire(count) if not problem and is_finite else []
    return [problem, is_finite, request.recomputed, request.padding_mass, *arrays]


def _wrap_v1(runner: Any, tap: Tap) -> None:
    """Model runner V1: `_get_prompt_logprobs_dict` is a method, called after sampling in each step that has logits."""
    original = runner._get_prompt_logprobs_dict

    def pieces(scheduled: Mapping[str, int]) -> list[Piece]:
        found = []
        for index, request_id in enumerate(runner.input_batch.req_ids):
            state, tokens = runner.requests[request_id], scheduled.get(request_id, 0)
            request = tap.request(state.sampling_params, state.prompt_token_ids) if tokens else None
            if request is None:
                continue
            first = state.num_computed_tokens
            part = request.wanted(first, first + tokens)
            if part.start < part.stop:
                rows = request.positions[part] - first + int(runner.query_start_loc.np[index])
                found.append(Piece(request, part, rows, request.labels(part, state.output_token_ids)))
        return found

    def step(hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> Any:
        result = original(hidden_states, num_scheduled_tokens)
        tap.step(lambda: pieces(num_scheduled_tokens), hidden_states, runner.model.compute_logits)
        return result

    runner._get_prompt_logprobs_dict = step


def _wrap_v2(runner: Any, tap: Tap) -> None:
    """Model runner V2: replaces the object that computes prompt log-probs by one that scores too. Prompts only.

    The hidden states may be padded. A preempted request is removed and added again, with the same number.
    """
    original = runner.prompt_logprobs_worker

    class TappedWorker(type(original)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(original.__dict__)  # its constructor differs between releases
            self.coldstill_parameters: dict[str, Any] = {}

        def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
            super().add_request(req_id, req_idx, sampling_params)
            self.coldstill_parameters[req_id] = sampling_params

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.coldstill_parameters.pop(req_id, None)

        def compute_prompt_logprobs(
            self,
            logits_fn: Callable[[Tensor], Tensor],
            hidden_states: Tensor,
            input_batch: Any,
            all_token_ids: Tensor,
            num_computed_tokens: Tensor,
            prompt_lens: np.ndarray,
        ) -> Any:
            result = super().compute_prompt_logprobs(
                logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
            )
            tap.step(lambda: self.coldstill_pieces(input_batch, all_token_ids, prompt_lens), hidden_states, logits_fn)
            return result

        def coldstill_pieces(self, batch: Any, all_token_ids: Tensor, prompt_lens: np.ndarray) -> list[Piece]:
            found = []
            for index, request_id in enumerate(batch.req_ids):
                place = int(batch.idx_mapping_np[index])
                parameters = self.coldstill_parameters.get(request_id)
                if SPEC_KEY not in (getattr(parameters, "extra_args", None) or {}):
                    continue
                prompt = all_token_ids[place, : int(prompt_lens[place])].tolist()
                request = tap.request(parameters, prompt)
                assert request is not None
                first = int(batch.num_computed_prefill_tokens_np[index])
                part = request.wanted(first, first + int(batch.num_scheduled_tokens[index]))
                if part.start < part.stop:
                    rows = request.positions[part] - first + int(batch.query_start_loc_np[index])
                    found.append(Piece(request, part, rows, request.labels(part)))
            return found

    runner.prompt_logprobs_worker = TappedWorker()
