"""Rules of the reduce family.

They are reductions, scans, softmax, sorting and selection along dimensions of a sample.

All share one index algebra: a dimension `d` of the sample is `d + 1` of the batch, no dimension
means all of the sample's, and a sample without dimensions gets one.
"""

from __future__ import annotations

from typing import Any

import torch

from shardmap._torch import aten, dispatch_depth, schema_of
from shardmap.program.ir import Equation
from shardmap.program.schema import short_name
from shardmap.rules.evenly import picked
from shardmap.rules.lowering import B, Lowering, V, arguments, dim
from shardmap.rules.promote import expanded
from shardmap.rules.registry import Operator, overloads, register

_MANY = {
    "sum": "sum.dim_IntList",
    "sum.dim_IntList": None,
    "nansum": None,
    "mean": "mean.dim",
    "mean.dim": None,
    "amax": None,
    "amin": None,
    "max": "amax",
    "min": "amin",
    "all": "all.dims",
    "any": "any.dims",
    "all.dims": None,
    "any.dims": None,
    "all.dim": None,
    "any.dim": None,
    "var.correction": None,
    "std.correction": None,
    "var_mean.correction": None,
    "std_mean.correction": None,
    "logsumexp": None,
    "linalg_vector_norm": None,
    "norm.Scalar": "norm.ScalarOpt_dim",
    "norm.ScalarOpt_dim": None,
    "norm.ScalarOpt_dtype": "norm.ScalarOpt_dim_dtype",
    "norm.ScalarOpt_dim_dtype": None,
    "count_nonzero": "count_nonzero.dim_IntList",
    "count_nonzero.dim_IntList": None,
}
"""Reductions over any number of dimensions: the recorded operator, and its form that takes
dimensions."""

_ONE = {
    "prod": "prod.dim_int",
    "prod.dim_int": None,
    "argmax": None,
    "argmin": None,
    "aminmax": None,
    "max.dim": None,
    "min.dim": None,
    "median": "median.dim",
    "median.dim": None,
    "nanmedian": "nanmedian.dim",
    "nanmedian.dim": None,
    "mode": None,
    "kthvalue": None,
}
"""Reductions over one dimension, or over the sample as one dimension."""

_ALONG = """
    cumsum cumsum_ cumprod cumprod_ logcumsumexp cummax cummin sort sort.stable argsort.stable topk
    _softmax _log_softmax _safe_softmax
"""
"""Operators along one dimension, which stays."""


def _send(b: Lowering, op: Operator, named: dict[str, Any]) -> Any:
    """Emit `op` with those of the arguments that it takes, by name; defaults are left out."""
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for a in schema_of(op).arguments:
        value = named.get(a.name, a.default_value)
        if not a.kwarg_only:
            positional.append(value)
        elif value != a.default_value:
            keywords[a.name] = value
    if len(schema_of(op).returns) > 1:
        return b.calls_several(op, len(schema_of(op).returns), *positional, **keywords)
    return b.call(op, *positional, named=keywords)


def _viewed(b: Lowering, eq: Equation, out: Any) -> Any:
    """View the results with the recorded shapes."""
    if isinstance(out, V):
        return b.call(aten.view.default, out, [B, *eq.outs[0].spec.shape])
    return tuple(
        [
            b.call(aten.view.default, v, [B, *var.spec.shape])
            for v, var in zip(out, eq.outs, strict=True)
        ]
    )


def _form(eq: Equation, table: dict[str, str | None]) -> Operator:
    name = short_name(eq.op)
    (form,) = overloads(table[name] or name)
    return form


