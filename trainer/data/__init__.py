"""From sealed dataset directories to batches: order, shards, rows, packs, tensors, each with an exact way to go on."""

from .logit_dataset import LogitDataset, load_logit_dataset
from .stream import LogitStream

__all__ = ["LogitDataset", "LogitStream", "load_logit_dataset"]
