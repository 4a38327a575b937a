"""Rows with images for the engines' tests, and a slow reference that shares no code with the engines."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from coldstill.common.processor import processor_settings, processor_sha256
from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import About, ProcessorFacts
from coldstill.storage_schema.rows import MediaReference, spans_from_mask
from tests import making, vision

TOP_K, DRAWS, CONTEXT = 16, 12, 512
QUESTION, ANSWER = "<s>user:{}<end_of_utterance><s>assistant:", "{}<end_of_utterance>"
ROWS: tuple[tuple[str, str, tuple[tuple[int, int], ...]], ...] = (
    ("<image>What is this?", "It is 3.", ((40, 30),)),
    ("No image here.", "None at all", ()),
    ("<image>and <image>, which?", "The second one", ((60, 30), (30, 61))),
    ("<image><image>\n\nor\n<image>", "All of the three", ((31, 31), (80, 20), (20, 90))),
    ("Again none", "Yes", ()),
    ("Last: <image>", "8", ((33, 64),)),
)
"""Question, answer, and sizes of the images."""


def medium(position: int, data: bytes) -> MediaReference:
    """An image of a row."""
    return MediaReference(position=position, type="image/png", sha256=hashlib.sha256(data).hexdigest(), data=data)


def row(
    tokenizer: Any, number: int, question: str, answer: str | None, images: Sequence[bytes], *, loss: str = "assistant"
) -> TokenSequence:
    """A chat as a source makes it; `answer` None: a prompt; `loss` all: every token is a label but placeholders."""
    prompt = tokenizer(QUESTION.format(question), add_special_tokens=False)["input_ids"]
    answered = [] if answer is None else tokenizer(ANSWER.format(answer), add_special_tokens=False)["input_ids"]
    token_ids = np.array([*prompt, *answered], np.int32)
    at = np.flatnonzero(token_ids == tokenizer.convert_tokens_to_ids("<image>"))
    labels = np.arange(token_ids.size) >= (len(prompt) if loss == "assistant" else 1)
    labels[at] = False
    spans = spans_from_mask(labels) if answer is not None else np.empty((0, 2), np.int32)
    media = tuple(medium(int(place), data) for place, data in zip(at, images, strict=True))
    return TokenSequence(
        sample_id=f"row {number}",
        source_row=number,
        token_ids=token_ids,
        target_spans=spans,
        metadata={"n": number},
        media=media,
    )


def rows(folder: Path, *, loss: str = "assistant", prompts: bool = False) -> list[TokenSequence]:
    """Rows with 1, 2 and 3 images, and rows of text between them."""
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    return [
        row(
            tokenizer,
            number,
            question,
            None if prompts else answer,
            [vision.image_bytes(10 * number + n, size=size) for n, size in enumerate(sizes)],
            loss=loss,
        )
        for number, (question, answer, sizes) in enumerate(ROWS)
    ]


def header(folder: Path, **changes: Any) -> DatasetHeader:
    """The header of a dataset of this teacher."""
    processor = AutoProcessor.from_pretrained(folder)
    facts = ProcessorFacts(
        name=type(processor).__name__,
        settings_sha256=processor_sha256(processor),
        settings=processor_settings(processor),
    )
    fields = {"top_k": TOP_K, "draws": DRAWS, "draw_logprobs": True, "draw_seed": 9, "max_length": CONTEXT}
    about = About(processor=facts, end_token_ids=(processor.tokenizer.eos_token_id,))
    made = making.tiny_header(folder, **{**fields, **changes})  # type: ignore[arg-type]
    return made.model_copy(update={"about": about})


def config(folder: Path, engine: str, **changes: Any) -> TeacherConfig:
    """The teacher's settings, float32."""
    fields = {"model": str(folder), "engine": engine, "top_k": TOP_K, "min_prob": 0.0, "max_length": CONTEXT}
    drawing = {"draws": DRAWS, "kept_draws": DRAWS, "draw_logprobs": True, "draw_seed": 9}
    if engine == "vllm":
        changes["engine_args"] = {**making.SMALL_ENGINE, **changes.get("engine_args", {})}
    return TeacherConfig.model_validate({**fields, **drawing, "dtype": "float32", **changes})


class Reference:
    """What transformers gives for whole texts: its processor expands and tokenizes them."""

    def __init__(self, folder: Path):
        self._processor = AutoProcessor.from_pretrained(folder)
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def _inputs(self, token_ids: np.ndarray, sequence: TokenSequence) -> Any:
        text = self._processor.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        data = [medium.data for medium in sequence.media if medium.position < token_ids.size]
        images = [Image.open(io.BytesIO(each)).convert("RGB") for each in data if each is not None]
        return self._processor(text=[text], images=[images] if images else None, return_tensors="pt")

    def position(self, sequence: TokenSequence, stored: int) -> int:
        """Where the model has a stored position: the last one of the row cut after it."""
        return int(self._inputs(sequence.token_ids[: stored + 1], sequence)["input_ids"].shape[1]) - 1

    @torch.inference_mode()
    def logprobs(self, sequence: TokenSequence) -> np.ndarray:
        """`float64 [N, V]` at the target positions."""
        inputs = self._inputs(sequence.token_ids, sequence)
        dense = self._model(**inputs).logits[0].double().log_softmax(-1).numpy()
        stored = [position for start, stop in sequence.target_spans for position in range(start, stop)]
        return dense[[self.position(sequence, position) for position in stored]]
