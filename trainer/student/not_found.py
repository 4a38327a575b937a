"""The error of a student that is not there: a library's exception comes in, a named error goes out."""

from __future__ import annotations

from coldstill.trainer.errors import StudentNotFound


def student_not_found(name: str, error: Exception) -> StudentNotFound:
    """`StudentNotFound` with the first line of what the library said."""
    return StudentNotFound(
        f"student {name}",
        found=(str(error).strip() or type(error).__name__).splitlines()[0],
        wanted="a folder, hub name or configuration of a causal language model that transformers can load",
        fix="check student.model (or student.from_scratch); for a hub name without network, download it first",
    )
