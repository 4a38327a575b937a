"""A dataset's directory on any store that fsspec reaches."""

from .store import CREATE_IF_ABSENT, RUN_FOLDER, Store

__all__ = ["CREATE_IF_ABSENT", "RUN_FOLDER", "Store"]
