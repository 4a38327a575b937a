"""Local files of a dataset: no links out of it, and atomic, synced writes.

A dataset from a stranger may contain links, which archives preserve. A link that leads out of the dataset would put any
file of the reader's machine into what is read, copied and pushed, so it is rejected; so are pipes and devices, which
never end. One common layout of links is accepted: the Hub's cache (`snapshots/REVISION/name -> ../../blobs/digest`).
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from coldstill.common.visible import visible
from coldstill.storage_schema.errors import OutsideDataset, UnsupportedStore


def local_file(root: str, name: str) -> Path:
    """The real path of file `name` of the dataset at `root`.

    Raises `FileNotFoundError` (also for a folder of this name), `OutsideDataset`.
    """
    real = Path(os.path.realpath(f"{root}/{name}"))
    folder = Path(os.path.realpath(root))
    inside = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    if not any(real.is_relative_to(place) for place in inside):
        raise OutsideDataset(
            f"{root}/{name}",
            found=f"a link to {real}",
            wanted="a file inside the dataset",
            fix="if you trust its links, copy the dataset with the files that they point to: cp -rL",
        )
    try:
        mode = real.stat().st_mode
    except NotADirectoryError as error:
        raise FileNotFoundError(str(real)) from error
    if stat.S_ISDIR(mode):
        raise FileNotFoundError(f"{real} is a folder")
    if not stat.S_ISREG(mode):
        raise OutsideDataset(f"{root}/{name}", found="a device, pipe or socket", wanted="a regular file")
    return real


def require_inside(root: str, folder: str) -> None:
    """Raises `OutsideDataset` if a link leads a folder of the dataset at `root` to a place outside it: what is written
    or deleted there would be somebody else's."""
    real = os.path.realpath(f"{root}/{folder}")
    if not Path(real).is_relative_to(os.path.realpath(root)):
        raise OutsideDataset(
            f"{root}/{folder}",
            found=f"a link to {real}",
            wanted="a folder inside the dataset",
            fix="if you trust its links, copy the dataset with the files that they point to: cp -rL",
        )


def size_of(entry: os.DirEntry[str]) -> int:
    """Bytes of a listed file; -1 if another process deleted it meanwhile."""
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return -1


class TemporaryFileGone(FileNotFoundError):
    """Another process that sealed or ended a copy here removed the temporary files: the same write may succeed now."""


@contextmanager
def temporary_file(folder: Path, *, final: Path) -> Iterator[Path]:
    """A unique path in `folder` to write to, removed at the end of the block. Creates the folder of `final` too.

    Unlike that of `common.files.new_file` it is not beside `final`: sealing removes `folder`, and with it the files of
    killed writers.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{os.getpid()}-{secrets.token_hex(8)}.part"
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def replace(part: Path, final: Path) -> None:
    """Renames a complete file to its final name, and replaces an existing file."""
    sync(part)
    os.replace(part, final)
    sync(final.parent)


def link(part: Path, final: Path) -> bool:
    """Links a complete file to its final name unless that exists; a rename would overwrite. Returns whether it did."""
    sync(part)
    try:
        os.link(part, final)
    except FileExistsError:
        return False
    finally:
        sync(final.parent)
    return True


def sync(path: Path) -> None:
    """Writes a file's content, or a folder's names, to the disk. A file's name is durable once its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_folder(path: str | Path) -> None:
    """Raises `UnsupportedStore` unless `path` is a local folder, or can become one. It is called before the work."""
    if "://" in str(path):
        raise UnsupportedStore(str(path), found="a URL", wanted="a local folder", fix="choose another output")
    place = Path(os.path.abspath(path))
    existing = next(one for one in (place, *place.parents) if os.path.lexists(one))
    if not existing.is_dir():
        kind = "a file" if existing.exists() else "a link to nothing"
        raise UnsupportedStore(
            str(path),
            found=kind if existing == place else f"{kind} at {existing}",
            wanted="a folder, or nothing yet",
            fix="choose another output",
        )


def what_lies_at(root: str) -> tuple[str, list[str]]:
    """What is at a path, in words, and the names in it, at most 1,000."""
    if not os.path.lexists(root):
        return "no such folder", []
    if not os.path.isdir(root):
        return "a file", []
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in islice(entries, 1000))
    except OSError as error:
        return f"a folder that cannot be read ({error.strerror})", []
    listed = ", ".join(map(visible, names[:5])) + (" and more" if len(names) > 5 else "")
    return (f"a folder with {listed}" if names else "an empty folder"), names
