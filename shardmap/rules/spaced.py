"""Rules of the spaced family: numbers between two ends that tensors give.

`torch.linspace` and `torch.logspace` take tensors for numbers, so that their results have neither a
gradient nor a tangent: the batcher detaches the ends, and the batch is computed from them.
"""

from __future__ import annotations

from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import SAMPLE_DEVICE, Equation
from shardmap.program.operators import BELOW_AUTOGRAD
from shardmap.rules.fallback import functorch_rule
from shardmap.rules.lowering import Lowering, V, spec_of
from shardmap.rules.registry import register


def _number(value: complex, device: torch.device) -> torch.Tensor:
    """A tensor that holds a number in the precision of python's."""
    dtype = torch.complex128 if isinstance(value, complex) else torch.float64
    return torch.full((), value, dtype=dtype, device=device)


def _truncated(end: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return end.to(dtype).double()


@register("spaced", *BELOW_AUTOGRAD)
def spaced(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Compute each sample's numbers from its ends, by the decomposition that torch.func uses."""
    ends, rest = list(args[:2]), args[2:]
    ends = [e if type(e) is V else b.call(_number, e, SAMPLE_DEVICE) for e in ends]
    dtype = spec_of(eq).dtype
    if not (dtype.is_floating_point or dtype.is_complex):  # kernels cast the ends, torch.func not
        ends = [b.call(_truncated, e, dtype) for e in ends]
    packet = aten.linspace if eq.op.overloadpacket is aten.linspace else aten.logspace
    # torch.func takes the dtype of the ends where none is given, the loop the default one
    named = {**kwargs, "dtype": dtype}
    return functorch_rule(b, eq._replace(op=packet.Tensor_Tensor), (*ends, *rest), named)
