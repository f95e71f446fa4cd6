"""The fastest way to call an operator from python.

A replay often consists of calls on small tensors, whose time is mostly that of the
entry into the operator. Measured for torch 2.13 on [8, 4] tensors, in microseconds:
`torch.ops.aten.unsqueeze.default` 1.06, `torch.Tensor.unsqueeze` 0.64; `view` 1.56 and 0.64; `mm`
1.32 and 1.03; `tanh` 1.16 and 0.88; `mul.Tensor` 1.79 and 1.42; `expand` 1.83 and 0.88. Methods
parse their arguments against generated signatures, operator overloads against schemas at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardmap._torch import OpOverload, kernel_of
from shardmap.rules import registry

_METHODS = {
    # elementwise, of one tensor
    **{
        name: name
        for name in (
            "abs acos acosh asin asinh atan atanh ceil cos cosh digamma erf erfc erfinv exp exp2 "
            "expm1 floor frac i0 lgamma log log10 "
            "log1p log2 neg reciprocal relu round rsqrt sgn sigmoid sign sin sinh sqrt square tan "
            "tanh trunc bitwise_not logical_not "
            "isnan clone"
        ).split()
    },
    # elementwise, of two
    **{f"{name}.Tensor": name for name in "add sub mul div eq ne lt le gt ge".split()},
    **{f"{name}.Scalar": name for name in "eq ne lt le gt ge".split()},
    "pow.Tensor_Scalar": "pow",
    "maximum": "maximum",
    "minimum": "minimum",
    # views
    **{name: name for name in ("unsqueeze", "view", "t", "permute", "expand", "detach")},
    "squeeze.dims": "squeeze",
    "transpose.int": "transpose",
    "select.int": "select",
    # products
    **{name: name for name in "mm bmm mv addmm addmv baddbmm".split()},
    # reductions
    "sum.dim_IntList": "sum",
    "mean.dim": "mean",
    "amax": "amax",
    "amin": "amin",
}
"""For an operator: the tensor method that is equal to it, with the same other arguments."""

_table: dict[Any, Callable[..., Any]] = {
    op: getattr(torch.Tensor, method)
    for name, method in _METHODS.items()
    for op in registry.overloads(name)
}


def fastest(op: OpOverload) -> Callable[..., Any]:
    """The fastest function for `op` with a tensor as first positional argument."""
    return _table.get(op) or kernel_of(op)