@register("reduce", *overloads(*_MANY))
def many(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch a reduction over some dimensions of each sample."""
    named = arguments(eq, args, kwargs)
    x: V = named["self"]
    if (found := _picked(b, eq, x)) is not None:
        return found
    form = _form(eq, _MANY)
    d = named.get("dim")
    takes_one = type(d) is int and form is eq.op
    ds: Any = [d] if type(d) is int else d
    if not x.ndim:
        return _send(
            b,
            form,
            named | {"self": b.view(x, (1,)), "dim": 1 if takes_one else [1], "keepdim": False},
        )
    if ds is not None and not ds and eq.outs[0].spec.shape == x.shape:
        # `all` and `any` over an empty list of dimensions keep every element; for most reductions
        # it means all dimensions.
        return _send(
            b,
            form,
            named | {"self": b.view(x, (*x.shape, 1)), "dim": [x.ndim + 1], "keepdim": False},
        )
    dims = [dim(d, x.ndim) for d in ds] if ds else list(range(1, x.ndim + 1))
    if form is aten.sum.dim_IntList and len(dims) == x.ndim and not named.get("keepdim"):
        squared = _squared(b, x)
        if squared is not None and named.get("dtype") in (None, x.dtype):
            return _sum_of_squares(b, squared)
    return _send(b, form, named | {"dim": dims[0] if takes_one else dims})


def _picked(b: Lowering, eq: Equation, x: V) -> V | None:
    """One of each sample's elements where a derivative from outside may be taken, or None."""
    if not (b.grad or b.transformed) or not x.dtype.is_floating_point:
        return None
    form = picked(eq.op)
    return None if form is None else b.call(form, b.reshape(x, (x.numel,)), shape=(), dtype=x.dtype)


def _squared(b: Lowering, x: V) -> V | None:
    """The value whose square `x` is, or None if one pass for both would not pay.

    Norms of gradients are sums of squares of tensors that are larger than anything else; written
    out and read again they cost twice the time (12.2 against 6.2 microseconds for each 256 x 784
    float32, two threads). Where outer autograd records, its own formulas stay.
    """
    if (
        b.grad
        or b.transformed
        or not x.mapped
        or x.ndim < 2
        or x.dtype not in (torch.float32, torch.float64)
    ):
        return None
    if x.numel < _WORTHWHILE or x.shape[-1] > _MOST_IN_ONE_NORM:
        return None
    for number in range(len(b.calls) - 1, -1, -1):
        call = b.calls[number]
        if call.writes:
            return None  # the values may have changed by now
        if x.index in call.outs:
            break
    else:
        return None
    args = call.args
    square = (
        (call.op is aten.square.default and len(args) == 1)
        or (
            call.op is aten.pow.Tensor_Scalar
            and len(args) == 2
            and type(args[1]) in (int, float)
            and args[1] == 2
        )
        or (call.op is aten.mul.Tensor and len(args) == 2 and args[0] == args[1])
    )
    base = args[0] if square else None
    return (
        base
        if isinstance(base, V) and base.mapped and base.shape == x.shape and base.dtype == x.dtype
        else None
    )


_WORTHWHILE = 1 << 12
"""Least number of elements of one sample for one pass."""
_MOST_IN_ONE_NORM = 1 << 12
"""Most elements in one norm: the kernel adds up in order, which over 3 million loses four digits;
over rows of 784 it is as exact as a sum of squares."""


def _sum_of_squares(b: Lowering, x: V) -> V:
    """Sum squares row by row in one pass, then over the rows."""
    rows = b.call(aten.linalg_vector_norm.default, x, 2, [x.ndim], shape=x.shape[:-1])
    return b.call(
        aten.sum.dim_IntList, b.call(aten.square.default, rows), list(range(1, x.ndim)), shape=()
    )


@register("reduce", *overloads(*_ONE))
def one(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch a reduction over one dimension of each sample, or over the flattened sample."""
    named = arguments(eq, args, kwargs)
    x: V = named["self"]
    if (found := _picked(b, eq, x)) is not None:
        return found
    form = _form(eq, _ONE)
    d = named.get("dim")
    if d is not None and x.ndim:
        return _send(b, form, named | {"dim": dim(d, x.ndim)})
    out = _send(b, form, named | {"self": b.reshape(x, (x.numel,)), "dim": 1, "keepdim": False})
    if type(out) is tuple:
        out = out[: len(eq.outs)]  # the median over all has no indices
    if not eq.outs[0].spec.shape:
        return out
    return _viewed(b, eq, out)


@register("reduce", *overloads(*_ALONG.split()))
def along(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch a scan, softmax or sort along one dimension of each sample."""
    named = arguments(eq, args, kwargs)
    x: V = named["self"]
    tracked = b.grad or b.transformed
    if eq.op is aten._safe_softmax.default and x.ndim and b.device_type == "cpu" and not tracked:
        return b.call(safe_softmax, x, dim(named["dim"], x.ndim), named.get("dtype"))
    if x.ndim:
        out = _send(b, eq.op, named | {"dim": dim(named["dim"], x.ndim)})
    else:
        out = _send(b, eq.op, named | {"self": b.view(x, (1,)), "dim": 1})
        if not schema_of(eq.op).is_mutable:
            return _viewed(b, eq, out)
    return None if schema_of(eq.op).is_mutable else out


def safe_softmax(x: torch.Tensor, d: int, dtype: torch.dtype | None) -> torch.Tensor:
    """The softmax whose rows of -inf are zeros, by the kernel of the plain one.

    The operator looks for such rows in several passes: on [8, 3, 64, 64] it takes 418 us, the plain
    softmax 83. A row of -inf is NaN there, as is the first element of each such row.
    """
    if dtype in (None, x.dtype) and x.numel() and not dispatch_depth():
        out = aten._softmax(x, d, False)
        if not out.select(d, 0).isnan().any():
            return out
    return aten._safe_softmax(x, d, dtype)


@register("reduce", aten._softmax_backward_data.default, aten._log_softmax_backward_data.default)
def softmax_backward(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch the backward of softmax and log_softmax, whose kernels do not broadcast."""
    grad, output, d, dtype = args
    shape = output.shape or (1,)
    out = b.call(
        eq.op, expanded(b, grad, shape), expanded(b, output, shape), dim(d, len(shape)), dtype
    )
    return out if output.ndim else _viewed(b, eq, out)


@register("reduce", aten.trace.default)
def trace(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V:
    """Batch the sum of the diagonal."""
    return b.call(aten.sum.dim_IntList, b.call(aten.diagonal.default, args[0], 0, 1, 2), [1])


@register("reduce", aten._is_all_true.default, aten._is_any_true.default)
def all_or_any_true(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V:
    """Reduce each sample to the truth of all, or of any, of its elements."""
    x: V = args[0]
    op = aten.all.dim if eq.op is aten._is_all_true.default else aten.any.dim
    return b.call(op, b.reshape(x, (x.numel,)), 1, shape=(), dtype=torch.bool)


@register("reduce", aten.renorm.default)
def renorm(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V:
    """Scale the parts of each sample along a dimension down to a largest norm.

    The parts of all samples are those of one tensor along its first dimension, so that the
    derivatives are the operator's own, which are not those of a composition where a norm is NaN.
    """
    x, p, d, most = args
    at = dim(d, x.ndim)

    def renorm_parts(x: torch.Tensor) -> torch.Tensor:
        parts = x.movedim(at, 1)
        scaled = aten.renorm.default(parts.flatten(0, 1), p, 0, most)
        return scaled.view(parts.shape).movedim(1, at).contiguous()

    return b.call(renorm_parts, x)
