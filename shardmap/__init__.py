"""`vmap` for PyTorch that runs on everything you have."""

from shardmap import errors
from shardmap.api import vmap
from shardmap.engine import SlowLoopWarning

__all__ = ["SlowLoopWarning", "errors", "vmap"]
