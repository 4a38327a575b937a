"""A dataset's directory on any store that fsspec supports."""

from .local import require_folder
from .store import CREATE_IF_ABSENT, MAX_FILE_BYTES, RUN_FOLDER, Store

__all__ = ["CREATE_IF_ABSENT", "MAX_FILE_BYTES", "RUN_FOLDER", "Store", "require_folder"]
