"""`vmap` for PyTorch that runs on everything you have."""

from shardmap import errors
from shardmap.api import vmap
from shardmap.engine import SlowLoopWarning
from shardmap.rules.registry import batching_rule
from shardmap.run.ray import Ray

__all__ = ["Ray", "SlowLoopWarning", "batching_rule", "errors", "vmap"]
