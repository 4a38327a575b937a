"""The codec of a row's targets: named streams, one zstd frame each."""

from .row_codec import MAX_ENTRIES, STREAMS, RowCodec

__all__ = ["MAX_ENTRIES", "STREAMS", "RowCodec"]
