"""The tap of model runner V2 on batches of vLLM's own V2 classes. The runner itself needs Triton, and a GPU."""

from __future__ import annotations

from types import SimpleNamespace as Record
from typing import Any

import numpy as np
import pytest
import torch

from coldstill.pipeline.teachers.vllm.scoring import SPEC_KEY, Arrays, TapSettings
from tests.pipeline.teachers.vllm.test_scoring import HEAD, SETTINGS, V, _assert_same, _expected, _prompt

pytest.importorskip("vllm")


class _Runner:
    """Of runner V2 what the tap touches, with vLLM's own prompt log-prob worker."""

    def __init__(self) -> None:
        from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

        self.prompt_logprobs_worker = PromptLogprobsWorker(4, torch.device("cpu"))
        self.model = Record(compute_logits=lambda rows: rows @ HEAD)
        self.device = torch.device("cpu")
        self.model_config = Record(get_vocab_size=lambda: V)


def _batch(step: dict[str, tuple[int, int, int]], prefill: dict[str, int]) -> Any:
    """vLLM's batch of a step: of each request its place, the tokens computed before, and the tokens of this step."""
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    counts = np.array([tokens for _, _, tokens in step.values()], np.int32)
    batch = InputBatch.make_dummy(len(step), int(counts.sum()), InputBuffers(4, 256, torch.device("cpu")))
    batch.req_ids = list(step)
    batch.idx_mapping_np = np.array([place for place, _, _ in step.values()])
    batch.num_scheduled_tokens = counts
    batch.query_start_loc_np = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    batch.num_computed_prefill_tokens_np = np.array([before for _, before, _ in step.values()])
    batch.prefill_len_np = np.array([prefill[name] for name in step])
    return batch


def _installed(settings: TapSettings) -> tuple[_Runner, Any]:
    from coldstill.pipeline.teachers.vllm import tap as module
    from coldstill.pipeline.teachers.vllm.compatibility import problems_of_runner

    runner = _Runner()
    assert list(problems_of_runner(runner, "v2")) == []
    tap = module.Tap(runner, keeps=True, is_split=False)
    tap.configure(settings)
    module._wrap_v2(runner, tap)
    return runner, tap


def test_padded_and_chunked_batches_of_runner_v2_give_what_the_formulas_give() -> None:
    """Two requests; the second comes in two pieces and is preempted between them: removed, added again, all anew."""
    from vllm import SamplingParams

    runner, tap = _installed(SETTINGS)
    prompts = {"a-x1": _prompt(20, seed=1), "b-x2": _prompt(33, seed=2)}
    spans = {"a-x1": [[0, 19]], "b-x2": [[5, 11], [20, 32]]}
    places = {"a-x1": 0, "b-x2": 2}
    tokens = torch.zeros(4, 64, dtype=torch.int32)
    lengths = np.zeros(4, np.int32)
    worker = runner.prompt_logprobs_worker

    def add(name: str) -> None:
        spec = {"number": places[name], "sample_id": name, "spans": spans[name]}
        worker.add_request(name, places[name], SamplingParams(max_tokens=1, extra_args={SPEC_KEY: spec}))

    for name, (prompt, _) in prompts.items():
        add(name)
        tokens[places[name], : len(prompt)] = torch.tensor(prompt)
        lengths[places[name]] = len(prompt)

    def run(step: dict[str, tuple[int, int]]) -> None:
        hidden = torch.cat([prompts[name][1][before : before + count] for name, (before, count) in step.items()])
        batch = _batch(
            {name: (places[name], *span) for name, span in step.items()},
            {name: len(prompts[name][0]) for name in step},
        )
        padded = torch.cat([hidden, torch.full((7, hidden.shape[1]), 9.0)])
        worker.compute_prompt_logprobs(runner.model.compute_logits, padded, batch, tokens, None, lengths)

    run({"a-x1": (0, 20), "b-x2": (0, 7)})
    worker.remove_request("b-x2")
    add("b-x2")
    run({"b-x2": (0, 25)})
    run({"b-x2": (25, 8)})
    sizes = [19, 18]
    for name, size, (problem, is_finite, again, _, *parts) in zip(prompts, sizes, tap.take([0, 2], sizes), strict=True):
        assert (problem, is_finite) == ("", True)
        assert again == (2 if name == "b-x2" else 0)
        prompt, hidden = prompts[name]
        positions = np.concatenate([np.arange(*span) for span in spans[name]])
        ours = Arrays.from_wire(parts, positions=size, settings=SETTINGS).targets(draw_logprobs=True)
        _assert_same(ours, _expected(prompt, hidden, positions, name))


def test_a_step_that_fails_is_a_failure_of_its_requests_and_ends_nothing() -> None:
    from vllm import SamplingParams

    runner, tap = _installed(SETTINGS)
    spec = {"number": 0, "sample_id": "a", "spans": [[0, 9]]}
    runner.prompt_logprobs_worker.add_request("a", 0, SamplingParams(max_tokens=1, extra_args={SPEC_KEY: spec}))

    def broken(rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no head")

    batch = _batch({"a": (0, 0, 10)}, {"a": 10})
    tokens, lengths = torch.zeros(4, 64, dtype=torch.int32), np.array([10, 0, 0, 0], np.int32)
    runner.prompt_logprobs_worker.compute_prompt_logprobs(broken, torch.zeros(10, 16), batch, tokens, None, lengths)
    ((problem, *_),) = tap.take([0], [9])
    assert problem == "RuntimeError: no head"


def test_a_request_that_was_never_scheduled_is_named() -> None:
    _, tap = _installed(SETTINGS)
    assert tap.take([7], [3]) == [["vLLM never scheduled it", True, 0, 0.0]]


def test_dropped_requests_leave_nothing_behind() -> None:
    """After a failed call nobody takes its results: of each kind, in runner V2."""
    from vllm import SamplingParams

    runner, tap = _installed(SETTINGS)
    tokens, lengths = torch.zeros(4, 64, dtype=torch.int32), np.array([10, 10, 0, 0], np.int32)
    for number, name in enumerate("ab"):
        spec = {"number": number, "sample_id": name, "spans": [[0, 9]]}
        runner.prompt_logprobs_worker.add_request(
            name, number, SamplingParams(max_tokens=1, extra_args={SPEC_KEY: spec})
        )
    batch = _batch({"a": (0, 0, 10), "b": (1, 0, 10)}, {"a": 10, "b": 10})
    compute = runner.prompt_logprobs_worker.compute_prompt_logprobs
    compute(runner.model.compute_logits, torch.zeros(20, 16), batch, tokens, None, lengths)
    assert len(tap.requests) == 2
    assert tap.drop([0, 7]) == 1  # its results were on the way
    assert tap.drop([1]) == 0
    compute(lambda rows: rows[:0], torch.zeros(20, 16), batch, tokens, None, lengths)  # this step fails
    assert tap.drop([0, 1]) == 0
