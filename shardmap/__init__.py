"""`vmap` for PyTorch that runs on everything you have."""

from shardmap import errors, reduce
from shardmap.api import plan, vmap
from shardmap.engine import SlowLoopWarning
from shardmap.planned import Plan
from shardmap.rules.registry import batching_rule
from shardmap.run.pool import Ray
from shardmap.store import MemmapSink, SafetensorsSink, Source, Store, ZarrSink, open_store, source

__all__ = [
    "MemmapSink",
    "Plan",
    "Ray",
    "SafetensorsSink",
    "SlowLoopWarning",
    "Source",
    "Store",
    "ZarrSink",
    "batching_rule",
    "errors",
    "open_store",
    "plan",
    "reduce",
    "source",
    "vmap",
]
