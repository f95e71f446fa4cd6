"""`vmap` for PyTorch that runs on everything you have."""

from shardmap import errors, reduce
from shardmap.api import plan, vmap
from shardmap.engine import SlowLoopWarning
from shardmap.planned import Plan
from shardmap.rules.registry import batching_rule
from shardmap.run.ray import Ray

__all__ = ["Plan", "Ray", "SlowLoopWarning", "batching_rule", "errors", "plan", "reduce", "vmap"]
