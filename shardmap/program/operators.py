"""Facts about an operator that the recorder needs before it runs.

They come from the schema, the tags, and short lists of what those do not tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shardmap._torch import OpOverload, aten, has_kernel, schema_of
from shardmap._torch import packet as find_packet
from shardmap.program.ir import Var, variables
from shardmap.program.schema import base_name, by_name

_QUESTIONS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
    aten.allclose.default,
}
"""Operators that return a tensor's value to python."""

SCALARS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default}
"""Operators among them that return the only element of a tensor."""

CHECKS = {aten._linalg_check_errors.default}
"""Operators that raise where an earlier one has failed for the sample, and return nothing."""

_METADATA = {
    "is_same_size",
    "_has_same_storage_numel",
    "_has_compatible_shallow_copy_type",
    "is_pinned",
    "_debug_has_internal_overlap",
}
"""Operators that return metadata to python, the same for every sample."""

_PACKS = aten._pack_padded_sequence.default
"""Its results are as long as the lengths say, though torch does not tag it so."""

_UNINITIALISED = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.empty_permuted.default,
}

_SHAPE_ONLY = {
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten._new_zeros_with_same_feature_meta.default,
}
"""Operators that read the shape, strides, dtype and device of their tensor and not its values."""

BELOW_AUTOGRAD = {
    getattr(op, f"{start}_{end}")
    for op in (aten.linspace, aten.logspace)
    for start, end in (("Tensor", "Tensor"), ("Tensor", "Scalar"), ("Scalar", "Tensor"))
}
"""Operators that torch's python functions call below autograd, as they do all that make tensors of
a given size: their results have neither a gradient nor a tangent."""

OPEN_SCALARS = {
    getattr(getattr(aten, name), overload)
    for name in ("add", "sub", "mul", "div", "rsub", "add_", "sub_", "mul_", "div_")
    for overload in ("Tensor", "Scalar")
    if overload in getattr(aten, name).overloads()
}
"""Operators whose float arguments are bound at each call, so that a changing learning rate does
not lower again."""

_TRAINING_WRITES = {
    "native_batch_norm": (3, 4, 5),
    "_native_batch_norm_legit": (3, 4, 5),
    "cudnn_batch_norm": (3, 4, 5),
    "miopen_batch_norm": (3, 4, 5),
    "batch_norm": (3, 4, 5),
    "_batch_norm_impl_index": (3, 4, 5),
    "instance_norm": (3, 4, 5),
}
"""Operators that write running statistics in training although their schema does not say so:
positions of (mean, variance, training)."""


@dataclass(frozen=True, slots=True)
class OpInfo:
    """Facts about an operator that the recorder needs before it runs."""

    op: OpOverload
    writes: tuple[int, ...]
    """Positions of the arguments that it writes in place."""
    writes_named: tuple[str, ...]
    random: bool
    composite: bool
    """True if it reaches the recorder undecomposed although it is defined by other operators."""
    dynamic: bool
    """True if the shape of its result depends on values."""
    question: bool
    metadata: bool
    shape_only: bool
    """True if it makes a tensor from the metadata of another: its result does not differ by sample
    even where that tensor does."""
    view_in_place: OpOverload | None
    """For an operator that changes its argument's shape or strides in place: the operator that
    returns such a view."""
    resizes: bool
    """True if it gives its argument other memory or another size."""
    hidden_writes: tuple[int, int, int] | None
    """Positions of running mean, running variance and the training flag, for operators that write
    them although their schema does not say so."""
    open_scalars: bool
    uninitialised: bool
    plain: bool
    """True if none of the above applies: the call is only recorded."""


_infos: dict[int, OpInfo] = {}


def op_info(op: OpOverload) -> OpInfo:
    """The facts about `op`, from its schema and tags, found once."""
    info = _infos.get(
        id(op)
        # hashing an overload runs python code; its address is as good while `OpInfo.op` keeps it
        # alive
    )
    if info is None:
        info = _infos[id(op)] = _op_info(op)
    return info


