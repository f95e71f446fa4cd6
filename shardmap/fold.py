"""What is put right in a program before the rules see it: views in place, and offsets that mean nothing to a sample."""

from __future__ import annotations

from typing import Any

import torch

from shardmap import errors
from shardmap.program import Program, Spec, Var

aten = torch.ops.aten


def without_views_in_place(program: Program) -> Program:
    """The program with `t_`, `squeeze_` and their kin as views with variables of their own.

    They write nothing: the same tensor object has another shape from then on. `matmul` in PyTorch squeezes its result so.
    """
    if not any(torch.Tag.inplace_view in eq.op.tags for eq in program.equations):
        return program
    now: dict[int, Var] = {}
    count = 1 + max(v.index for eq in program.equations for v in (*eq.inputs(), *eq.results()))

    def current(value: Any) -> Any:
        if type(value) is Var:
            return now.get(value.index, value)
        return tuple([current(v) for v in value]) if type(value) is tuple else value

    equations = []
    for eq in program.equations:
        args = current(eq.args) if now else eq.args
        kwargs = tuple([(k, current(v)) for k, v in eq.kwargs]) if now and eq.kwargs else eq.kwargs
        outs = current(eq.outs) if now else eq.outs
        op = eq.op
        if torch.Tag.inplace_view in op.tags and (functional := _functional(op)) is not None:
            var, op = args[0], functional
            outs = (Var(count, var.group, _spec_of_view(op, var.spec, args[1:])),)
            now[eq.args[0].index] = outs[0]
            count += 1
        equations.append(eq._replace(op=op, args=args, kwargs=kwargs, outs=outs))
    return program._replace(equations=tuple(equations), outputs=current(program.outputs))


def _functional(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    name = op._schema.name.partition("::")[2].removesuffix("_")
    packet = getattr(aten, name)
    overload = {"transpose": "int"}.get(name, op._overloadname)
    if name not in ("t", "transpose", "squeeze", "unsqueeze", "as_strided"):
        return None
    return getattr(packet, overload)


def _spec_of_view(op: torch._ops.OpOverload, spec: Spec, args: tuple) -> Spec:
    span = 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True) if n)
    whole = torch.empty(spec.offset + span, dtype=spec.dtype, device="meta")
    with torch._C._DisableTorchDispatch():
        seen = op(torch.as_strided(whole, spec.shape, spec.stride, spec.offset), *args)
    return spec._replace(shape=tuple(seen.shape), stride=seen.stride(), offset=seen.storage_offset())


def refuse_offsets_of_inputs(program: Program, call: str) -> None:
    """Refuse `as_strided` with an explicit offset on a mapped input.

    Raises:
        EscapeError: In the loop that offset counts from the start of the whole batch, in the recording from that of the sample.
    """
    inputs = {v.group for v in program.inputs}
    for eq in program.equations:
        if eq.op in (aten.as_strided.default, aten.as_strided_.default) and eq.args[0].group in inputs:
            named = dict(eq.kwargs)
            offset = eq.args[3] if len(eq.args) > 3 else named.get("storage_offset")
            if offset is not None:
                raise errors.EscapeError(
                    f"{call}: as_strided with storage_offset={offset} on a mapped argument or a view of it would count from the start of "
                    "the whole batch's memory; leave storage_offset out and index the tensor first"
                )
