"""Builds requests to a server's completions endpoint, and makes `TeacherTargets` from its responses.

The layout is vLLM's (vllm/entrypoints/openai/completion/protocol.py, read and run at 0.32), where ids, not texts, name
the entries: two tokens may have one text. Responses are untrusted. Shape letters: `N` target positions, `K`
teacher top-k.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.teachers.protocol import ScoredSequence, ScoreResult, TokenSequence, non_finite
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import MASS_TOLERANCE, span_positions

from .answer_sampling import answer_sequence
from .image_expansion import Expansion, as_stored
from .topk_entries import targets_of_entries

_ID = re.compile("(?:0|[1-9][0-9]{0,6})")
_ANSWER_KEY = "token_id:"
_MINUS_INFINITY = -9999.0
"""JSON has no -inf: vLLM writes this."""
_MAX_NUMBER = 1e9
_ALL_NAN: Mapping[int, float] = {-1: math.nan}
"""The entries of a position whose values are all NaN."""


def serve_command(config: TeacherConfig, *, images: bool = False) -> str:
    """The command that starts a server with suitable responses; of rows with images too."""
    command = (
        f"vllm serve {config.model} --max-logprobs {config.top_k} --logprobs-mode raw_logprobs "
        f"--max-model-len {config.read_length + 1}"
    )
    limit = f""" --enable-scale-out --limit-mm-per-prompt '{{"image": {config.max_images}}}'"""
    return command + limit if images else command


def score_fields(top_k: int) -> dict[str, Any]:
    """Fields of a request for the log-probs of its prompt. A server must sample one token, which is not read."""
    return {"prompt_logprobs": top_k, "max_tokens": 1, "temperature": 0}


def tokens_alone(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `answer_fields` that decide the tokens of an answer, for an endpoint that takes nothing else."""
    return {name: value for name, value in fields.items() if name != "logprobs" and not name.startswith("return_")}


def answer_fields(header: DatasetHeader, *, sampling: SamplingConfig, room: int, seed: int) -> dict[str, Any]:
    """Fields of a request for an answer of at most `room` tokens, with log-probs by token id."""
    ends = header.about.end_token_ids
    return {
        "max_tokens": room,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
        "stop": [text for text in sampling.stop if text],
        # The header's end tokens in place of the server's own; headers of earlier releases have none.
        **({"stop_token_ids": list(ends), "ignore_eos": True} if ends else {}),
        "skip_special_tokens": False,  # a stop text may be one
        "logprobs": header.top_k,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        # A server's own defaults, from the model's generation config, would change what is sampled.
        "top_k": 0,
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }


