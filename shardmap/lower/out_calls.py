"""Calls with `out=` (`torch.add(a, b, out=c)`), batched by the rule of the operator itself."""

from __future__ import annotations

import functools
from typing import Any

import torch

from shardmap._torch import FakeTensorMode, OpOverload, aten, schema_of
from shardmap.program.ir import Equation, Param, SampleDevice, Spec, Var
from shardmap.rules import registry
from shardmap.rules.lowering import Lowering, values

Operator = OpOverload


def out_rule(eq: Equation) -> registry.Rule | None:
    """The rule for a call with `out=`: compute the result by the operator's own rule, then copy it.

    Args:
        eq: The recorded call.

    Returns:
        None if the call has no `out=`, or its operator has no rule.
    """
    plain = _without_out(eq.op)
    if plain is None or registry.lookup(plain) is None:
        return None
    names = [a.name for a in schema_of(eq.op).arguments if a.is_out]
    given = dict(eq.kwargs)
    targets = [v for v in (given.get(name) for name in names) if isinstance(v, Var)]
    if len(targets) != len(names):
        return None
    kept = tuple([(k, v) for k, v in eq.kwargs if k not in names])
    specs = _specs(plain, eq.args, kept)
    if specs is None or len(specs) != len(targets):
        return None
    results = tuple([Var(t.index, t.group, spec) for t, spec in zip(targets, specs, strict=True)])
    call = eq._replace(op=plain, kwargs=kept, outs=results)

    def rule(b: Lowering, _: Equation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = registry.lookup(plain)
        assert own is not None
        rest = {k: v for k, v in kwargs.items() if k not in names}
        if any(v.mapped for v in values((args, tuple(rest.values())))):
            out = own(b, call, args, rest)
        else:  # only the written memory differs by sample
            out = b.as_recorded(call, plain, *args, named=rest)
        if out is NotImplemented:
            return NotImplemented
        for name, v in zip(names, values([out]), strict=True):
            b.call(aten.copy_.default, kwargs[name], v)
        return None

    return rule


@functools.cache
def _without_out(op: Operator) -> Operator | None:
    """The overload of an `out=` operator that makes new results from the same arguments."""
    arguments = schema_of(op).arguments
    if not any(a.is_out for a in arguments):
        return None
    wanted = [(a.name, str(a.type)) for a in arguments if not a.is_out]
    for name in op.overloadpacket.overloads():
        candidate = getattr(op.overloadpacket, name)
        found = [(a.name, str(a.type)) for a in schema_of(candidate).arguments]
        if found == wanted and not schema_of(candidate).is_mutable:
            return candidate
    return None


def _specs(op: Operator, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Any:
    """The metadata of the results of one sample's call: `out=` may have another dtype."""

    def fake(value: Any) -> Any:
        kind = type(value)
        if kind is Var:
            spec = value.spec
            return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype)
        if kind is tuple or kind is list:
            return [fake(v) for v in value]
        if kind is Param:
            return 0.5
        return torch.device("cpu") if kind is SampleDevice else value

    with FakeTensorMode(), torch.no_grad():
        try:
            out = op(*[fake(a) for a in args], **{k: fake(v) for k, v in kwargs})
        except NotImplementedError:  # torch says so that an operator has no fake kernel: looped
            return None
    results = [out] if isinstance(out, torch.Tensor) else list(out)
    return [
        Spec(tuple(t.shape), t.stride(), t.dtype, "cpu", int(t.storage_offset())) for t in results
    ]