def _op_info(op: OpOverload) -> OpInfo:
    schema = schema_of(op)
    writes = tuple(
        i
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write and not a.kwarg_only
    )
    named = tuple(
        a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    )
    name = base_name(op)
    composite = op.namespace != "prim" and has_kernel(op.name(), "CompositeImplicitAutograd")
    is_random = torch.Tag.nondeterministic_seeded in op.tags
    info = OpInfo(
        op=op,
        writes=writes,
        writes_named=named,
        random=is_random,
        composite=composite and op not in _QUESTIONS and name not in _METADATA,
        dynamic=torch.Tag.dynamic_output_shape in op.tags or op is _PACKS,
        question=op in _QUESTIONS or _answers_python(op, name),
        metadata=name in _METADATA
        or op.namespace in ("prim", "profiler")
        or name.startswith("sym_")
        or _without_tensors(schema),
        shape_only=op in _SHAPE_ONLY,
        hidden_writes=_TRAINING_WRITES.get(name),
        view_in_place=_functional(op, name) if torch.Tag.inplace_view in op.tags else None,
        resizes=torch.Tag.inplace_view in op.tags and _functional(op, name) is None,
        open_scalars=op in OPEN_SCALARS,
        uninitialised=op in _UNINITIALISED,
        plain=False,
    )
    special = (
        info.writes
        or info.writes_named
        or info.random
        or info.composite
        or info.dynamic
        or info.question
        or info.metadata
        or info.hidden_writes
        or op in CHECKS
    )
    plain = (
        not special
        and info.view_in_place is None
        and not info.uninitialised
        and op is not aten.lift_fresh.default
    )
    return dataclasses.replace(info, plain=plain)


def _answers_python(op: OpOverload, name: str) -> bool:
    """True if an operator reads tensors and returns a number or a truth value to python."""
    kinds = {str(r.type) for r in schema_of(op).returns}
    return bool(kinds) and kinds <= {"bool", "int", "float", "number"} and name not in _METADATA


def _without_tensors(schema: Any) -> bool:
    """True if an operator takes or returns objects, such as a profiler's range, and no tensors."""
    kinds = [v.type for v in (*schema.arguments, *schema.returns)]
    return any(k.kind() == "ClassType" for k in kinds) and not any(
        "Tensor" in str(k) for k in kinds
    )


_VIEWS_IN_PLACE = {"swapaxes_": "transpose", "swapdims_": "transpose"}


def _functional(op: OpOverload, name: str) -> OpOverload | None:
    """The operator that returns the view that `op` makes of its argument in place.

    None for operators that are no views, such as `resize_`.
    """
    if name == "set_":  # other memory, not a view
        return None
    packet = find_packet(_VIEWS_IN_PLACE.get(name, name.removesuffix("_")))
    kinds = [str(a.type) for a in schema_of(op).arguments]
    for overload in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, overload)
        returns = schema_of(candidate).returns
        if (
            [str(a.type) for a in schema_of(candidate).arguments] == kinds
            and len(returns) == 1
            and returns[0].alias_info is not None
        ):
            return candidate
    return None


def draws(op: OpOverload, args: tuple, kwargs: dict[str, Any]) -> bool:
    """True if a call draws random numbers: not if its dropout is 0 or switched off."""
    if not op_info(op).random:
        return False
    for name, value in by_name(op, args, kwargs).items():
        drops = name in ("dropout_p", "dropout", "p") and "dropout" in name + schema_of(op).name
        if drops and value == 0:
            return False
        if name in ("train", "training") and value is False:
            return False
    return True


def shape_depends_on_values(op: OpOverload, args: tuple) -> bool:
    """True if this call's result has a shape that depends on values."""
    if op is aten.index.Tensor:  # dynamic only for masks
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return True


def deciders(op: OpOverload, args: tuple) -> Iterator[Var]:
    """The arguments whose values decide the shape of a result: the mask of `x[mask]`, not `x`."""
    if op in (aten.index.Tensor, aten.masked_select.default, aten.repeat_interleave.self_Tensor):
        return variables(args[1:])
    if op is aten._ctc_loss.default:  # whose lengths are numbers
        return iter(())
    if op is aten._ctc_loss.Tensor:  # the longest targets: those of the inputs fill up to its time
        return variables(args[3:4])
    if op is _PACKS:
        return variables(args[1:2])
    if op is aten.bincount.default:
        return variables(args[:1])
    if op is aten.linalg_lstsq.default:
        return iter(
            ()
        )  # residuals are left out where a matrix lacks rank: replay checks that none does
    return variables(args)
