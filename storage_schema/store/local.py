"""Files of a dataset on a local disk: read only where they lie inside it, written beside and then put in place whole.

A dataset from a stranger may hold links: what it is unpacked from keeps them. A link that leads out of the dataset
would put any file of the reader's machine into what is read, copied and pushed, so it is refused; so are pipes and
devices, which never end. The one layout of links that is common, the Hub's cache (`snapshots/REVISION/name ->
../../blobs/digest`), is let through.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutsideDataset


def local_file(root: str, name: str) -> Path:
    """Where file `name` of the dataset at `root` really lies.

    Raises `FileNotFoundError` (also where a folder has this name), `OutsideDataset`.
    """
    real = Path(os.path.realpath(f"{root}/{name}"))
    folder = Path(os.path.realpath(root))
    inside = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    if not any(real.is_relative_to(place) for place in inside):
        raise OutsideDataset(
            f"{root}/{name}",
            found=f"a link to {real}",
            wanted="a file inside the dataset",
            fix="if you trust its links, copy the dataset with what they lead to: cp -rL",
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


@contextmanager
def beside(folder: Path, final: Path) -> Iterator[Path]:
    """A path in `folder` of a new file that nobody else has, gone afterwards; the folder of `final` exists."""
    final.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{os.getpid()}-{secrets.token_hex(8)}.part"
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def replace(part: Path, final: Path) -> None:
    """Give a whole file its final name, over what was there."""
    _sync(part)
    os.replace(part, final)
    _sync(final.parent)


def link(part: Path, final: Path) -> bool:
    """Give a whole file its final name, unless that is taken: a rename would overwrite."""
    _sync(part)
    try:
        os.link(part, final)
    except FileExistsError:
        return False
    finally:
        _sync(final.parent)
    return True


def _sync(path: Path) -> None:
    """A file's content is on disk, or a folder's names: a file's name is there only when its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
