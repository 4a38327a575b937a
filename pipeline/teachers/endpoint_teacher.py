"""The endpoint engine: an OpenAI-compatible server, such as `vllm serve`.

Rows with images go to another endpoint of the server; see `endpoint_images.py`.

The server must return log-probs by token id. It returns K entries per position: the tail is derived and there are no
draws. It batches requests as they arrive, so that repeated values are equal within its tolerance, not bit by bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from coldstill.common.models import FrozenModel
from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import EndpointFailed, EndpointRefused, TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.protocol import (
    ScoredSequence,
    ScoreResult,
    TokenSequence,
    UnscoredSequence,
    answer_name,
    non_finite,
)
from coldstill.storage_schema.header import DatasetHeader

from .answer_sampling import answer_room, answer_seed
from .endpoint_client import NAN_MESSAGE, EndpointClient
from .endpoint_images import PATH, request_body, require_expansion
from .endpoint_payload import PayloadReader, answer_fields, score_fields, serve_command, tokens_alone
from .image_expansion import RowRejected, check_no_images
from .image_probe import image_probe
from .local_expansion import ExpandedRow, local_expander

_ENTRY_BYTES = 512
"""Maximum bytes of one entry of a response, with its text; vLLM's entries take about 80."""
_OTHER_BYTES = 1 << 20
_PROBE_TEMPERATURE, _PROBE_TOKENS = 0.5, 4
_PROBE_NATS, _PROBE_SHARE = 0.25, 0.05
"""Two rounding steps of a bfloat16 head; log-probs at another temperature are off by whole nats."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class EndpointArguments(FrozenModel):
    """`teacher.engine_args` of engine endpoint."""

    served_model: str | None = Field(
        default=None, description="Name of the model at the server; by default teacher.model."
    )
    concurrency: int = Field(default=32, ge=1, le=1024, description="Maximum number of concurrent requests per worker.")
    timeout_s: float = Field(default=300, gt=0, description="Limit of one request; keep it below cluster.hung_after_s.")
    attempts: int = Field(
        default=8, ge=1, le=100, description="Attempts of a request, with waits of up to half a minute between."
    )


class EndpointTeacher:
    """A teacher on a remote server; see `protocol.Teacher`."""

    def __init__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None):
        """Raises `TeacherUnusable` for a server of another model, or one that returns no log-probs."""
        assert config.endpoint is not None
        self._config, self._header, self._sampling = config, header, sampling
        self._arguments = _arguments(config)
        self._client, self._images_client = (
            EndpointClient(
                url,
                connections=self._arguments.concurrency,
                timeout_s=self._arguments.timeout_s,
                attempts=self._arguments.attempts,
            )
            for url in (config.endpoint, config.endpoint.rstrip("/").removesuffix("/v1"))
        )
        self._read = PayloadReader(config, header)
        self._expander = local_expander(config, header)
        self._expanding = threading.Lock()  # a processor is not thread-safe
        self._threads = ThreadPoolExecutor(self._arguments.concurrency, thread_name_prefix="endpoint")
        self._model = self._arguments.served_model or config.model
        card = self._client.get("/models", at_most=_OTHER_BYTES, read=self._card)
        self._owner = ascii(card.get("owned_by"))[:100].strip("'")
        self._probe()

    @property
    def environment(self) -> dict[str, Any]:
        """See `protocol.Teacher`."""
        return {"engine": "endpoint", "served_model": self._model, "served_by": self._owner}

    @property
    def progress(self) -> int:
        """See `protocol.Teacher`: parts of responses received, and attempts that ended."""
        return self._client.progress + self._images_client.progress

    @property
    def processes(self) -> tuple[int, ...]:
        """See `protocol.Teacher`: none, because the server is remote."""
        return ()

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        """See `protocol.Teacher`. Raises `EndpointFailed` too. Each answer is a separate request with its own seed."""
        sampling = self._sampling
        if sampling is None:
            return self._each(self._score_one, sequences)
        wanted = [(prompt, number) for prompt in sequences for number in range(sampling.n)]
        return self._each(lambda item: self._answer(*item, sampling), wanted)

    def _each(self, do: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        futures = [self._threads.submit(do, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _score_one(self, sequence: TokenSequence) -> ScoreResult:
        body = score_fields(self._config.top_k)
        try:
            row = self._expanded(sequence, is_prompt=False)
            if row is not None:
                return self._score_with_images(sequence, row, body)
        except RowRejected as rejected:
            return rejected.of(sequence)
        return self._complete(
            sequence,
            sequence.sample_id,
            body,
            tokens=sequence.token_ids.size,
            read=lambda document: self._read.prompt(document, sequence),
        )

    def _score_with_images(self, sequence: TokenSequence, row: ExpandedRow, fields: dict[str, Any]) -> ScoreResult:
        def read(document: object) -> ScoreResult:
            self._require_expansion(document, sequence, row)
            return self._read.prompt_with_images(document, sequence, row.expansion)

        return self._generate(sequence, sequence.sample_id, row, fields, read=read)

    def _answer_with_images(
        self, prompt: TokenSequence, number: int, sampling: SamplingConfig, row: ExpandedRow
    ) -> ScoreResult:
        """The tokens first, and then the distributions of them: that endpoint lacks the last of the K best if another
        token was sampled."""
        tokens = row.expansion.token_ids.size
        room = answer_room(prompt, sampling=sampling, header=self._header, tokens=tokens)
        seed = answer_seed(seed=sampling.seed, sample_id=prompt.sample_id, number=number)

        def read(document: object) -> TokenSequence:
            self._require_expansion(document, prompt, row)
            return self._read.tokens(document, prompt, number=number, answers=sampling.n, room=room)

        fields = tokens_alone(answer_fields(self._header, sampling=sampling, room=room, seed=seed))
        name = answer_name(prompt.sample_id, number, answers=sampling.n)
        answer = self._generate(prompt, name, row, fields, read=read)
        if isinstance(answer, UnscoredSequence):
            return answer
        assert self._expander is not None
        self._expander.rules.check_answer(answer.token_ids[prompt.token_ids.size :])
        return self._score_one(answer)

    def _expanded(self, sequence: TokenSequence, *, is_prompt: bool) -> ExpandedRow | None:
        """A row with images, or None for one of text. Raises `RowRejected`."""
        if self._expander is None:
            check_no_images(sequence)
            return None
        with self._expanding:
            row = self._expander.expanded(sequence, is_prompt=is_prompt)
        return row if row.images else None

    def _require_expansion(self, document: object, sequence: TokenSequence, row: ExpandedRow) -> None:
        assert self._expander is not None
        require_expansion(document, sequence, row, self._expander.rules)

    def _generate(
        self,
        prompt: TokenSequence,
        name: str,
        row: ExpandedRow,
        fields: dict[str, Any],
        *,
        read: Callable[[object], Result],
    ) -> Result | UnscoredSequence:
        try:
            return self._images_client.post(
                PATH,
                {"model": self._model, **request_body(prompt, row, fields)},
                at_most=_OTHER_BYTES + _ENTRY_BYTES * self._config.read_length * (self._config.top_k + 1),
                read=read,
            )
        except EndpointFailed as error:
            return self._failure(error, prompt, name)

    def _failure(self, error: EndpointFailed, prompt: TokenSequence, name: str) -> UnscoredSequence:
        if isinstance(error, EndpointRefused) and NAN_MESSAGE in str(error.found):
            return non_finite(name, prompt.source_row)
        raise error.at(f"row {prompt.sample_id!r}") from error

    def _answer(self, prompt: TokenSequence, number: int, sampling: SamplingConfig) -> ScoreResult:
        name = answer_name(prompt.sample_id, number, answers=sampling.n)
        try:
            row = self._expanded(prompt, is_prompt=True)
            if row is not None:
                return self._answer_with_images(prompt, number, sampling, row)
            result = self._answer_to_text(prompt, name, number, sampling)
            if self._expander is not None and isinstance(result, ScoredSequence):
                self._expander.rules.check_answer(result.sequence.token_ids[prompt.token_ids.size :])
        except RowRejected as rejected:
            return rejected.of(replace(prompt, sample_id=name))
        return result

    def _answer_to_text(self, prompt: TokenSequence, name: str, number: int, sampling: SamplingConfig) -> ScoreResult:
        room = answer_room(prompt, sampling=sampling, header=self._header)
        seed = answer_seed(seed=sampling.seed, sample_id=prompt.sample_id, number=number)
        body = answer_fields(self._header, sampling=sampling, room=room, seed=seed)
        return self._complete(
            prompt,
            name,
            body,
            tokens=prompt.token_ids.size + room,
            read=lambda document: self._read.answer(document, prompt, number=number, answers=sampling.n, room=room),
        )

    def _complete(
        self,
        prompt: TokenSequence,
        name: str,
        body: dict[str, Any],
        *,
        tokens: int,
        read: Callable[[object], ScoreResult],
    ) -> ScoreResult:
        try:
            return self._client.post(
                "/completions",
                {"model": self._model, "prompt": prompt.token_ids.tolist(), **body},
                at_most=_OTHER_BYTES + _ENTRY_BYTES * tokens * (self._config.top_k + 1),
                read=read,
            )
        except EndpointFailed as error:
            return self._failure(error, prompt, name)

    def _card(self, document: object) -> dict[str, Any]:
        """The entry of our model in the server's list of models."""
        cards = document.get("data") if isinstance(document, dict) else None
        cards = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
        card = next((card for card in cards if card.get("id") == self._model), None)
        if card is None:
            raise TeacherUnusable(
                f"{self._client.url}/models",
                found=", ".join(ascii(card.get("id"))[:100] for card in cards[:10]) or "no model",
                wanted=self._model,
                fix="teacher.engine_args: {served_model: NAME}, or serve the model that teacher.model names",
            )
        length, needed = card.get("max_model_len"), self._config.read_length + 1
        if isinstance(length, int) and length < needed:
            key = "max_read_length" if self._config.max_read_length else "max_length"
            raise TeacherUnusable(
                f"{self._client.url}/models: max_model_len of {self._model}",
                found=length,
                wanted=f"at least {needed}: a row, and the one token that a server must sample",
                fix=f"VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 {serve_command(self._config)}, or a smaller teacher.{key}",
            )
        return card

    def _probe(self) -> None:
        """Score two tokens, one of them the highest id, and sample a few tokens of an answer in mode generate."""
        reserved = list(self._expander.rules.reserved) if self._expander else []
        allowed = np.setdiff1d(np.arange(self._header.token_count), reserved)
        tokens = allowed[[-1, 0]].astype(np.int32)
        row = TokenSequence(
            sample_id="probe", source_row=0, token_ids=tokens, target_spans=np.array([[0, 1]], np.int32)
        )
        reader = self._read
        self._read = PayloadReader(self._config.model_copy(update={"min_prob": 0.0}), self._header)
        try:
            self._require_finite(self._score_one(row))
            if self._sampling is not None:
                self._probe_answer(replace(row, token_ids=tokens[:1], target_spans=row.target_spans[:0]))
            if self._expander is not None:
                self._require_finite(self._score_one(image_probe(self._header, self._expander.rules, seed=0)))
        except (EndpointRefused, TeacherOutputInvalid) as error:
            raise TeacherUnusable(
                f"{self._client.url}: {error.what}",
                found=error.found,
                wanted=f"log-probs by token id, {self._config.top_k} per position, from this vocabulary",
                fix=serve_command(self._config, images=self._expander is not None),
            ) from error
        self._read = reader

    def _require_finite(self, result: ScoreResult) -> ScoredSequence:
        if isinstance(result, ScoredSequence):
            return result
        if result.reason is not RejectReason.NON_FINITE_LOGITS:
            raise TeacherOutputInvalid(
                "a row with a small image", found=f"{result.reason}: {result.detail}", wanted="one that is scored"
            )
        raise TeacherOutputInvalid(
            "log-probs of a probe", found="NaN or infinite logits", wanted="finite ones; check the server's weights"
        )

    def _probe_answer(self, prompt: TokenSequence) -> None:
        """Check that log-probs of sampled tokens are raw. A server may apply temperature and top-p to these, but never
        to those of a prompt."""
        tokens = min(_PROBE_TOKENS, self._header.max_length - 1)
        sampling = SamplingConfig(temperature=_PROBE_TEMPERATURE, max_tokens=tokens)
        answer, sampled = self._require_finite(self._answer(prompt, 0, sampling))
        _, scored = self._require_finite(self._score_one(answer))
        if not np.allclose(sampled.logprobs, scored.logprobs, atol=_PROBE_NATS, rtol=_PROBE_SHARE):
            raise TeacherOutputInvalid(
                "log-probs of an answer",
                found="values that differ from those of the same tokens in a prompt",
                wanted="equal values",
            )


def _arguments(config: TeacherConfig) -> EndpointArguments:
    try:
        return EndpointArguments.model_validate(config.engine_args)
    except ValidationError as error:
        first = error.errors()[0]
        raise TeacherUnusable(
            f"teacher.engine_args.{'.'.join(map(str, first['loc']))}",
            found=first["msg"],
            wanted=f"of engine endpoint: {', '.join(EndpointArguments.model_fields)}",
        ) from None
