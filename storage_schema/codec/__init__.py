"""The codec of a row's targets: named streams, one zstd frame each."""

from .row_codec import MAX_ENTRIES, MOST_ROW_OVERHEAD, STREAMS, RowCodec, most_position_bytes

__all__ = ["MAX_ENTRIES", "MOST_ROW_OVERHEAD", "STREAMS", "RowCodec", "most_position_bytes"]
