"""The vLLM engine as a teacher: through the tap in its workers, or by its public path. Takes and gives what
`protocol.Teacher` says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.sequences import ScoredSequence, TokenSequence
from coldstill.pipeline.teachers.answers import answer_room, answer_sequence
from coldstill.pipeline.teachers.sampling import answer_seed
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets, span_positions

from .arguments import engine_arguments, set_environment
from .canary import canary_sequences, largest_difference
from .engine import Engine, Request
from .public_path import read_prompt_logprobs
from .requests import KEY, Arrays, TapSettings

_TAKEN_BYTES = 8 << 20
"""At a time from the worker's process: larger messages leave vLLM's shared memory queue for a slower way."""


class VllmTeacher:
    """A started engine. Calls may overlap."""

    def __init__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None):
        arguments = engine_arguments(config, header)
        set_environment(config, arguments)
        try:
            import vllm
        except ImportError as error:
            raise TeacherUnusable(
                "teacher.engine vllm",
                found=str(error),
                wanted="vLLM",
                fix='pip install "coldstill[capture]" (GPU) or "coldstill[capture-cpu]" on each node',
            ) from error
        self._vllm, self._config, self._header, self._sampling = vllm, config, header, sampling
        self._numbers = itertools.count()
        self._engine = Engine(config, arguments)
        self._settings = TapSettings(
            top_k=header.top_k,
            min_prob=header.min_prob,
            draws=header.draws,
            kept_draws=header.kept_draws,
            draw_logprobs=header.draw_logprobs,
            draw_seed=header.draw_seed,
            token_count=header.token_count,
        )
        self._facts: dict[str, Any] = {"tap": config.tap}
        if config.tap == "worker":
            self._facts |= {"recomputed_positions": 0, "mass_beyond_tokens": 0.0}
            self._install()

    @property
    def environment(self) -> dict[str, Any]:
        """See `protocol.Teacher`."""
        import torch

        return {
            "engine": "vllm",
            "vllm": self._vllm.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **self._facts,
        }

    @property
    def progress(self) -> int:
        """See `protocol.Teacher`: the engine's steps."""
        return self._engine.steps

    @property
    def processes(self) -> tuple[int, ...]:
        """See `protocol.Teacher`."""
        return self._engine.processes

    def score(self, sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
        """See `protocol.Teacher`."""
        return self._score_tapped(sequences) if self._config.tap == "worker" else self._score_publicly(sequences)

    def generate(self, prompts: Sequence[TokenSequence]) -> list[ScoredSequence]:
        """See `protocol.Teacher`."""
        if self._sampling is None or self._config.tap != "worker" or self._config.runner != "v1":
            raise TeacherUnusable(
                "mode generate",
                found=f"tap {self._config.tap}, runner {self._config.runner}",
                wanted="tap worker, runner v1",
            )
        answers = [(prompt, number) for prompt in prompts for number in range(self._sampling.n)]
        wishes = [self._answer_wish(prompt, number) for prompt, number in answers]
        outputs = self._engine.run(
            [
                Request(prompt.token_ids.tolist(), self._answer_parameters(prompt, number, wish))
                for (prompt, number), wish in zip(answers, wishes, strict=True)
            ]
        )
        said = [output.outputs[0] for output in outputs]
        sequences = [
            answer_sequence(
                prompt,
                answer.token_ids,
                number=number,
                answers=self._sampling.n,
                finish_reason="length" if answer.finish_reason == "length" else "stop",
            )
            for (prompt, number), answer in zip(answers, said, strict=True)
        ]
        targets = self._take(sequences, [wish["number"] for wish in wishes])
        return [ScoredSequence(*pair) for pair in zip(sequences, targets, strict=True)]

    def _install(self) -> None:
        """Put the tap into each worker, and hold it against the public path."""
        # The public path knows no padding columns: to be compared, the tap must take them for tokens too.
        settings = self._settings
        self._settings = replace(settings, token_count=self._header.vocab_size, draws=0, min_prob=0.0)
        answers = self._engine.call_workers("coldstill_install", asdict(self._settings), self._config.runner)
        problems = [problem for answer in answers for problem in answer["problems"]]
        if problems:
            raise TeacherUnusable(
                f"vLLM {self._vllm.__version__} and teacher.tap worker",
                found=problems[0],
                wanted="a vLLM and engine_args that the tap fits",
                fix="take that out of teacher.engine_args, install the vLLM that is pinned, or set teacher.tap: public",
            )
        facts = answers[0]
        if facts["vocab_size"] != self._header.vocab_size:
            raise TeacherUnusable(
                f"logit columns of {self._config.model} in vLLM",
                found=facts["vocab_size"],
                wanted=f"{self._header.vocab_size}, as its configuration says",
            )
        sequences = canary_sequences(token_count=self._header.token_count, max_length=self._header.max_length)
        difference = largest_difference(
            self._score_tapped,
            self._score_publicly,
            sequences,
            is_float32=self._header.teacher.head_dtype == "float32",
        )
        self._settings = settings
        self._engine.call_workers("coldstill_configure", asdict(settings))
        self._facts |= {name: value for name, value in facts.items() if name != "problems"}
        self._facts["canary_difference"] = difference

    def _score_tapped(self, sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
        numbers = [next(self._numbers) for _ in sequences]
        requests = [
            Request(
                sequence.token_ids.tolist(),
                self._parameters(
                    max_tokens=1,
                    temperature=0,
                    wish={
                        "number": number,
                        "sample_id": sequence.sample_id,
                        "spans": sequence.target_spans.tolist(),
                    },
                ),
            )
            for sequence, number in zip(sequences, numbers, strict=True)
        ]
        self._engine.run(requests)
        return self._take(sequences, numbers)

    def _score_publicly(self, sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
        parameters = self._vllm.SamplingParams(
            prompt_logprobs=self._header.top_k, max_tokens=1, temperature=0, flat_logprobs=True, detokenize=False
        )
        outputs = self._engine.run([Request(sequence.token_ids.tolist(), parameters) for sequence in sequences])
        return [
            read_prompt_logprobs(
                output.prompt_logprobs,
                sequence,
                top_k=self._header.top_k,
                min_prob=self._settings.min_prob,
                token_count=self._settings.token_count,
            )
            for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def _take(self, sequences: Sequence[TokenSequence], numbers: Sequence[int]) -> list[TeacherTargets]:
        """What the tap kept of these finished requests. Raises `TeacherOutputInvalid`."""
        sizes = [span_positions(sequence.target_spans).size for sequence in sequences]
        targets: list[TeacherTargets] = []
        start = 0
        while start < len(sequences):
            stop, size = start + 1, sizes[start]
            while stop < len(sequences) and (size + sizes[stop]) * self._settings.row_bytes() <= _TAKEN_BYTES:
                size += sizes[stop]
                stop += 1
            answers = self._engine.call_workers("coldstill_take", list(numbers[start:stop]), sizes[start:stop])
            kept = next(answer for answer in answers if answer is not None)
            targets += map(self._targets, sequences[start:stop], kept)
            start = stop
        return targets

    def _targets(self, sequence: TokenSequence, answer: Sequence[Any]) -> TeacherTargets:
        problem, again, beyond, *parts = answer
        labels = sequence.token_ids[span_positions(sequence.target_spans) + 1]
        arrays = None if problem else Arrays.from_wire(parts, positions=labels.size, settings=self._settings)
        if arrays is not None and not np.array_equal(arrays.labels, labels):
            problem = "the engine saw other tokens than it was given"
        if arrays is None or problem:
            raise TeacherOutputInvalid(
                f"row {sequence.sample_id!r} in vLLM's worker",
                found=problem,
                wanted="a distribution at each target position",
                fix="set teacher.tap: public to compare, or reject the row",
            )
        self._facts["recomputed_positions"] += again
        self._facts["mass_beyond_tokens"] = max(self._facts["mass_beyond_tokens"], beyond / max(1, arrays.labels.size))
        return arrays.targets(draw_logprobs=self._header.draw_logprobs)

    def _answer_wish(self, prompt: TokenSequence, number: int) -> dict[str, Any]:
        assert self._sampling is not None
        name = answer_sequence(prompt, [], number=number, answers=self._sampling.n, finish_reason="").sample_id
        room = answer_room(prompt, sampling=self._sampling, header=self._header)
        return {"number": next(self._numbers), "sample_id": name, "answer": room}

    def _answer_parameters(self, prompt: TokenSequence, number: int, wish: dict[str, Any]) -> Any:
        sampling = self._sampling
        assert sampling is not None
        return self._parameters(
            max_tokens=wish["answer"],
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=answer_seed(seed=sampling.seed, sample_id=prompt.sample_id, number=number),
            stop=list(sampling.stop),
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,  # a stop text may hold one, as with the other engines
            wish=wish,
        )

    def _parameters(self, *, wish: dict[str, Any], detokenize: bool = False, **parameters: Any) -> Any:
        """vLLM's sampling parameters. A cached prefix is not read: its positions would never be computed."""
        return self._vllm.SamplingParams(
            detokenize=detokenize, extra_args={KEY: wish}, skip_reading_prefix_cache=True, **parameters
        )
