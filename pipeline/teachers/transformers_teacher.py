"""The transformers engine: slow and plain, with exact tails and draws.

For models that vLLM does not support, and as the reference. One sequence at a time, so that its values do not depend on
its neighbors. Shape letters: `T` tokens, `N` target positions, `H` width of hidden states, `V` vocabulary.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from coldstill.common.attention import LEAK, PLAIN, TOLERANCE, attends_ahead, use_correct_attention
from coldstill.common.errors import first_line
from coldstill.common.processor import type_input_of
from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.score_ids import rows_at
from coldstill.pipeline.teachers.adapter import adapter_of, merged_head
from coldstill.pipeline.teachers.checkpoint import (
    check_weights,
    end_token_ids,
    load_tokenizer,
    way_out,
)
from coldstill.pipeline.teachers.engine_args import loaded_quantization, require_loaded
from coldstill.pipeline.teachers.image_expansion import Expansion, RowRejected, as_stored, check_no_images
from coldstill.pipeline.teachers.image_probe import image_probe
from coldstill.pipeline.teachers.local_expansion import local_expander
from coldstill.pipeline.teachers.protocol import ScoredSequence, ScoreResult, TokenSequence, answer_name, non_finite
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import span_positions

from .answer_sampling import StopTexts, answer_room, answer_sequence, answer_uniforms, next_token
from .target_extractor import (
    Summary,
    TargetExtractor,
    draw_uniforms,
    named_on,
    split_width,
    systematic_draws,
    targets_of,
    uniform_count,
)

_LATER = 4
"""Tokens at the end of a row that are replaced to see whether earlier ones depend on them."""

log = logging.getLogger(__name__)


class TransformersTeacher:
    """A causal language model of transformers; see `protocol.Teacher`."""

    def __init__(
        self,
        config: TeacherConfig,
        header: DatasetHeader,
        sampling: SamplingConfig | None = None,
        *,
        device: str | None = None,
    ):
        """`device`: where the model is computed, by default the GPU if there is one. Raises `TeacherUnusable`."""
        self._config, self._header, self._sampling = config, header, sampling
        self._model = load_model(config, header, device=device)
        self._expander = local_expander(config, header) if header.about.processor else None
        self._images = self._expander.rules if self._expander else None
        self._extract = TargetExtractor(
            top_k=config.top_k,
            min_prob=config.min_prob,
            kept_draws=header.kept_draws,
            token_count=header.token_count,
            named_width=split_width(header)[1],
            systematic_draws=systematic_draws(header.draws, draw_method=header.draw_method),
        )
        self._one_at_a_time = threading.Lock()
        self._progress = 0
        for layers in self._model.modules():
            for layer in layers if isinstance(layers, nn.ModuleList) else ():
                layer.register_forward_hook(self._count_progress)
        if sampling is not None:
            tokenizer = load_tokenizer(config)
            self._end_ids = frozenset(header.about.end_token_ids or end_token_ids(config, tokenizer))
            self._stops = StopTexts(sampling.stop, tokenizer)
        check_weights(self._score_given, header, model=config.model, images=self._images)
        if self._images is not None:
            self._require_causal_text(image_probe(header, self._images, seed=0))

    @property
    def environment(self) -> dict[str, Any]:
        """See `protocol.Teacher`."""
        return {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self._model.device.type == "cuda" else "cpu",
        }

    @property
    def progress(self) -> int:
        """See `protocol.Teacher`: layers computed. One long row on a CPU can outlast the watchdog's wait."""
        return self._progress

    @property
    def processes(self) -> tuple[int, ...]:
        """See `protocol.Teacher`: none, it runs in the caller's own process."""
        return ()

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        """See `protocol.Teacher`. An answer is a function of its prompt and (seed, sample id, number)."""
        if self._sampling is None:
            return self._score_given(sequences)
        return [answer for prompt in sequences for answer in self._answers(prompt, self._sampling)]

    def _score_given(self, sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        return [self._score_one(sequence) for sequence in sequences]

    @torch.inference_mode()
    def _score_one(self, sequence: TokenSequence) -> ScoreResult:
        positions = span_positions(sequence.target_spans)
        stored = span_positions(sequence.as_stored.target_spans)
        with self._one_at_a_time:
            try:
                expansion, inputs = self._expanded(sequence, is_prompt=False)
            except RowRejected as rejected:
                return rejected.of(sequence)
            tokens = self._on_device(expansion.token_ids)
            wanted = torch.from_numpy(expansion.positions(positions)).to(tokens.device)
            # The head is applied at the wanted positions only: [1, N, V].
            logits = self._model(input_ids=tokens[None], logits_to_keep=wanted, use_cache=False, **inputs).logits[0]
            summary = self._summary(
                logits, tokens[wanted + 1], stored, sample_id=sequence.sample_id, named=sequence.score_ids
            )
        return self._result(sequence, summary)

    def _expanded(self, sequence: TokenSequence, *, is_prompt: bool) -> tuple[Expansion, dict[str, Any]]:
        """The row as the model computes it, and the model's inputs for its images. Raises `RowRejected`."""
        if self._expander is None:
            check_no_images(sequence)
            return as_stored(sequence), {}
        row = self._expander.expanded(sequence, is_prompt=is_prompt)
        inputs = dict(row.inputs)
        if inputs and (name := type_input_of(self._model.forward)):
            inputs[name] = torch.from_numpy(self._expander.token_types(row.expansion))[None]
        return row.expansion, {name: self._as_input(value) for name, value in inputs.items()}

    @torch.inference_mode()
    def _require_causal_text(self, row: TokenSequence) -> None:
        """Raise `TeacherUnusable` if logits after an image depend on later tokens.

        Some families, such as PaliGemma, read an image and all that follows as one prefix. The targets of an answer
        would then be of a model that has seen it.
        """
        expansion, inputs = self._expanded(row, is_prompt=False)
        tokens = self._on_device(expansion.token_ids)
        later = slice(tokens.numel() - _LATER, None)
        changed = tokens.clone()
        changed[later] = tokens[later.start - _LATER : later.start]
        start = int(expansion.positions(expansion.images)[-1])
        one, other = (
            self._model(input_ids=each[None], use_cache=False, **inputs).logits[0, start : later.start].float()
            for each in (tokens, changed)
        )
        limit = TOLERANCE if self._model.dtype == torch.float32 else LEAK
        if bool((one - other).abs().max() > limit * one.abs().max()):
            raise TeacherUnusable(
                f"{self._config.model}: attention in a row with an image",
                found=f"logits of a {type(self._model).__name__} that depend on later tokens",
                wanted="a model that reads the text after an image from left to right",
                fix="choose a teacher of another family; this one reads a prompt as a whole",
            )

    def _as_input(self, value: Any) -> Any:
        """Pixels in the model's data type, as its own processors' users pass them; all tensors on its device."""
        if not isinstance(value, Tensor):
            return value
        return value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)

    @torch.inference_mode()
    def _answers(self, prompt: TokenSequence, sampling: SamplingConfig) -> list[ScoreResult]:
        with self._one_at_a_time:
            try:
                expansion, inputs = self._expanded(prompt, is_prompt=True)
            except RowRejected as rejected:
                return rejected.of_answers(prompt, sampling.n)
            room = answer_room(prompt, sampling=sampling, header=self._header, tokens=expansion.token_ids.size)
            logits, cache = self._forward(self._on_device(expansion.token_ids), inputs=inputs)
            last = sampling.n - 1
            return [
                self._answer(
                    prompt, n, sampling, room=room, logits=logits, cache=cache if n == last else copy.deepcopy(cache)
                )
                for n in range(last + 1)
            ]

    def _answer(
        self, prompt: TokenSequence, number: int, sampling: SamplingConfig, *, room: int, logits: Tensor, cache: object
    ) -> ScoreResult:
        """One answer of at most `room` tokens. `logits [1, V]` and `cache`, of keys and values: the prompt's."""
        name = answer_name(prompt.sample_id, number, answers=sampling.n)
        uniforms = answer_uniforms(seed=sampling.seed, sample_id=prompt.sample_id, number=number, count=room)
        positions = prompt.as_stored.token_ids.size - 1 + np.arange(room)
        answer: list[int] = []
        summaries: list[Summary] = []
        while True:
            here = positions[len(answer) : len(answer) + 1]
            scores: np.ndarray = logits[0, : self._header.token_count].float().cpu().numpy()
            if not np.isfinite(scores.max()):  # of NaN too
                return non_finite(name, prompt.source_row)
            uniform = uniforms[len(answer)]
            answer.append(next_token(scores, temperature=sampling.temperature, top_p=sampling.top_p, uniform=uniform))
            if self._images is not None:
                try:
                    self._images.check_answer(answer[-1:])
                except RowRejected as rejected:
                    return rejected.of(replace(prompt, sample_id=name))
            newest = torch.tensor(answer[-1:], device=self._model.device)
            summaries.append(self._summary(logits, newest, here, sample_id=name))
            is_stopped = answer[-1] in self._end_ids or self._stops.end(answer)
            if is_stopped or len(answer) == room:
                break
            logits, cache = self._forward(newest, cache)
        sequence = answer_sequence(
            prompt, answer, number=number, answers=sampling.n, finish_reason="stop" if is_stopped else "length"
        )
        whole = Summary(*map(torch.cat, zip(*summaries, strict=True)))
        return self._result(sequence, whole)

    def _forward(
        self, tokens: Tensor, cache: object = None, *, inputs: dict[str, Any] | None = None
    ) -> tuple[Tensor, object]:
        """Logits `[1, V]` after `tokens int64 [T]` that follow those in the cache, and the cache with them.

        `inputs`: those of a prompt's images.
        """
        output = self._model(
            input_ids=tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=1, **(inputs or {})
        )
        grown = getattr(output, "past_key_values", None)
        if grown is None:
            raise TeacherUnusable(
                f"{self._config.model} in mode generate", found="no key-value cache", wanted="a model that has one"
            )
        return output.logits[0], grown

    def _summary(
        self,
        logits: Tensor,
        labels: Tensor,
        positions: np.ndarray,
        *,
        sample_id: str,
        named: np.ndarray | None = None,
    ) -> Summary:
        """`positions`: those of the stored row."""
        header = self._header
        count = uniform_count(header.draws, draw_method=header.draw_method)
        uniforms = draw_uniforms(positions, draws=count, seed=header.draw_seed, sample_id=sample_id)
        at = None if named is None else rows_at(named, slice(None), positions.size)
        return self._extract(
            logits,
            labels.to(logits.device),
            torch.from_numpy(uniforms).to(logits.device),
            named_on(logits.device, at),
        )

    def _result(self, sequence: TokenSequence, summary: Summary) -> ScoreResult:
        if not bool(summary.finite.all()):
            return non_finite(sequence.sample_id, sequence.source_row)
        return ScoredSequence(sequence, targets_of(summary, draw_logprobs=self._header.draw_logprobs))

    def _on_device(self, token_ids: np.ndarray) -> Tensor:
        return torch.from_numpy(token_ids.astype(np.int64)).to(self._model.device)

    def _count_progress(self, *_: object) -> None:
        self._progress += 1


