"""A shard: the Parquet file with the rows of one work unit."""

from .index import ShardIndex
from .layout import MAX_SHARD_BYTES, PLAIN_COLUMNS, SCHEMA
from .reader import ShardFile, read_shard
from .writer import copy_shard, json_value, metadata_json, write_shard

__all__ = [
    "MAX_SHARD_BYTES",
    "PLAIN_COLUMNS",
    "SCHEMA",
    "ShardFile",
    "ShardIndex",
    "copy_shard",
    "json_value",
    "metadata_json",
    "read_shard",
    "write_shard",
]
