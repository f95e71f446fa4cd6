"""Rules of the view family: views of the same memory, and the copies that rearrange it.

The samples' dimensions are one further back in the batch; most rules only account for that.
Views that only reorder dimensions, insert or drop ones of size 1, or regroup elements in order are
known to `shardmap.rules.view_folding`, so that calls on them can often use their base.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import OpOverload, aten
from shardmap.program.analysis import live_equations, written
from shardmap.program.ir import Equation, Program
from shardmap.program.operators import op_info
from shardmap.program.schema import by_name
from shardmap.rules import registry
from shardmap.rules.lowering import B, Lowering, V, dim, dims
from shardmap.rules.view_folding import views


def rules(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated `f(b, eq, *args, **kwargs)` for `aten.<name>`.

    The arguments have the operators' own names and defaults.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def rule(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            return function(b, eq, *args, **kwargs)

        registry.register("view", *registry.overloads(*names))(rule)
        return function

    return decorate


def emit(b: Lowering, eq: Equation, x: Any, *args: Any, target: Any = None) -> V:
    """Emit the recorded operator (or `target`) on the whole batch, its result as recorded."""
    spec = eq.outs[0].spec
    return b.call(target or eq.op, x, *args, shape=spec.shape, dtype=spec.dtype, mapped=True)


# -- the same elements in the same order


@rules("view", "_reshape_alias")
def view(b: Lowering, eq: Equation, x: V, size: Any, stride: Any = None) -> V:
    """Batch `view` as `[B, *x] -> [B, *size]`; the recorded result tells the value of -1."""
    return views(b).reshaped(x, eq.outs[0].spec.shape)


@rules("alias")
def alias(b: Lowering, eq: Equation, x: V) -> V:
    """Batch a view of everything; the engine leaves out those that nothing writes to."""
    return emit(b, eq, x)


@rules("_unsafe_view", "view_copy", "_reshape_copy")
def unsafe_view(b: Lowering, eq: Equation, x: V, size: Any) -> V:
    """Batch `unsafe_view`, which autograd does not treat as a view.

    Its result may be written to even if its base is saved for a backward.
    """
    shape = eq.outs[0].spec.shape
    return emit(b, eq, x, [B, *shape])


@rules("unsqueeze")
def unsqueeze(b: Lowering, eq: Equation, x: V, d: int) -> V:
    """Insert a dimension of size 1."""
    d = d + x.ndim + 1 if d < 0 else d
    order = list(range(x.ndim))
    return views(b).rearrange(x, (*order[:d], None, *order[d:]))


@rules("squeeze", "squeeze.dim", "squeeze.dims")
def squeeze(b: Lowering, eq: Equation, x: V, d: int | Sequence[int] | None = None) -> V:
    """Drop dimensions of size 1, never that of the batch."""
    if d is None:
        chosen = set(range(x.ndim))
    else:
        chosen = {i % max(x.ndim, 1) for i in ([d] if isinstance(d, int) else d)}
    return views(b).rearrange(
        x, tuple(i for i in range(x.ndim) if not (i in chosen and x.shape[i] == 1))
    )


@rules("t")
def t(b: Lowering, eq: Equation, x: V) -> V:
    """Transpose a matrix; a vector stays itself."""
    return views(b).rearrange(x, tuple(reversed(range(x.ndim))))


@rules("transpose.int")
def transpose(b: Lowering, eq: Equation, x: V, dim0: int, dim1: int) -> V:
    """Exchange two dimensions."""
    order = list(range(x.ndim))
    if x.ndim:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return views(b).rearrange(x, tuple(order))


@rules("permute")
def permute(b: Lowering, eq: Equation, x: V, order: Sequence[int]) -> V:
    """Reorder all dimensions."""
    return views(b).rearrange(x, tuple(d % x.ndim for d in order))


@rules("expand")
def expand(b: Lowering, eq: Equation, x: V, size: Sequence[int], implicit: bool = False) -> V:
    """Repeat sizes of 1; new dimensions go between batch and sample."""
    shape = eq.outs[0].spec.shape
    whole = ones_before(b, x, len(shape))
    return emit(b, eq, whole, B, *shape, target=torch.Tensor.expand)


@rules("expand_copy")
def expand_copy(b: Lowering, eq: Equation, x: V, size: Sequence[int], implicit: bool = False) -> V:
    """Repeat sizes of 1 in memory."""
    shape = eq.outs[0].spec.shape
    return emit(b, eq, ones_before(b, x, len(shape)), [B, *shape])


def ones_before(b: Lowering, x: V, ndim: int) -> V:
    """View a mapped value with `ndim` sample dimensions."""
    return (
        views(b).rearrange(x, (*[None] * (ndim - x.ndim), *range(x.ndim))) if x.ndim < ndim else x
    )


# -- parts


@rules("select.int", "diagonal", "slice.Tensor", "narrow_copy", "unfold", "flip")
def with_dims(b: Lowering, eq: Equation, x: V, *args: Any, **kwargs: Any) -> Any:
    """Batch an operator whose dimension arguments are one further back."""
    if x.ndim == 0:
        return at_least_one_dim(b, eq, x, *args, **kwargs)
    return b.call(eq.op, x, *shifted(eq.op, x.ndim, args, kwargs), shape=eq.outs[0].spec.shape)


def at_least_one_dim(b: Lowering, eq: Equation, x: V, *args: Any, **kwargs: Any) -> Any:
    """Batch an operator that treats a number as a vector of one: `unfold`, `flip`."""
    shape = eq.outs[0].spec.shape
    out = b.call(
        eq.op, views(b).rearrange(x, (None,)), *shifted(eq.op, 1, args, kwargs), shape=(1, *shape)
    )
    return views(b).rearrange(out, tuple(range(1, out.ndim)))


DIMENSIONS = {"dim", "dim0", "dim1", "dim2", "dims", "dimension"}
"""Names of the arguments that are dimensions."""


def shifted(
    op: OpOverload, ndim: int, args: Sequence[Any], kwargs: dict[str, Any], skip: int = 1
) -> list[Any]:
    """All arguments behind the first `skip`, with defaults.

    Dimensions of an `ndim`-dimensional sample are one further back.
    """
    named: dict[str, Any] = by_name(op, [None] * skip + list(args), kwargs)
    for name in DIMENSIONS & named.keys():
        value = named[name]
        named[name] = dim(value, ndim) if isinstance(value, int) else dims(value, ndim)
    return list(named.values())[skip:]


@rules(
    "split.Tensor",
    "split_with_sizes",
    "unbind.int",
    "unsafe_split.Tensor",
    "unsafe_split_with_sizes",
    "split_with_sizes_copy",
)
def parts(b: Lowering, eq: Equation, x: V, *args: Any, **kwargs: Any) -> tuple[V, ...]:
    """Batch an operator that returns a list of parts."""
    return b.calls_several(eq.op, len(list(eq.results())), x, *shifted(eq.op, x.ndim, args, kwargs))


@rules("as_strided", "as_strided_copy")
def as_strided(
    b: Lowering,
    eq: Equation,
    x: V,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> V:
    """Batch `as_strided`, from where the sample's tensor begins.

    An explicit offset is absolute in the sample's memory: the rule uses its distance from the
    argument's own. On a mapped input, where it would be absolute in the memory of the whole batch,
    `refuse_offsets_of_inputs` refuses it.
    """
    step = 0 if storage_offset is None else storage_offset - eq.args[0].spec.offset

    def sample_strides(t: torch.Tensor, count: int) -> torch.Tensor:
        layout = [count, *size], [t.stride(0), *stride]
        return t.as_strided(*layout, t.storage_offset() + step) if step else t.as_strided(*layout)

    def copied(t: torch.Tensor, count: int) -> torch.Tensor:
        return sample_strides(t, count).clone(memory_format=torch.contiguous_format)

    is_view = eq.op is aten.as_strided.default
    return emit(b, eq, x, B, target=sample_strides if is_view else copied)


@rules("as_strided_scatter")
def as_strided_scatter(
    b: Lowering,
    eq: Equation,
    x: V,
    part: V,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Any:
    """Batch a copy of `x`, in the sample's strides, with `part` written at other strides."""
    spec = eq.args[0].spec
    step = 0 if storage_offset is None else storage_offset - spec.offset
    span, reach = [
        first + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
        for first, sizes, strides in ((0, spec.shape, spec.stride), (step, size, stride))
    ]
    inside = 0 <= step and reach <= span and all(s >= 0 for s in stride)
    # torch's own gradient of it is another than that of these calls, and the loop has it.
    if b.grad or b.transformed or not inside or 0 in (*spec.shape, *size):
        return NotImplemented

    def written(x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        out = x.new_empty_strided(x.shape, (span, *spec.stride))
        # Gaps between the elements are not read by anyone.
        out.copy_(x)
        out.as_strided([len(x), *size], [span, *stride], step).copy_(part)
        return out

    return emit(b, eq, b.batch(x), b.batch(part), target=written)


_STRIDED = {
    aten.as_strided.default: 3,
    aten.as_strided_.default: 3,
    aten.as_strided_copy.default: 3,
    aten.as_strided_scatter.default: 4,
}
"""Operators that take an offset into the whole memory of their first argument, and its place."""


def _is_used(program: Program, number: int) -> bool:
    """True if a result or something that is written depends on a call."""
    groups = {v.group for eq in program.equations for v in written(eq)}
    reading = [
        eq._replace(args=()) if op_info(eq.op).shape_only else eq for eq in program.equations
    ]
    return live_equations(program._replace(equations=tuple(reading)), groups, groups)[number]


def refuse_offsets_of_inputs(program: Program, call: str) -> None:
    """Refuse `as_strided` with an explicit offset on a mapped input.

    Raises:
        EscapeError: In the loop the offset counts from the start of the whole batch, in the
            recording from that of the sample.
    """
    inputs = {v.group for v in program.inputs}
    for number, eq in enumerate(program.equations):
        if eq.op in _STRIDED and eq.args[0].group in inputs:
            if eq.op is aten.as_strided_scatter.default and not _is_used(program, number):
                continue  # a gradient often needs nothing of it
            named, at = dict(eq.kwargs), _STRIDED[eq.op]
            offset = eq.args[at] if len(eq.args) > at else named.get("storage_offset")
            if offset is not None:
                name = eq.op.name().removeprefix("aten::")
                raise errors.EscapeError(
                    f"{call}: {name} with storage_offset={offset} on a mapped "
                    "argument or a view of it would count from the start of "
                    "the whole batch's memory; leave storage_offset out and index the tensor first"
                )


@rules(
    "view.dtype",
    "view_copy.dtype",
    "view_as_real",
    "view_as_complex",
    "_conj",
    "_neg_view",
    "_conj_physical",
    "lift_fresh_copy",
)
def elementwise(b: Lowering, eq: Equation, x: V, *args: Any) -> V:
    """Batch a view of the last dimension, or of each element."""
    return emit(b, eq, x, *args)


# -- copies in another arrangement


@rules("roll")
def roll(b: Lowering, eq: Equation, x: V, shifts: Any, over: Sequence[int] = ()) -> V:
    """Batch `roll`; without dimensions the sample is rolled as if flat."""
    if over:
        return (
            emit(b, eq, x, shifts, [d % max(x.ndim, 1) + 1 for d in over])
            if x.ndim
            else emit(b, eq, x, target=torch.clone)
        )
    flat = b.reshape(x, (x.numel,))
    return b.view(b.call(eq.op, flat, shifts, [1], shape=(x.numel,)), x.shape)


@rules("repeat")
def repeat(b: Lowering, eq: Equation, x: V, repeats: Sequence[int]) -> V:
    """Batch `repeat`; new dimensions go between batch and sample."""
    return emit(b, eq, ones_before(b, x, len(repeats)), [1, *repeats])


@rules("cat")
def cat(b: Lowering, eq: Equation, tensors: Sequence[V], d: int = 0) -> V:
    """Batch `cat`.

    PyTorch lets a vector without elements fit anything, but not in the batch.
    """
    spec = eq.outs[0].spec
    kept = [x for x in tensors if x.shape != (0,) or spec.ndim == 1]
    if not kept:
        return NotImplemented
    return emit(b, eq, [b.cast(b.batch(x), spec.dtype) for x in kept], dim(d, spec.ndim))


@rules("stack")
def stack(b: Lowering, eq: Equation, tensors: Sequence[V], d: int = 0) -> V:
    """Batch `stack` of mapped values; the new dimension is one further back."""
    spec = eq.outs[0].spec
    return emit(b, eq, [b.cast(b.batch(x), spec.dtype) for x in tensors], dim(d, spec.ndim))


@rules("constant_pad_nd", "tril", "triu")
def last_dims(b: Lowering, eq: Equation, x: V, *args: Any, **kwargs: Any) -> V:
    """Batch an operator on the last dimensions."""
    return b.call(eq.op, x, *args, shape=eq.outs[0].spec.shape, **kwargs)


@rules("diag_embed")
def diag_embed(
    b: Lowering, eq: Equation, x: V, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> V:
    """Batch `diag_embed`, whose dimensions are the result's."""
    if x.ndim == 0:
        return NotImplemented
    return emit(b, eq, x, offset, dim(dim1, x.ndim + 1), dim(dim2, x.ndim + 1))


# -- backward of parts, and writing parts into copies


@rules("select_backward", "slice_backward", "diagonal_backward", "unfold_backward")
def backward_of_part(
    b: Lowering, eq: Equation, grad: V, size: Sequence[int], *args: Any, **kwargs: Any
) -> V:
    """Batch the backward of a part: zeros of the whole's size with the gradient of the part."""
    if not size:
        return NotImplemented
    return emit(b, eq, grad, [B, *size], *shifted(eq.op, len(size), args, kwargs, skip=2))


@rules("slice_scatter", "select_scatter", "diagonal_scatter")
def scatter_part(b: Lowering, eq: Equation, x: V, part: V, *args: Any, **kwargs: Any) -> V:
    """Batch a copy of `x` with `part` written into it."""
    return emit(b, eq, b.batch(x), b.batch(part), *shifted(eq.op, x.ndim, args, kwargs, skip=2))


# -- views as copies


def _copied(op: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The view `op` as a copy."""
    return op(*args, **kwargs).clone(memory_format=torch.contiguous_format)


for _name in ("permute", "squeeze", "t", "transpose", "unsqueeze"):
    _packet = getattr(aten, f"{_name}_copy")
    for _overload in _packet.overloads():
        if "out" not in _overload:
            _view = getattr(getattr(aten, _name), _overload)
            registry.register_decomposition(
                getattr(_packet, _overload), functools.partial(_copied, _view)
            )
