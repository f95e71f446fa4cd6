"""The tiers below the rules of this package.

They are `torch.func.vmap` of a single operator, and a loop over the batch.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from shardmap._torch import OpOverload, aten, kernel_of
from shardmap.program.analysis import written
from shardmap.program.ir import Equation, Packed, Param, SampleDevice
from shardmap.program.schema import base_name
from shardmap.rules.loop_results import Results
from shardmap.rules.lowering import B, Lowering, V
from shardmap.rules.operator_loop import (
    Arguments,
    OperatorLoop,
    row_calls,
    runs_python,
)
from shardmap.rules.targets import fastest

logger = logging.getLogger("shardmap")


def _flatten(args: Any, tensors: list[V]) -> Any:
    """Arguments with each `V` replaced by its position in `tensors`."""
    if type(args) is V:
        tensors.append(args)
        return _Slot(len(tensors) - 1)
    if type(args) in (tuple, list):
        return [_flatten(a, tensors) for a in args]
    return args


class _Slot:
    __slots__ = ("position",)

    def __init__(self, position: int):
        self.position = position


def _fill(args: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    if type(args) is _Slot:
        return tensors[args.position]
    if type(args) is list:
        return [_fill(a, tensors) for a in args]
    return args


def _split(
    b: Lowering, args: tuple, kwargs: dict[str, Any]
) -> tuple[list[V], Any, list[str], list[Any], list[Any]]:
    """Split a call into its tensors and its other arguments.

    Symbolic ones among the others (the device, numbers) are passed at replay.
    """
    tensors: list[V] = []
    template = _flatten([list(args), list(kwargs.values())], tensors)
    symbols: list[Any] = []

    def symbolic(value: Any) -> Any:
        if type(value) is list:
            return [symbolic(v) for v in value]
        if type(value) in (SampleDevice, Param):
            symbols.append(value)
            return _Slot(len(tensors) + len(symbols) - 1)
        return value.value if type(value) is Packed else value

    template = symbolic(template)
    return tensors, template, list(kwargs), symbols, [0 if v.mapped else None for v in tensors]


def counts_indices(op: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """True if a look-up's gradient depends on how often an index occurs in its own sample."""
    if op.overloadpacket not in (aten.embedding, aten._embedding_bag):
        return False
    return bool(args[3] if len(args) > 3 else kwargs.get("scale_grad_by_freq", False))


def functorch_rule(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch one operator with `torch.func.vmap`; the batch comes first in the results."""
    if b.grad and eq.op is aten.native_layer_norm_backward.default:
        # its decomposition treats the statistics as constants: wrong when differentiated again
        return NotImplemented
    if b.grad and counts_indices(eq.op, args, kwargs):
        return NotImplemented  # torch.func counts over all samples, too
    tensors, template, names, symbols, in_dims = _split(b, args, kwargs)
    if torch.Tag.pointwise in eq.op.tags and any(
        v.mapped and not v.ndim and any(v.dtype != other.dtype for other in tensors)
        for v in tensors
    ):
        # It rounds a number to the dtype of the other tensor, whatever the kernel would do.
        return NotImplemented
    op, count = eq.op, len(tensors)

    def functorch(*values: Any) -> Any:
        def one(*rows: torch.Tensor) -> Any:
            positional, named = _fill(template, (*rows, *values[count:]))
            return op(*positional, **dict(zip(names, named, strict=True)))

        return torch.func.vmap(one, in_dims=tuple(in_dims))(*values[:count])

    functorch.__name__ = f"functorch_{base_name(op)}"
    return b.as_recorded(eq, functorch, *tensors, *symbols)


def loop_rule(
    b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, object], call: str
) -> V | tuple[V, ...] | None:
    """Run one operator sample by sample and stack the results.

    In-place operators write to the batch's rows.
    """
    function = fastest(eq.op) if args and type(args[0]) is V else kernel_of(eq.op)
    given = row_calls(function, args, kwargs)
    tracked = b.grad or b.transformed
    ordered = b.device_type != "cpu" or bool(written(eq)) or runs_python(eq.op)
    results = None if writes_only(eq) else Results.of(eq, call)
    return emit_loop(b, OperatorLoop(eq, given, results, tracked, ordered), given, B)


def writes_only(eq: Equation) -> bool:
    """True if a call has no results but the arguments that it writes to."""
    return {v.index for v in eq.inputs()} >= {v.index for v in eq.results()}


def emit_loop(
    b: Lowering, loop: OperatorLoop, given: Arguments, *leading: object, mapped: bool = True
) -> V | tuple[V, ...] | None:
    """Emit a loop; `leading` are its arguments before the tensors."""
    values = *leading, *given.mapped, *given.shared
    if loop.results is None:
        b.effect(loop, *values)
        return None
    if loop.results.single:
        return b.call(loop, *values, mapped=mapped)
    return b.calls_several(loop, len(loop.results.specs), *values, mapped=mapped)
