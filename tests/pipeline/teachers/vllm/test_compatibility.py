"""What the tap rejects before it wraps anything: an engine with unsupported settings or other internals."""

from __future__ import annotations

from types import SimpleNamespace as Record
from typing import Any

import pytest

from coldstill.pipeline.teachers.vllm.compatibility import problems_of_config, problems_of_runner


class Runner:
    """What the tap touches of model runner V1, as vLLM 0.32 has it."""

    def __init__(self) -> None:
        self.input_batch = Record(req_ids=[])
        self.query_start_loc = Record(np=[0])
        self.requests: dict[str, Any] = {}
        self.model = Record(compute_logits=lambda hidden_states: None)
        self.device = "cpu"
        self.model_config = Record()

    def _get_prompt_logprobs_dict(self, hidden_states: Any, num_scheduled_tokens: Any) -> None: ...


def test_a_runner_as_it_should_be_has_no_problems() -> None:
    assert list(problems_of_runner(Runner(), "v1")) == []


def test_a_changed_signature_is_named() -> None:
    class Changed(Runner):
        def _get_prompt_logprobs_dict(self, hidden_states: Any, batch: Any) -> None: ...  # type: ignore[override]

    (problem,) = problems_of_runner(Changed(), "v1")
    assert problem.startswith("Changed._get_prompt_logprobs_dict takes ('hidden_states', 'batch'), not ('hidden")


@pytest.mark.parametrize("name", ["input_batch", "query_start_loc", "requests", "model"])
def test_a_missing_attribute_is_named(name: str) -> None:
    runner = Runner()
    delattr(runner, name)
    (problem,) = problems_of_runner(runner, "v1")
    assert problem.startswith(f"Runner has no {name}")


def test_the_other_runner_is_named() -> None:
    runner = Runner()
    assert "teacher.runner is v2" in next(problems_of_runner(runner, "v2"))
    runner.prompt_logprobs_worker = None  # type: ignore[attr-defined]
    assert "vLLM chose model runner v2" in next(problems_of_runner(runner, "v1"))


def _config(**changes: Any) -> Record:
    parallel = {"data_parallel_size": 1, "decode_context_parallel_size": 1}
    return Record(
        speculative_config=None,
        cache_config=Record(kv_sharing_fast_prefill=changes.pop("kv_sharing_fast_prefill", False)),
        parallel_config=Record(**{**parallel, **changes}),
    )


def test_settings_under_which_positions_are_wrong_are_named() -> None:
    assert list(problems_of_config(_config())) == []
    for name, value in (
        ("data_parallel_size", 2), ("decode_context_parallel_size", 2), ("enable_dbo", True),
        ("kv_sharing_fast_prefill", True),
    ):  # fmt: skip
        (problem,) = problems_of_config(_config(**{name: value}))
        assert f"{name} is {value!r}" in problem
