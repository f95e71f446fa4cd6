"""`vmap` for PyTorch that runs on everything you have."""

from shardmap import errors, reduce
from shardmap.api import compare, plan, vmap
from shardmap.call.caches import clear_caches
from shardmap.call.comparison import Comparison
from shardmap.call.planned import Plan
from shardmap.errors import SlowLoopWarning
from shardmap.rules.registry import batching_rule
from shardmap.run.pool import Ray
from shardmap.store import MemmapSink, SafetensorsSink, Source, Store, ZarrSink, open_store, source
from shardmap.store.ragged import Ragged
from shardmap.transforms.gradients import per_sample_grad
from shardmap.transforms.jacobians import hessian, jacfwd, jacobian, jacrev
from shardmap.transforms.products import hvp, jvp, vjp

__all__ = [
    "Comparison",
    "MemmapSink",
    "Plan",
    "Ragged",
    "Ray",
    "SafetensorsSink",
    "SlowLoopWarning",
    "Source",
    "Store",
    "ZarrSink",
    "batching_rule",
    "clear_caches",
    "compare",
    "errors",
    "hessian",
    "hvp",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jvp",
    "open_store",
    "per_sample_grad",
    "plan",
    "reduce",
    "source",
    "vjp",
    "vmap",
]
