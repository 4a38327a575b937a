"""The vLLM engine as a teacher, through the tap or vLLM's public path."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.teachers.adapter import Adapter, adapter_of
from coldstill.pipeline.teachers.answer_sampling import answer_room, answer_seed, answer_sequence, padding_bias
from coldstill.pipeline.teachers.checkpoint import check_weights, load_tokenizer
from coldstill.pipeline.teachers.engine_args import require_loaded
from coldstill.pipeline.teachers.image_expansion import RowRejected
from coldstill.pipeline.teachers.local_expansion import image_rules
from coldstill.pipeline.teachers.protocol import (
    ScoredSequence,
    ScoreResult,
    TokenSequence,
    answer_name,
    non_finite,
)
from coldstill.pipeline.teachers.target_extractor import split_width
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import span_positions

from .adapter_check import check_by_peft, check_layers
from .engine import Engine, Request, engine_arguments, set_environment
from .prompts import Prompt, PromptMaker
from .public_path import read_prompt_logprobs
from .scoring import SPEC_KEY, Arrays, RequestSpec, TapSettings
from .self_check import Arithmetic, check_agreement

_TAKEN_BYTES = 8 << 20
"""Maximum bytes of one message from the worker's process: vLLM sends larger ones outside its shared memory."""


class VllmTeacher:
    """A started engine. Calls may overlap."""

    def __init__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None):
        """Start the engine, install and check the tap. Raises `TeacherUnusable`, `TeacherOutputInvalid`."""
        if sampling is not None and (config.tap, config.runner) != ("worker", "v1"):
            raise TeacherUnusable(
                "mode generate",
                found=f"teacher.tap {config.tap}, teacher.runner {config.runner}",
                wanted="tap worker, runner v1",
            )
        if header.about.processor is not None and config.runner != "v1":
            raise TeacherUnusable(
                f"teacher.runner {config.runner}", found=f"{config.model}, which sees images", wanted="runner v1"
            )
        self._images = image_rules(config, header)
        self._adapter = adapter_of(config) if config.adapter else None
        if self._adapter is not None and self._images is not None:
            raise TeacherUnusable(
                f"teacher.adapter {config.adapter}",
                found=f"{config.model}, which sees images, and engine vllm",
                wanted="engine transformers, or a teacher of text only",
                fix="set teacher.engine: transformers, or merge the adapter with peft's `merge_and_unload`",
            )
        arguments = engine_arguments(config, header, self._adapter)
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
        self._is_adapted = True
        if sampling is not None and sampling.stop:
            # vLLM finds stop texts by its own tokenizer, which may be of a class that loses text.
            self._tokenizer_folder = tempfile.TemporaryDirectory()
            load_tokenizer(config).save_pretrained(self._tokenizer_folder.name)
            arguments.setdefault("tokenizer", self._tokenizer_folder.name)
        self._engine = Engine(config, arguments, self._adapter)
        self._prompts = PromptMaker(self._engine.render, self._images, config)
        self._top_k, named_width = split_width(header)
        self._settings = TapSettings(
            top_k=self._top_k,
            named_width=named_width,
            min_prob=header.min_prob,
            draws=header.draws,
            kept_draws=header.kept_draws,
            draw_method=header.draw_method,
            draw_logprobs=header.draw_logprobs,
            draw_seed=header.draw_seed,
            token_count=header.token_count,
        )
        self._facts: dict[str, Any] = {"tap": config.tap}
        if config.tap == "worker":
            self._facts |= {"recomputed_positions": 0, "mass_beyond_tokens": 0.0}
            self._install_tap()
        else:
            self._require_quantization(None)
            check_weights(self._by_public_path, header, model=config.model, images=self._images)
        if self._adapter is not None:
            self._check_adapter(self._adapter)

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
        """See `protocol.Teacher`: the engine's steps, and the rows whose images were made ready for it."""
        return self._engine.steps + self._engine.rendered

    @property
    def processes(self) -> tuple[int, ...]:
        """See `protocol.Teacher`."""
        return self._engine.processes

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        """See `protocol.Teacher`."""
        if (sampling := self._sampling) is not None:
            return self._in_batches(sequences, lambda prompts: self._answered(prompts, sampling), sampling)
        return self._by_tap(sequences) if self._config.tap == "worker" else self._by_public_path(sequences)

    def _install_tap(self) -> None:
        """Install the tap in each worker, and compare it with the public path."""
        # The public path counts padding columns as tokens; for the comparison, the tap must do so too.
        settings = self._settings
        self._settings = replace(
            settings, token_count=self._header.vocab_size, named_width=0, draws=0, min_prob=0.0, is_self_check=True
        )
        answers = self._engine.call_workers("coldstill_install", asdict(self._settings), self._config.runner)
        problems = [problem for answer in answers for problem in answer["problems"]]
        if problems:
            raise TeacherUnusable(
                f"vLLM {self._vllm.__version__} and teacher.tap worker",
                found=problems[0],
                wanted="a vLLM and engine_args that the tap fits",
                fix="remove that from teacher.engine_args, install the pinned vLLM release, or set teacher.tap: public",
            )
        facts = answers[0]
        self._require_quantization(sum(answer.pop("quantized_layers") for answer in answers))
        if facts["vocab_size"] != self._header.vocab_size:
            raise TeacherUnusable(
                f"logit columns of {self._config.model} in vLLM",
                found=facts["vocab_size"],
                wanted=f"{self._header.vocab_size}, the vocab_size of its config.json",
            )
        found = check_agreement(self._by_tap, self._by_public_path, self._header, self._arithmetic, images=self._images)
        self._settings = settings
        self._engine.call_workers("coldstill_configure", asdict(settings))
        self._facts |= {name: value for name, value in facts.items() if name != "problems"}
        self._facts |= {
            "canary_difference": found.logprob,
            "canary_difference_limit": found.logprob_limit,
            "canary_kl": found.kl,
            "canary_kl_limit": found.kl_limit,
        }

    def _require_quantization(self, layers: int | None) -> None:
        """Compare what vLLM has loaded with the header, which was made before. Raises `TeacherUnusable`."""
        loaded, recorded = self._engine.quantization, self._header.teacher.quantization
        if loaded is not None or recorded is not None or layers:
            require_loaded(self._config, recorded=recorded, loaded=loaded, layers=layers)
            self._facts["quantization"] = loaded

    def _check_adapter(self, adapter: Adapter) -> None:
        """Prove that the engine applies the adapter; see `adapter_check.py`."""
        from coldstill.pipeline.teachers.transformers_teacher import TransformersTeacher

        adapted = self._by_tap if self._config.tap == "worker" else self._by_public_path
        if self._config.tap == "worker":
            answers = self._engine.call_workers("coldstill_adapter", list(adapter.modules))
            check_layers(adapter, answers, dtype=self._header.teacher.dtype)

        def base(sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
            self._is_adapted = False
            try:
                return adapted(sequences)
            finally:
                self._is_adapted = True

        def reference(config: TeacherConfig, header: DatasetHeader) -> TransformersTeacher:
            return TransformersTeacher(config, header, device="cpu")  # vLLM has the GPU's memory

        found = check_by_peft(self._config, self._header, adapted=adapted, base=base, load=reference)
        if self._config.tap == "public" and not found:
            raise TeacherUnusable(
                f"teacher.adapter {adapter.name} with teacher.tap public",
                found="a base model that is large, quantized or not in a folder, so that peft cannot be compared with",
                wanted="tap worker, which compares the layers",
                fix="set teacher.tap: worker, or merge the adapter into the model with peft's `merge_and_unload`",
            )
        self._facts |= found

    def _arithmetic(self) -> Arithmetic:
        """What the self-check's limits depend on, of the scoring so far."""
        answers = self._engine.call_workers("coldstill_arithmetic")
        return Arithmetic(
            width=max(answer["width"] for answer in answers),
            vocab_size=self._header.vocab_size,
            largest_logit=max(answer["largest_logit"] for answer in answers),
            head_dtype=self._header.teacher.head_dtype,
        )

    def _by_tap(self, sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        return self._in_batches(sequences, self._tapped)

    def _by_public_path(self, sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        return self._in_batches(sequences, self._published)

    def _in_batches(
        self,
        sequences: Sequence[TokenSequence],
        score: Callable[[Sequence[Prompt]], list[ScoreResult]],
        sampling: SamplingConfig | None = None,
    ) -> list[ScoreResult]:
        """The results of `score`, and in their order what stands for the rows that are rejected."""
        answers = sampling.n if sampling else 1
        results: list[ScoreResult] = []
        for batch in self._prompts.batches(sequences, is_answered=sampling is not None):
            scored = iter(score([item for item in batch if isinstance(item, Prompt)]))
            for item in batch:
                if isinstance(item, Prompt):
                    results += itertools.islice(scored, answers)
                else:
                    results += item.rejected.of_answers(item.sequence, answers)
        return results

    def _tapped(self, prompts: Sequence[Prompt]) -> list[ScoreResult]:
        specs: list[RequestSpec] = [self._score_spec(prompt) for prompt in prompts]
        requests = [
            Request(prompt.inputs, self._parameters(spec, max_tokens=1, temperature=0), self._is_adapted)
            for prompt, spec in zip(prompts, specs, strict=True)
        ]
        with self._dropped_after_errors(specs):
            self._engine.run(requests)
            return self._take([prompt.sequence for prompt in prompts], specs)

    def _published(self, prompts: Sequence[Prompt]) -> list[ScoreResult]:
        parameters = self._vllm.SamplingParams(
            prompt_logprobs=self._top_k, max_tokens=1, temperature=0, flat_logprobs=True, detokenize=False
        )
        outputs = self._engine.run([Request(prompt.inputs, parameters, self._is_adapted) for prompt in prompts])
        return [
            read_prompt_logprobs(
                output.prompt_logprobs,
                prompt.sequence,
                top_k=self._top_k,
                min_prob=self._settings.min_prob,
                token_count=self._settings.token_count,
                expansion=prompt.expansion,
            )
            for output, prompt in zip(outputs, prompts, strict=True)
        ]

    def _answered(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[ScoreResult]:
        numbered, limits = [(prompt, number) for prompt in prompts for number in range(sampling.n)], self._limits
        specs = [self._answer_spec(prompt, number, sampling) for prompt, number in numbered]
        requests = [
            Request(
                prompt.inputs,
                self._parameters(
                    spec,
                    max_tokens=spec["max_answer_tokens"],
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=answer_seed(seed=sampling.seed, sample_id=prompt.sequence.sample_id, number=number),
                    stop=list(sampling.stop),
                    **limits,
                    detokenize=bool(sampling.stop),
                    skip_special_tokens=False,  # a stop text may hold one, as with the other engines
                ),
            )
            for (prompt, number), spec in zip(numbered, specs, strict=True)
        ]
        sequences = []
        with self._dropped_after_errors(specs):
            for (prompt, number), output in zip(numbered, self._engine.run(requests), strict=True):
                answer = output.outputs[0]
                reason = "length" if answer.finish_reason == "length" else "stop"
                sequences.append(
                    answer_sequence(
                        prompt.sequence, answer.token_ids, number=number, answers=sampling.n, finish_reason=reason
                    )
                )
            results = self._take(sequences, specs)
        return [
            self._checked_answer(result, tokens_before=prompt.sequence.token_ids.size)
            for (prompt, _), result in zip(numbered, results, strict=True)
        ]

    def _checked_answer(self, result: ScoreResult, *, tokens_before: int) -> ScoreResult:
        """The result, unless the answer holds a token that a student would read as an image."""
        if self._images is None or not isinstance(result, ScoredSequence):
            return result
        try:
            self._images.check_answer(result.sequence.token_ids[tokens_before:])
        except RowRejected as rejected:
            return rejected.of(result.sequence)
        return result

    @property
    def _limits(self) -> dict[str, Any]:
        """No ids of padding, and the header's end tokens in place of vLLM's own; of earlier releases it has none."""
        ids = self._header.about.end_token_ids
        bias = {"logit_bias": padding_bias(self._header)}
        return {**bias, "stop_token_ids": list(ids), "ignore_eos": True} if ids else bias

    def _score_spec(self, prompt: Prompt) -> RequestSpec:
        spans = prompt.sequence.target_spans
        spec: RequestSpec = {
            "number": next(self._numbers),
            "sample_id": prompt.sequence.sample_id,
            "spans": prompt.expansion.spans(spans),
        }
        if prompt.sequence.score_ids is not None:
            spec["score_ids"] = prompt.sequence.score_ids.tolist()
        if prompt.sequence.media or prompt.sequence.stored:
            spec["stored_starts"] = prompt.sequence.as_stored.target_spans[:, 0].tolist()
        return spec

    def _answer_spec(self, prompt: Prompt, number: int, sampling: SamplingConfig) -> RequestSpec:
        sequence, tokens = prompt.sequence, prompt.expansion.token_ids.size
        spec: RequestSpec = {
            "number": next(self._numbers),
            "sample_id": answer_name(sequence.sample_id, number, answers=sampling.n),
            "max_answer_tokens": answer_room(sequence, sampling=sampling, header=self._header, tokens=tokens),
        }
        if sequence.media or sequence.stored:
            spec["stored_starts"] = [sequence.as_stored.token_ids.size - 1]
        return spec

    def _parameters(self, spec: RequestSpec, *, detokenize: bool = False, **parameters: Any) -> Any:
        """vLLM's sampling parameters. A cached prefix is not read: its positions would never be computed."""
        return self._vllm.SamplingParams(
            detokenize=detokenize, extra_args={SPEC_KEY: spec}, skip_reading_prefix_cache=True, **parameters
        )

    @contextmanager
    def _dropped_after_errors(self, specs: Sequence[RequestSpec]) -> Iterator[None]:
        """After an error nobody takes the results of the call's other requests: the worker must not keep them."""
        try:
            yield
        except BaseException:
            with suppress(Exception):  # the worker may be the one that failed; the first error is the one to raise
                self._engine.call_workers("coldstill_drop", [spec["number"] for spec in specs])
            raise

    def _take(self, sequences: Sequence[TokenSequence], specs: Sequence[RequestSpec]) -> list[ScoreResult]:
        """Take what the tap kept of these finished requests. Raises `TeacherOutputInvalid`."""
        numbers = [spec["number"] for spec in specs]
        sizes = [span_positions(sequence.target_spans).size for sequence in sequences]
        results: list[ScoreResult] = []
        start = 0
        while start < len(sequences):
            stop, size = start + 1, sizes[start]
            while stop < len(sequences) and (size + sizes[stop]) * self._settings.row_bytes() <= _TAKEN_BYTES:
                size += sizes[stop]
                stop += 1
            answers = self._engine.call_workers("coldstill_take", numbers[start:stop], sizes[start:stop])
            kept = next(answer for answer in answers if answer is not None)
            results += map(self._result, sequences[start:stop], kept)
            start = stop
        return results

    def _result(self, sequence: TokenSequence, taken: Sequence[Any]) -> ScoreResult:
        problem, is_finite, recomputed, padding_mass, *parts = taken
        if not problem and not is_finite:
            return non_finite(sequence.sample_id, sequence.source_row)
        labels = sequence.token_ids[span_positions(sequence.target_spans) + 1]
        arrays = None if problem else Arrays.from_wire(parts, positions=labels.size, settings=self._settings)
        if arrays is not None and not np.array_equal(arrays.labels, labels):
            problem = "the engine computed other tokens than it was given"
        if arrays is None or problem:
            raise TeacherOutputInvalid(
                f"row {sequence.sample_id!r} in vLLM's worker",
                found=problem,
                wanted="a distribution at each target position",
                fix="set teacher.tap: public to compare, or remove the row from the source",
            )
        self._facts["recomputed_positions"] += recomputed
        mean_padding_mass = padding_mass / max(1, labels.size)
        self._facts["mass_beyond_tokens"] = max(self._facts["mass_beyond_tokens"], mean_padding_mass)
        return ScoredSequence(sequence, arrays.targets(draw_logprobs=self._header.draw_logprobs))
