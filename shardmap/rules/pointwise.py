"""Rules of the pointwise family: each result element depends on one element of each operand.

A batch of such calls is the same call on batches, once operands have one rank and promote as the
sample's did. So the common case emits exactly the recorded call. The table is derived: it has the
operators that PyTorch tags as pointwise, their in-place forms, and the list below of operators that
are pointwise without the tag.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shardmap._torch import (
    aten,
    has_kernel,
    operator_names,
    overload,
    overload_name,
    packet,
    schema_of,
)
from shardmap.program.ir import Equation
from shardmap.program.schema import base_name
from shardmap.rules.lowering import B, Lowering, V, dim
from shardmap.rules.promote import NO_CASTS, Casts, aligned, expanded, promoted, whole
from shardmap.rules.registry import Operator, overloads, register

_UNTAGGED = """
    rsub.Tensor floor_divide floor_divide.Scalar floor_divide_.Tensor floor_divide_.Scalar
    celu_ threshold_ gelu_ mish_ silu_backward mish_backward elu_backward hardtanh_backward
    leaky_relu_backward hardswish hardswish_ hardswish_backward hardsigmoid_backward
    softplus_backward softshrink_backward hardshrink_backward
    _prelu_kernel _prelu_kernel_backward
    bitwise_and_.Scalar __irshift__.Scalar __irshift__.Tensor
    fill.Scalar fill_.Scalar zero zero_ special_ndtr complex polar
"""
"""Operators that are pointwise although PyTorch does not tag them."""

_ELSEWHERE = set(
    overloads(
        "clone",
        "equal",
        "where.self",
        "masked_fill.Scalar",
        "masked_fill_.Scalar",
        "native_dropout_backward",
        "_conj_physical",
        "gelu_backward",
        "lerp.Tensor",
        "lerp_.Tensor",
    )
)
"""Tagged operators with a rule below or in another family; `equal` is a question."""


def pointwise(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Emit the recorded call on batches, with operands aligned and promoted as the sample's."""
    tensors = [a for a in (*args, *kwargs.values()) if type(a) is V]
    if len(tensors) == 1:
        return _emit(b, eq, args, kwargs, tensors, NO_CASTS)
    return _promoting(b, eq, args, kwargs, tensors, tensors)


