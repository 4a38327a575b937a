"""The list of a checkpoint's files, `files.json`, and whether all of them are as they were written.

transformers writes the files of a checkpoint one after the other. The list is written after them, so a checkpoint with
a list was complete once, and one whose files fit the list still is. Checkpoints of earlier releases have no list: of
these, each file that a resumed run reads must be there, and have the form of a complete file.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from coldstill.common.files import new_file
from coldstill.storage_schema.store.local import sync

FILES_NAME = "files.json"
_THREADS = 4
_HEADER_BYTES = 8


def begin_checkpoint(folder: Path) -> None:
    """Call it before the files of `folder` are written: a list of earlier files must not be taken for theirs."""
    (folder / FILES_NAME).unlink(missing_ok=True)


def finish_checkpoint(folder: Path) -> None:
    """Write all files of `folder` to the disk, and then their list."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as threads:
        facts = list(threads.map(_synced, paths))
    files = {path.relative_to(folder).as_posix(): fact for path, fact in zip(paths, facts, strict=True)}
    with new_file(folder / FILES_NAME) as part:
        part.write_text(json.dumps({"files": files}, indent=2), encoding="utf-8")
        sync(part)
    for changed in (folder, folder.parent):
        sync(changed)


def damage(folder: Path) -> str:
    """What is wrong with the first file that is not as it was written; empty if all are."""
    try:
        files = json.loads((folder / FILES_NAME).read_text(encoding="utf-8"))["files"]
        wanted = {folder / name: (fact["bytes"], fact["sha256"]) for name, fact in files.items()}
    except FileNotFoundError:
        return _damage_without_list(folder)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return f"{FILES_NAME} cannot be read"
    sizes = {path: path.stat().st_size if path.is_file() else None for path in wanted}
    for path, (size, _) in wanted.items():
        if sizes[path] != size:
            what = "missing" if sizes[path] is None else f"{sizes[path]:,} bytes instead of {size:,}"
            return f"{path.relative_to(folder)}: {what}"
    with ThreadPoolExecutor(_THREADS) as threads:
        for path, digest in zip(wanted, threads.map(_digest, wanted), strict=True):
            if digest != wanted[path][1]:
                return f"{path.relative_to(folder)}: other bytes than were written"
    return ""


def lacks_training_state(folder: Path) -> str:
    """Which file of the optimizer's and the scheduler's state is missing; empty if none. transformers would
    continue without them, with other weights."""
    return next((f"no {name}" for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (folder / name).is_file()), "")


def _damage_without_list(folder: Path) -> str:
    """The list itself may be what is lost: then the files are as good as those of earlier releases."""
    weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"no {TRAINER_STATE_NAME}, which is written last"
    if not any((folder / name).is_file() for name in weights):
        return f"no {SAFE_WEIGHTS_NAME}"
    if found := lacks_training_state(folder):
        return found
    if not list(folder.glob("rng_state*.pth")):
        return "no rng_state.pth"
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as archive:
                    if (member := archive.testzip()) is not None:
                        return f"{path.name}: {member} is damaged"
            elif path.suffix == ".safetensors":
                _check_safetensors(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, LookupError, zipfile.BadZipFile):
            return f"{path.name}: not a whole file"
    return ""


def _check_safetensors(path: Path) -> None:
    """Raises `ValueError` unless the file is as long as its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_BYTES), "little")
        if not 0 < length < path.stat().st_size:
            raise ValueError("no header")
        header: dict[str, Any] = json.loads(file.read(length))
    end = max((fact["data_offsets"][1] for name, fact in header.items() if name != "__metadata__"), default=0)
    if path.stat().st_size != _HEADER_BYTES + length + end:
        raise ValueError("another size")


def _synced(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