def load_model(config: TeacherConfig, header: DatasetHeader, *, device: str | None = None) -> Any:
    """The model in evaluation mode, on the GPU if there is one; its logits have the header's `head_dtype`.

    Its attention is the eager one if the default of its class computes something else.

    Raises `TeacherUnusable`.
    """
    try:
        model = _class_of(header).from_pretrained(
            config.model, revision=config.revision, dtype=header.teacher.dtype, **config.engine_args
        )
    except (ValueError, OSError, ImportError, TypeError) as error:  # TypeError: of an argument that it does not take
        raise TeacherUnusable(
            config.model,
            found=first_line(error),
            wanted="a model that transformers loads, with the arguments of teacher.engine_args",
            fix=way_out(error),
        ) from error
    if loaded := loaded_quantization(model):
        require_loaded(config, recorded=header.teacher.quantization, loaded=loaded)
    adapter = adapter_of(config) if config.adapter else None
    if adapter is not None:
        model = adapter.on(model)
    if "device_map" not in config.engine_args:  # with one, accelerate has placed the model and moves tensors itself
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_attention(model, config)
    if header.teacher.head_dtype == "float32" and model.dtype != torch.float32:
        head = model.get_output_embeddings()
        model.set_output_embeddings(_float32_head(config, head if adapter is None else merged_head(head)))
    return model.eval()


