"""The dataset format: header, plan, rows, codec, shards, commits, manifest, stores. FORMAT.md specifies it.

Needs numpy, pyarrow, zstandard, pydantic, fsspec, cachetools and tenacity only. The public API is `coldstill`.
"""
