"""The rule for Functions that map themselves: their own `vmap` staticmethod."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from shardmap.program.ir import Equation
from shardmap.program.own_function import OWN_FUNCTION, mapped
from shardmap.rules.lowering import B, Lowering, V, values
from shardmap.rules.registry import register


@register("own_function", OWN_FUNCTION)
def own_function(
    b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[V, ...]:
    """Call the Function's `vmap` on the batch."""
    tensors, text = args
    of_samples = tuple([v.mapped for v in values(tensors)])
    target = functools.partial(mapped, text, of_samples, b.randomness)
    return b.calls_several(target, len(list(eq.results())), B, *tensors, mapped=True)
