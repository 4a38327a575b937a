"""Your own source adapter: rows of question, options and solution become chats.

    source:
      path: questions.jsonl
      adapter: source_adapter:to_chat    # a file in the folder that the capture starts from, or an installed package

The function gets each row as a dict. It returns a dict with the columns that `source.messages`, `source.prompt` and
`source.response`, or `source.text` name, or None to reject the row. Other columns become metadata of the dataset row.

It runs on every worker, perhaps more than once for a row, so equal rows must give equal results. A resumed capture must
name the same function. Correct an error in it freely, but to change what it returns for rows that are already
captured, start a new dataset.
"""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any


def to_chat(row: dict[str, Any]) -> dict[str, Any] | None:
    """A multiple-choice question as a chat of two turns; None for a question without a solution."""
    if not row.get("solution"):
        return None
    options = "\n".join(f"{letter}) {option}" for letter, option in zip(ascii_uppercase, row["options"], strict=False))
    return {
        "id": row["key"],
        "messages": [
            {"role": "user", "content": f"{row['question']}\n{options}"},
            {"role": "assistant", "content": row["solution"]},
        ],
        "subject": row.get("subject"),
    }
