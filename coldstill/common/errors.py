"""`ColdstillError`, the base class of errors that a user can fix, and `first_line`.

The command line prints a `ColdstillError` and exits with code 1. Any other exception is a bug in Coldstill and keeps
its traceback.
"""

from __future__ import annotations

MAX_MESSAGE_CHARS = 16_000
"""Maximum number of characters of a message: it can quote text of a stranger's dataset, such as a sample id."""

_MAX_PART_CHARS = MAX_MESSAGE_CHARS // 4 - 1


def _cut(text: str) -> str:
    """A part of a message: of a longer one the start and the end."""
    if len(text) <= _MAX_PART_CHARS:
        return text
    end = _MAX_PART_CHARS // 4
    return f"{text[: _MAX_PART_CHARS - end - 3]} … {text[-end:]}"


class ColdstillError(Exception):
    """An error that the user can fix.

    `what`: the field, file or row that failed. `found`: its value. `wanted`: the values that are allowed. `fix`: the
    command or setting that fixes it, by default the class's `usual_fix`.
    """

    usual_fix = ""

    def __init__(self, what: str, *, found: object = None, wanted: object = None, fix: str = ""):
        fix = fix or self.usual_fix
        self.what, self.found, self.wanted, self.fix = what, found, wanted, fix
        lines = [_cut(what)]
        if found is not None:
            lines.append(_cut(f"  found:  {found}"))
        if wanted is not None:
            lines.append(_cut(f"  wanted: {wanted}"))
        if fix:
            lines.append(_cut(f"  do:     {fix}"))
        super().__init__("\n".join(lines))

    def at(self, place: str) -> ColdstillError:
        """The same error with `place`, the file or row where it occurred, before its message."""
        return type(self)(f"{place}: {self.what}", found=self.found, wanted=self.wanted, fix=self.fix)

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles errors between processes. The default would rebuild one from its message alone.
        return _rebuild, (type(self), self.what, self.found, self.wanted, self.fix)


def _rebuild(cls: type[ColdstillError], what: str, found: object, wanted: object, fix: str) -> ColdstillError:
    return cls(what, found=found, wanted=wanted, fix=fix)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name if the message is empty.

    A first line that ends with a colon only announces the next one, which follows it here.
    """
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {more[0]}" if first.endswith(":") and more else first


def type_and_line(error: BaseException) -> str:
    """The class of an exception and the first line of its message, for errors of other people's code."""
    return f"{type(error).__name__}: {first_line(error)}"
