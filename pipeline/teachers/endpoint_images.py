"""Rows with images at a server: requests with token ids and images, and proofs of what the server expanded.

An OpenAI chat has no token ids: its template would tokenize the row's text again. vLLM's endpoint for token ids takes
images beside them, and returns the prompt with the images expanded and where they are
(vllm/entrypoints/scale_out/token_in_token_out/protocol.py, read and run at 0.32). A server has it if it was started
with --enable-scale-out.

Images are sent as PNG files of the pixels that every engine is shown: a server of another release may turn or convert
an image in another way. Responses are untrusted.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from coldstill.pipeline.reject_reasons import RejectReason

from .image_expansion import Expansion, ImageRules, RowRejected
from .local_expansion import ExpandedRow
from .protocol import TokenSequence

if TYPE_CHECKING:
    from PIL import Image

PATH = "/inference/v1/generate"
"""Beside the `/v1` of the completions endpoint."""
_LEAST_COMPRESSION = 1


def request_body(sequence: TokenSequence, row: ExpandedRow, sampling_params: dict[str, Any]) -> dict[str, Any]:
    """The request for a row; `sampling_params`: fields of vLLM's SamplingParams."""
    return {
        "token_ids": sequence.token_ids.tolist(),
        "content_parts": [{"type": "image_url", "url": _data_uri(image)} for image in row.images],
        "sampling_params": sampling_params,
        "return_token_ids": True,
    }


def require_expansion(document: object, sequence: TokenSequence, row: ExpandedRow, rules: ImageRules) -> None:
    """Raise `RowRejected` unless the server expanded the row as the teacher's own processor does.

    Its settings are those of the header. A server that was started with others gives images other numbers of tokens.
    """
    found = document if isinstance(document, dict) else {}
    token_ids, placeholders = found.get("prompt_token_ids"), found.get("mm_placeholders")
    listed = placeholders.get("image") if isinstance(placeholders, dict) else None
    if not _are_counts(token_ids) or not isinstance(listed, list):
        raise _differs("the server returned no expanded tokens")
    pairs = [[each.get("offset"), each.get("length")] if isinstance(each, dict) else [None] for each in listed]
    if not all(map(_are_counts, pairs)):
        raise _differs("the server returned ranges that are none")
    ranges = [(int(offset or 0), int(length or 0)) for offset, length in pairs]
    expansion = rules.proven(sequence, np.array(token_ids, np.int64), ranges)
    if not _equal(expansion, row.expansion):
        sizes = f"{expansion.token_ids.size} tokens, not {row.expansion.token_ids.size}"
        raise _differs(f"the server expanded the images otherwise than the processor of the header: {sizes}")


def _equal(one: Expansion, other: Expansion) -> bool:
    return np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.lengths, other.lengths)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 31 for value in values)


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=_LEAST_COMPRESSION)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _differs(detail: str) -> RowRejected:
    return RowRejected(RejectReason.PLACEHOLDERS_DIFFER, detail)
