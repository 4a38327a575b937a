"""`ColdstillError`, the root of all errors that a user can fix, and how errors of libraries are quoted.

The command line prints a `ColdstillError` and exits with code 1. Any other exception is a bug of ours and keeps its
traceback.
"""

from __future__ import annotations


class ColdstillError(Exception):
    """Something the user can mend: `what` (the field, file or row), `found`, `wanted`, and the way out (`fix`)."""

    def __init__(self, what: str, *, found: object = None, wanted: object = None, fix: str = ""):
        self.what, self.found, self.wanted, self.fix = what, found, wanted, fix
        lines = [what]
        if found is not None:
            lines.append(f"  found:  {found}")
        if wanted is not None:
            lines.append(f"  wanted: {wanted}")
        if fix:
            lines.append(f"  do:     {fix}")
        super().__init__("\n".join(lines))

    def at(self, place: str) -> ColdstillError:
        """The same error, with the place where it was found before what it says."""
        return type(self)(f"{place}: {self.what}", found=self.found, wanted=self.wanted, fix=self.fix)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from their positional arguments by default; ours travel between Ray processes whole.
        return _rebuild, (type(self), self.what, self.found, self.wanted, self.fix)


def _rebuild(cls: type[ColdstillError], what: str, found: object, wanted: object, fix: str) -> ColdstillError:
    return cls(what, found=found, wanted=wanted, fix=fix)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its class name where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
