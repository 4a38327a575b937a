"""A dataset's directory on any store that fsspec supports."""

from .store import CREATE_IF_ABSENT, RUN_FOLDER, Store

__all__ = ["CREATE_IF_ABSENT", "RUN_FOLDER", "Store"]
