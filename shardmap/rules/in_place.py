"""Batching rules of operators that write to their first argument: `addmm_`, `tril_`, `renorm_`.

Each computes the result by the rule of the operator without the underscore, then copies it. The
table is derived: it has every such operator that has no rule of its own when this module is
imported, which is the last of its package.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from shardmap.rules import registry
from shardmap.rules.lowering import Given, Lowering, Named


def functional(op: registry.Operator) -> registry.Operator | None:
    """The operator that returns what `op` writes to its first argument, or None."""
    name = schema_of(op).name.partition("::")[2]
    if not name.endswith("_") or name.endswith("__"):
        return None
    found = getattr(packet(name[:-1]), overload_name(op), None)
    if found is None or schema_of(found).is_mutable:
        return None
    kinds = [[(a.name, str(a.type)) for a in schema_of(o).arguments] for o in (op, found)]
    same = [name for name, _ in kinds[0]] == [name for name, _ in kinds[1]]
    return found if same and len(schema_of(found).returns) == 1 else None


def copied(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Compute the result of a call in memory of its own, then copy it into the first argument."""
    plain = functional(eq.op)
    rule = None if plain is None else registry.lookup(plain)
    if plain is None or rule is None:
        return NotImplemented
    target, *rest = args
    # A backward that needs the first argument must find it as it was before the copy.
    kept = b.call(torch.clone, target) if b.grad or b.transformed else target
    out = rule(b, eq._replace(op=plain), (kept, *rest), kwargs)
    if out is NotImplemented:
        return NotImplemented
    b.call(aten.copy_.default, target, out)
    return None


def _derived() -> Iterator[registry.Operator]:
    """The operators of this table."""
    for full in operator_names():
        namespace, _, name = full.partition("::")
        written = name.partition(".")[0].endswith("_")
        op = overload(name) if namespace == "aten" and written else None
        if op is None or registry.has_rule(op) or has_kernel(full, "CompositeImplicitAutograd"):
            continue
        plain = functional(op)
        if plain is not None and registry.has_rule(plain) and not _is_view(op):
            yield op


def _is_view(op: registry.Operator) -> bool:
    """True if `op` changes the shape or the strides of a tensor, not its values."""
    return torch.Tag.inplace_view in op.tags


registry.register("in place", *_derived())(copied)