def _class_of(header: DatasetHeader) -> Any:
    if header.about.processor is None:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


@torch.no_grad()
def _check_attention(model: Any, config: TeacherConfig) -> None:
    """Set `model` to eager attention, with a warning, if its own implementation gives other logits.

    Raises `TeacherUnusable` if the user named the implementation, or if the model attends to later tokens.
    """
    difference = use_correct_attention(model)
    if attends_ahead(model):
        raise TeacherUnusable(
            f"{config.model}: attention",
            found=f"logits of a {type(model).__name__} that depend on later tokens",
            wanted="a causal language model",
            fix="if its class can be a decoder, set is_decoder to true in its config.json",
        )
    if difference is None:
        return
    if "attn_implementation" in config.engine_args:
        raise TeacherUnusable(
            f"{config.model}: teacher.engine_args.attn_implementation",
            found=str(difference),
            wanted="an implementation with everything that the model's configuration requests, such as a soft-cap",
            fix=f"set it to {PLAIN}, or leave it out",
        )
    log.warning("%s: %s, so %s attention is used", config.model, difference, PLAIN)


class _Float32Head(nn.Module):
    """A float32 copy of a linear head. What the model does to its logits afterwards (scales, caps) is float32 too."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.linear = copy.deepcopy(head).float()

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., H]` of any float type to float32 logits `[..., V]`."""
        logits: Tensor = self.linear(hidden.float())
        return logits


def _float32_head(config: TeacherConfig, head: object) -> nn.Module:
    if type(head) is not nn.Linear:
        raise TeacherUnusable(
            f"{config.model}: output embeddings",
            found=type(head).__name__,
            wanted="a plain linear layer, whose float32 copy gives float32 logits",
            fix="teacher.head_dtype: model",
        )
    return _Float32Head(head)
