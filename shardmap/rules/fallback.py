"""The tiers below the rules of this package.

They are `torch.func.vmap` of a single operator, and a loop over the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import OpOverload, aten, schema_of
from shardmap.program.ir import Equation, Packed, Var, variables
from shardmap.rules.lowering import B, Lowering, V, values

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
        if type(value).__name__ in ("SampleDevice", "Param"):
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

    functorch.__name__ = f"functorch_{schema_of(op).name.partition('::')[2]}"
    return _emit(b, eq, functorch, (*tensors, *symbols))


def loop_rule(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any], call: str) -> Any:
    """Run one operator sample by sample and stack the results.

    In-place operators write to the batch's rows.
    """
    tensors, template, names, symbols, in_dims = _split(b, args, kwargs)
    op, count = eq.op, len(tensors)
    specs = [v.spec for v in variables(eq.outs)]
    in_place = {v.index for v in eq.inputs()} >= {v.index for v in variables(eq.outs)}

    def loop(size: int, *values: Any) -> Any:
        results = []
        for i in range(size):
            rows = [t if d is None else t[i] for t, d in zip(values[:count], in_dims, strict=True)]
            positional, named = _fill(template, (*rows, *values[count:]))
            result = op(*positional, **dict(zip(names, named, strict=True)))
            if eq.answer is not None:
                _check_shapes(
                    eq,
                    [
                        tuple(t.shape)
                        for t in ([result] if isinstance(result, torch.Tensor) else _flat(result))
                    ],
                    call,
                )
            results.append(result)
        if in_place:
            return None
        if not results:
            device = values[0].device
            empty = [torch.empty((0, *s.shape), dtype=s.dtype, device=device) for s in specs]
            return empty[0] if _single(eq) else tuple(empty)
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results)
        return tuple(torch.stack(column) for column in zip(*_flat_rows(results), strict=True))

    loop.__name__ = f"loop_{schema_of(op).name.partition('::')[2]}"
    if in_place:
        b.effect(loop, B, *tensors, *symbols)
        return None
    return _emit(b, eq, loop, (B, *tensors, *symbols))


def _check_shapes(eq: Equation, shapes: list[tuple[int, ...]], call: str) -> None:
    """Refuse a sample whose result has another shape than the recorded sample's."""
    expected = [v.spec.shape for v in variables(eq.outs)]
    if shapes != expected:
        name = schema_of(eq.op).name.partition("::")[2]
        raise errors.VariesError(
            f"{call}: the shape of {name}'s result depends on values, and it is {_show(expected)} "
            "for the first sample but "
            f"{_show(shapes)} for another; use torch.where, masks, or operators whose results have "
            "one shape"
        )


def _show(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def _flat_rows(results: list[Any]) -> list[list[torch.Tensor]]:
    return [[t for t in _flat(r)] for r in results]


def _flat(result: Any) -> Any:
    for item in result:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from _flat(item)


def _single(eq: Equation) -> bool:
    return len(eq.outs) == 1 and type(eq.outs[0]) is Var and len(schema_of(eq.op).returns) == 1


def _emit(b: Lowering, eq: Equation, function: Callable[..., Any], args: tuple) -> Any:
    outs = list(variables(eq.outs))
    mapped = any(v.mapped for v in values(args))
    if not outs:
        b.effect(function, *args)
        return None
    if (
        type(eq.outs[0]) is Var
        and len(eq.outs) == 1
        and str(schema_of(eq.op).returns[0].type) == "Tensor"
    ):
        return b.call(function, *args, mapped=mapped)
    if len(outs) == len(eq.outs) and None not in eq.outs:
        return b.calls_several(function, len(outs), *args, mapped=mapped)

    def flat(*values: Any) -> tuple[torch.Tensor, ...]:
        return tuple(_flat(function(*values)))

    flat.__name__ = function.__name__
    return b.calls_several(flat, len(outs), *args, mapped=mapped)