def unpromoted(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Emit the recorded call on batches: its result has the dtype of its first operand."""
    tensors = [a for a in (*args, *kwargs.values()) if type(a) is V]
    return _emit(b, eq, args, kwargs, tensors, NO_CASTS)


def _promoting(
    b: Lowering,
    eq: Equation,
    args: tuple,
    kwargs: dict[str, Any],
    tensors: list[V],
    promoting: list[V],
) -> Any:
    """Emit the call with casts of operands that a batch would promote differently."""
    in_place = _in_place(eq.op)
    op = _functional(eq.op) if in_place else eq.op
    casts = promoted(b, eq, op or eq.op, args, kwargs, promoting)
    if casts is None or (casts.wider is not None and (op is None or len(eq.outs) > 1)):
        return NotImplemented
    if in_place and casts.wider is None and args[0] in casts.of:
        # The written tensor cannot be cast. It has no dimensions, so no operand has; given one
        # each, all promote as equals again.
        args = tuple([b.view(a, (1,)) if type(a) is V and not a.mapped else a for a in args])
        b.call(eq.op, *args, named=kwargs)
        return None
    return _emit(b, eq, args, kwargs, tensors, casts)


def _emit(
    b: Lowering,
    eq: Equation,
    args: tuple,
    kwargs: dict[str, Any],
    tensors: list[V],
    casts: Casts,
) -> Any:
    written, op, in_place = args[0], eq.op, _in_place(eq.op)
    ndim = max(v.ndim for v in tensors)
    if casts.of or any(v.mapped and v.ndim < ndim for v in tensors):

        def ready(a: Any) -> Any:
            return aligned(b, casts.of.get(a, a), ndim) if type(a) is V else a

        args = tuple([ready(a) for a in args])
        kwargs = {k: ready(a) for k, a in kwargs.items()}
    if casts.wider is not None:
        spec = next(eq.results()).spec
        dtype = casts.wider if spec.dtype.is_floating_point or spec.dtype.is_complex else spec.dtype
        op = (_functional(op) or op) if in_place else op
        out = b.call(op, *args, named=kwargs, shape=spec.shape, dtype=dtype)
        out = b.cast(out, spec.dtype)
        if in_place:
            b.call(aten.copy_.default, written, out)
        return None if in_place else out
    if len(eq.outs) > 1:
        return b.as_recorded(eq, eq.op, *args, named=kwargs)
    out = b.call(eq.op, *args, named=kwargs)
    return None if in_place else out


def _functional(op: Operator) -> Operator | None:
    """The form of an in-place operator that writes to no operand."""
    name = base_name(op).removesuffix("_")
    return getattr(packet(name), overload_name(op), None)


def _in_place(op: Operator) -> bool:
    first = schema_of(op).arguments[0]
    return first.alias_info is not None and first.alias_info.is_write


def _derived() -> Iterator[Operator]:
    """Operators that PyTorch tags as pointwise, and their in-place forms.

    Those that PyTorch decomposes before a recording sees them are left out.
    """
    tagged = []
    for full in operator_names():
        namespace, _, name = full.partition("::")
        if namespace != "aten" or name.endswith("out") or "_out" in name.partition(".")[2]:
            continue
        op = overload(name)
        if op is None or torch.Tag.pointwise not in op.tags:
            continue
        if not any(a.is_out for a in schema_of(op).arguments):
            tagged.append(op)
    seen = set(tagged)
    for op in list(tagged):
        form = packet(base_name(op) + "_")
        signature = [(a.name, str(a.type)) for a in schema_of(op).arguments]
        for kind in form.overloads() if form is not None else ():
            found = getattr(form, kind)
            if (
                found not in seen
                and [(a.name, str(a.type)) for a in schema_of(found).arguments] == signature
                and _in_place(found)
            ):
                seen.add(found)
                tagged.append(found)
    for op in tagged:
        if op not in _ELSEWHERE and not has_kernel(op.name(), "CompositeImplicitAutograd"):
            yield op


_TABLE = list(dict.fromkeys([*_derived(), *overloads(*_UNTAGGED.split())]))
register("pointwise", *_TABLE)(pointwise)
register(
    "pointwise",
    *overloads("masked_fill.Scalar", "masked_fill_.Scalar", "copy_", "native_dropout_backward"),
)(unpromoted)


@register("pointwise", aten.where.self)
def where(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch `where`: the condition takes no part in promotion."""
    condition, first, second = args
    return _promoting(b, eq, args, kwargs, [condition, first, second], [first, second])


@register("pointwise", aten.lerp.Tensor, aten.lerp_.Tensor)
def lerp(b: Lowering, eq: Equation, args: tuple, kwargs: dict) -> object:
    """Batch `lerp` of integers by a real weight: its kernel promotes numbers, but no tensors."""
    dtype = next(eq.results()).spec.dtype

    def real(v: V) -> V:
        return v if v.dtype.is_floating_point or v.dtype.is_complex else b.cast(v, dtype)

    start, end, weight = args
    return pointwise(b, eq, (real(start), real(end), real(weight)), kwargs)


@register("pointwise", aten.masked_fill.Tensor, aten.masked_fill_.Tensor)
def masked_fill(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V | None:
    """Batch `masked_fill` with a tensor as value: a mapped one is selected by `where`."""
    x, mask, value = args
    if not value.mapped:
        return _emit(b, eq, args, kwargs, [x, mask], NO_CASTS)
    ndim = max(x.ndim, mask.ndim)
    value = aligned(b, b.cast(value, x.dtype), ndim)
    out = b.call(aten.where.self, aligned(b, mask, ndim), value, aligned(b, x, ndim), mapped=True)
    if not _in_place(eq.op):
        return out
    b.call(aten.copy_.default, x, out)
    return None


@register("pointwise", aten.fill_.Tensor, aten.fill.Tensor)
def fill(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V | None:
    """Batch `fill` with a tensor without dimensions: a mapped one is copied.

    An unmapped one is filled in, as recorded: an integer tensor requires grad then, as in the loop.
    """
    x, value = args
    if not value.mapped:
        return _emit(b, eq, args, kwargs, [x], NO_CASTS)
    if _in_place(eq.op):
        b.call(aten.copy_.default, x, aligned(b, value, x.ndim))
        return None
    empty = b.call(aten.empty_like.default, b.batch(x))
    return b.call(aten.copy_.default, empty, aligned(b, value, x.ndim))


# -- copies: the strides of a result follow those of one sample, not of the batch


@register("pointwise", aten.clone.default, aten._to_copy.default)
def clone(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V:
    """Batch `clone`.

    A batch of channels-last samples has one dimension more than PyTorch's format of that name
    knows.
    """
    (x,) = args
    memory_format = kwargs.get("memory_format")
    if memory_format not in (torch.channels_last, torch.channels_last_3d):
        return b.call(eq.op, x, named=kwargs)
    moved = b.call(aten.movedim.int, x, 2, -1)
    copied = b.call(eq.op, moved, named=kwargs | {"memory_format": torch.contiguous_format})
    return b.call(aten.movedim.int, copied, -1, 2)


# -- gates and the two results of log_sigmoid


@register("pointwise", aten.glu.default)
def glu(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V:
    """Batch `glu`, which halves a dimension."""
    x, d = args[0], args[1] if len(args) > 1 else kwargs.get("dim", -1)
    return b.call(eq.op, x, dim(d, x.ndim))


@register("pointwise", aten.glu_backward.default)
def glu_backward(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V:
    """Batch the backward of `glu`, whose kernel does not broadcast."""
    grad, x, d = args
    return b.call(eq.op, whole(b, grad, grad.shape), whole(b, x, x.shape), dim(d, x.ndim))


@register("pointwise", aten.gelu_backward.default)
def gelu_backward(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V:
    """Batch `gelu_backward`: oneDNN's kernel reads past an operand that must be broadcast."""
    shape = torch.broadcast_shapes(*(v.shape for v in args if type(v) is V))
    given = [whole(b, v, shape) if type(v) is V else v for v in args]
    return b.call(eq.op, *given, named=kwargs)


@register("pointwise", aten.log_sigmoid_forward.default)
def log_sigmoid_forward(
    b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]
) -> tuple[V, V]:
    """Batch `log_sigmoid` and the buffer `exp(-|x|)`, which only the CPU kernel fills."""
    out, buffer = b.calls_several(eq.op, 2, *args)
    spec = eq.outs[1].spec
    x = args[0]
    if spec.shape != x.shape:
        buffer = b.call(aten.new_empty.default, x, [B, *spec.shape])
    elif b.device_type != "cpu":
        buffer = b.call(aten.exp.default, b.call(aten.neg.default, b.call(aten.abs.default, x)))
    return out, buffer


@register("pointwise", aten.log_sigmoid_backward.default)
def log_sigmoid_backward(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V:
    """Batch the backward of `log_sigmoid`.

    If it was recorded where no kernel fills the buffer and runs where one reads it, it is computed
    here.
    """
    grad, x, buffer = args
    shape = eq.outs[0].spec.shape
    if buffer.shape != x.shape:
        buffer = b.call(
            aten.exp.default, b.call(aten.neg.default, b.call(aten.abs.default, x)), shape=x.shape
        )
    return b.call(
        eq.op, expanded(b, grad, shape), expanded(b, x, shape), expanded(b, buffer, shape)
    )
