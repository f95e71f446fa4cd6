"""Stores for results larger than memory, and sources that samples are read from."""

from shardmap.store.base import Store
from shardmap.store.header import Header, OutputSpec, Receipt
from shardmap.store.memmap import MemmapSink
from shardmap.store.opening import open_store
from shardmap.store.recompute import Recompute, Recomputed, UnitComparison
from shardmap.store.safetensors import SafetensorsSink
from shardmap.store.sink import Sink
from shardmap.store.sources import Source, source
from shardmap.store.zarr import ZarrSink

__all__ = [
    "UnitComparison",
    "Header",
    "MemmapSink",
    "OutputSpec",
    "Receipt",
    "Recompute",
    "Recomputed",
    "SafetensorsSink",
    "Sink",
    "Source",
    "Store",
    "ZarrSink",
    "open_store",
    "source",
]