class PayloadReader:
    """Reads the responses of one server. All methods raise `TeacherOutputInvalid`."""

    def __init__(self, config: TeacherConfig, header: DatasetHeader):
        self._config, self._header = config, header

    def prompt(self, document: object, sequence: TokenSequence) -> ScoreResult:
        """Targets from `prompt_logprobs`: a list with an object for each token and null for the first.

        The object of token `j`, ids to log-probs, is the distribution of target position `j - 1`.
        """
        where = f"the server's prompt log-probs of row {sequence.sample_id!r}"
        return self._prompt(self._choice(document, where).get("prompt_logprobs"), sequence, as_stored(sequence), where)

    def prompt_with_images(self, document: object, sequence: TokenSequence, expansion: Expansion) -> ScoreResult:
        """The same of a response that has the list outside of its choice, for the tokens of a proven expansion."""
        where = f"the server's prompt log-probs of row {sequence.sample_id!r}"
        found = document.get("prompt_logprobs") if isinstance(document, dict) else None
        return self._prompt(found, sequence, expansion, where)

    def _prompt(self, found: object, sequence: TokenSequence, expansion: Expansion, where: str) -> ScoreResult:
        if not isinstance(found, list) or len(found) != expansion.token_ids.size:
            self._fail(where, _shape(found), f"a list of {expansion.token_ids.size}, one for each token")
        positions = expansion.positions(span_positions(sequence.target_spans))
        entries = [_prompt_entries(found[position + 1]) for position in positions]
        return self._result(sequence, entries, where)

    def tokens(self, document: object, prompt: TokenSequence, *, number: int, answers: int, room: int) -> TokenSequence:
        """An answer of at most `room` tokens, without distributions."""
        where = f"the server's answer {number} to row {prompt.sample_id!r}"
        choice = self._choice(document, where)
        return self._answer_sequence(choice, prompt, where, number=number, answers=answers, room=room)

    def answer(self, document: object, prompt: TokenSequence, *, number: int, answers: int, room: int) -> ScoreResult:
        """An answer of at most `room` tokens, with targets from `logprobs.top_logprobs` (keys `token_id:ID`)."""
        where = f"the server's answer {number} to row {prompt.sample_id!r}"
        choice = self._choice(document, where)
        if choice.get("prompt_token_ids") != prompt.token_ids.tolist():
            self._fail(where, "an answer to another prompt, or no prompt_token_ids", "the prompt's own token ids")
        sequence = self._answer_sequence(choice, prompt, where, number=number, answers=answers, room=room)
        tokens, logprobs = sequence.token_ids[prompt.token_ids.size :], choice.get("logprobs")
        tops = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(tops, list) or len(tops) != len(tokens):
            self._fail(where, f"top_logprobs: {_shape(tops)}", f"a list of {len(tokens)}, one for each token")
        return self._result(sequence, [_answer_entries(top) for top in tops], where)

    def _answer_sequence(
        self, choice: Mapping[str, Any], prompt: TokenSequence, where: str, *, number: int, answers: int, room: int
    ) -> TokenSequence:
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list) or not 0 < len(tokens) <= room:
            self._fail(where, f"token_ids: {_shape(tokens)}", f"1 to {room} token ids")
        for token in tokens:
            if type(token) is not int or not 0 <= token < self._header.token_count:
                self._fail(where, f"token id {token!r:.40}", f"0..{self._header.token_count - 1}")
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            self._fail(where, f"finish_reason {reason!r:.40}", "stop or length")
        return answer_sequence(prompt, tokens, number=number, answers=answers, finish_reason=reason)

    def _result(
        self, sequence: TokenSequence, entries: Sequence[Mapping[int, float] | None], where: str
    ) -> ScoreResult:
        """The sequence with targets from entries that hold the K best ids of a position, or these and the label."""
        positions = span_positions(sequence.target_spans)
        labels = sequence.token_ids[positions + 1]
        top_k, header = self._config.top_k, self._header
        ids, logprobs = np.empty((len(entries), top_k), np.int32), np.empty((len(entries), top_k))
        label_logprobs = np.empty(len(entries))
        for n, (entry, label, position) in enumerate(zip(entries, labels.tolist(), positions.tolist(), strict=True)):
            if entry is _ALL_NAN:
                return non_finite(sequence.sample_id, sequence.source_row)
            if entry is None:
                self._fail(
                    where, f"position {position} is missing, or is not ids and log-probs", "one of each position"
                )
            if label not in entry or len(entry) not in (top_k, top_k + 1):
                self._fail(
                    where,
                    f"{len(entry)} entries at position {position}, {'with' if label in entry else 'without'} the label",
                    f"{top_k} and the label's",
                )
            label_logprobs[n] = entry[label]
            best = [id_ for id_ in entry if id_ != label] if len(entry) > top_k else list(entry)
            ids[n], logprobs[n] = best, [entry[id_] for id_ in best]
        if ids.size and ids.max() >= header.vocab_size:
            self._fail(
                where, f"token id {ids.max()}", f"ids below {header.vocab_size}; the server may run another model"
            )
        targets = targets_of_entries(
            labels,
            label_logprobs,
            ids,
            logprobs,
            min_prob=self._config.min_prob,
            token_count=header.token_count,
            where=where,
            fix=serve_command(self._config),
        )
        # The K best of V entries hold at least K / V of a softmax; logits that are all negative look like log-probs.
        least = top_k / header.vocab_size * (1 - MASS_TOLERANCE)
        mass = np.exp(logprobs).sum(1)
        if mass.size and mass.min() < least:
            self._fail(where, f"{top_k} best entries of mass {mass.min():.3g}", f"log-probs: at least {least:.3g}")
        return ScoredSequence(sequence, targets)

    def _choice(self, document: object, where: str) -> Mapping[str, Any]:
        choices = document.get("choices") if isinstance(document, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            self._fail(where, f"choices: {_shape(choices)}", "a list with one object")
        choice: Mapping[str, Any] = choices[0]
        return choice

    def _fail(self, where: str, found: str, wanted: str) -> NoReturn:
        raise TeacherOutputInvalid(where, found=found, wanted=wanted, fix=serve_command(self._config))


def _prompt_entries(value: object) -> Mapping[int, float] | None:
    """From `{"ID": {"logprob": ...}}`; None for anything else."""
    found: dict[int, object] = {}
    for key, entry in value.items() if isinstance(value, dict) else ():
        if not _ID.fullmatch(key) or not isinstance(entry, dict):
            return None
        found[int(key)] = entry.get("logprob")
    return _entries(found)


def _answer_entries(value: object) -> Mapping[int, float] | None:
    """From `{"token_id:ID": ...}`; None for anything else."""
    found: dict[int, object] = {}
    for key, logprob in value.items() if isinstance(value, dict) else ():
        id_ = key.removeprefix(_ANSWER_KEY)
        if id_ == key or not _ID.fullmatch(id_):
            return None
        found[int(id_)] = logprob
    return _entries(found)


def _entries(found: Mapping[int, object]) -> Mapping[int, float] | None:
    # A softmax with a NaN or infinite logit is NaN everywhere; a single NaN is an error of the server.
    if found and all(isinstance(value, float) and math.isnan(value) for value in found.values()):
        return _ALL_NAN
    return {id_: _logprob(value) for id_, value in found.items()} or None


def _logprob(value: object) -> float:
    """A float; NaN for what is not a number, which `targets_of_entries` reports."""
    if type(value) not in (int, float) or not abs(value) <= _MAX_NUMBER:  # type: ignore[arg-type]
        return float("-inf") if value == float("-inf") else float("nan")
    return float("-inf") if value <= _MINUS_INFINITY else float(value)  # type: ignore[operator, arg-type]


def _shape(value: object) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else type(value).__name__
