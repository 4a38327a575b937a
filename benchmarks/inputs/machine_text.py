"""Collects real text from this machine, as documents for training and held-out documents.

There are three sorts: the Python standard library, the source of installed packages, and documentation (of packages,
the system and Perl, if installed). A hash of its name assigns a document to one part, so no model is measured on text
that it was trained on. The documents depend on the machine, so a stored result names their `digest`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from coldstill.demo.text import SKIPPED_FOLDERS

HELD_OUT_SHARE = 0.1

CHARACTERS_PER_KIND = 6_000_000
CHARACTERS_PER_DOCUMENT = range(1_000, 30_001)
"""Shorter files hold little but a license. Of longer ones the middle is taken, so that no single file dominates."""

_PROSE = ("*.md", "*.rst", "*.txt", "METADATA", "*.pod", "changelog*.gz", "README*.gz", "NEWS*.gz", "*.txt.gz")
_LICENSE_FILES = ("licen", "copying", "copyright", "notice", "top_level", "entry_points", "sources.txt")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text: `name` is its sort and its path below the sort's root."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether it is held out from training. Depends on its name only, by other bits than the order of documents."""
        return int.from_bytes(_digest(self.name)[-8:]) / 2**64 < HELD_OUT_SHARE


def documents() -> list[Document]:
    """All documents without duplicates, in the order of a hash of their names."""
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    system = [Path("/usr/share/doc"), *sorted(Path("/usr/share").glob("perl*"))]
    kinds = {
        "library": _files("library", [library], ["*.py"]),
        "packages": _files("packages", [packages], ["*.py"]),
        "prose": _files("prose", [packages, *system], _PROSE),
    }
    found: dict[bytes, Document] = {}
    for paths in kinds.values():
        taken = 0
        for name, path in sorted(paths.items(), key=lambda item: _digest(item[0])):
            text = _read(path)
            if len(text) >= CHARACTERS_PER_DOCUMENT.start and _digest(text) not in found:
                found[_digest(text)] = Document(name=name, text=text)
                taken += len(text)
            if taken >= CHARACTERS_PER_KIND:
                break
    return sorted(found.values(), key=lambda document: _digest(document.name))


def digest(texts: Iterable[Document]) -> str:
    """Identifies the text: sha256 over all names and contents."""
    whole = hashlib.sha256()
    for document in texts:
        whole.update(_digest(document.name) + _digest(document.text))
    return whole.hexdigest()


def _files(kind: str, roots: list[Path], patterns: Iterable[str]) -> dict[str, Path]:
    return {
        f"{kind}/{path.relative_to(root).as_posix()}": path
        for root in roots
        for path in _matching(root, patterns)
        if not any(part in path.name.lower() for part in _LICENSE_FILES)
    }


def _matching(root: Path, patterns: Iterable[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def _read(path: Path) -> str:
    """The middle of a file's text; empty if the file is not text."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error):
        return ""
    start = max(0, (len(text) - CHARACTERS_PER_DOCUMENT.stop) // 2)
    return text[start : start + CHARACTERS_PER_DOCUMENT.stop - 1]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
