"""Every reason for which a capture rejects a source row."""

from __future__ import annotations

from enum import StrEnum

from coldstill.storage_schema.commits import CommitRecord

REJECT_REASONS = "reject_reasons"
"""Key of a commit record's environment: the unit's rejects, counted by reason."""


class RejectReason(StrEnum):
    """`value` is stored in `rejects/` files and the manifest, so it never changes. `sentence` explains it."""

    sentence: str

    def __new__(cls, value: str, sentence: str) -> RejectReason:
        """A member that is the string `value`."""
        member = str.__new__(cls, value)
        member._value_, member.sentence = value, sentence
        return member

    NOT_UTF8 = "not_utf8", "The line, or a text in Parquet, is not UTF-8."
    LONE_SURROGATE = (
        "lone_surrogate",
        "The row holds half of a surrogate pair, as a \\u escape of JSON may, which is not text.",
    )
    NOT_JSON = "not_json", "The line is not a JSON object, or a value in Parquet cannot be read."
    ADAPTER_DROPPED = "adapter_dropped", "The function source.adapter returned nothing for the row."
    NO_MESSAGES = "no_messages", "The columns for messages, prompt and text are empty."
    NO_TEXT = "no_text", "Mode pretrain found no text in the text column."
    BAD_MESSAGES = "bad_messages", "The messages are not a list of roles with content."
    BAD_TOOLS = "bad_tools", "The tools are not a list, or not the JSON of a list."
    NO_PROMPT = "no_prompt", "Nothing precedes the assistant's answer."
    NO_RESPONSE = "no_response", "The prompt has no response."
    TEMPLATE_FAILED = "template_failed", "The chat template raised an exception for the row."
    TEMPLATE_DROPS = (
        "template_drops",
        "The chat template leaves out a part of the chat; see source.may_drop.",
    )
    TEMPLATE_CANNOT_MARK = "template_cannot_mark", "The chat template rewrites an assistant turn of this chat."
    CANNOT_MARK = "cannot_mark", "A token spans the border between an assistant turn and the text before it."
    METADATA_TOO_LARGE = "metadata_too_large", "The columns besides the text are larger than a shard may store."
    OVER_LONG = (
        "over_long",
        "The row has more than teacher.max_length tokens as the teacher reads it, and source.over_long is reject.",
    )
    NO_ROOM = "no_room", "The prompt has teacher.max_length tokens or more, which leaves no room for an answer."
    NO_TEACHER_PROMPT = (
        "no_teacher_prompt",
        "The row has no chat, or nothing in the column with the prompt or the chat that the teacher reads.",
    )
    ANSWER_DIFFERS = (
        "answer_differs",
        "The target tokens in the chat that the teacher reads are not those of the row.",
    )
    TEACHER_OVER_LONG = (
        "teacher_over_long",
        "The teacher would read more than teacher.max_read_length tokens, or have no room for an answer below it.",
    )
    NO_TARGETS = "no_targets", "No token of the row or part is a target."
    TOO_MANY_TARGETS = (
        "too_many_targets",
        "The row's targets times teacher.top_k, or its draws, are more than 2^24, which a row may store.",
    )
    BAD_SCORE_IDS = (
        "bad_score_ids",
        "The column source.score_ids holds no token ids, or too many, or another number of lists than target tokens.",
    )
    BAD_IMAGES = "bad_images", "The row's images do not match its image parts or marks, or cannot belong to them."
    TOO_MANY_IMAGES = "too_many_images", "The row has more images than teacher.max_images."
    IMAGE_NOT_FOUND = "image_not_found", "An image's file or address cannot be read, or is not allowed."
    IMAGE_UNREADABLE = "image_unreadable", "An image is not a whole PNG, JPEG, WebP, GIF or BMP file."
    IMAGE_UNSUPPORTED = "image_unsupported", "An image has several frames, or a mode that 8-bit RGB cannot show."
    IMAGE_TOO_LARGE = "image_too_large", "An image has too many bytes or pixels."
    PLACEHOLDERS_DIFFER = (
        "placeholders_differ",
        "The tokens with one placeholder per image are not those that the engine expanded.",
    )
    NON_FINITE_LOGITS = "non_finite_logits", "The teacher gave NaN or infinite logits for the row."
    KILLS_THE_ENGINE = "kills_the_engine", "Each worker that scored the row crashed."


def reject_reasons_of(commit: CommitRecord) -> dict[str, int]:
    """The rejects of a unit by reason; empty in records of earlier releases."""
    found = commit.environment.get(REJECT_REASONS, {})
    return {str(reason): int(count) for reason, count in found.items()} if isinstance(found, dict) else {}
