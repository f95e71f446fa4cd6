"""The table of batching rules: for each operator its rule, and the rule's family.

A rule lowers one recorded call to calls on whole batches. It has one shape for all operators::

    def rule(b: Lowering, eq: Equation, args: list, kwargs: dict) -> V | tuple of V | None

`args` and `kwargs` are the recorded ones with a `V` for each tensor; inside, the mapped dimension
is always first. A rule emits calls through `b.call(...)` and returns the `V` (or one for each
result) that holds the batch of results.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from shardmap._torch import (
    AbsentOperator,
    OpOverload,
    absent_operators,
    has_kernel,
    missing,
    operator_names,
    overloads,
    schema_of,
)
from shardmap.errors import OptionError
from shardmap.program.ir import operator
from shardmap.program.operators import op_info

__all__ = [
    "Entry",
    "Operator",
    "batching_rule",
    "decomposition",
    "has_functorch_kernel",
    "has_rule",
    "lacking",
    "lookup",
    "overloads",
    "recordable",
    "register",
    "register_decomposition",
    "table",
    "tier",
    "version",
]

Operator = OpOverload
Rule = Callable[..., Any]


class Entry(NamedTuple):
    """A registered rule."""

    rule: Rule
    family: str


_rules: dict[Operator, Entry] = {}
_decompositions: dict[Operator, Callable[..., Any]] = {}
_changes = itertools.count(1)
_version = 0


def version() -> int:
    """A number that grows whenever a rule is registered or replaced.

    Programs lowered under another version may be lowered differently now.
    """
    return _version


def _changed() -> None:
    global _version
    _version = next(_changes)


def register(family: str, *operators: Operator, replace: bool = False) -> Callable[[Rule], Rule]:
    """Register the decorated rule for those of `operators` that this torch has.

    Raises:
        ValueError: An operator has a rule already and `replace` is false, or is not an operator
            overload.
    """
    present = [op for op in operators if not isinstance(op, AbsentOperator)]
    for op in present:
        if not isinstance(op, Operator):
            raise ValueError(
                f"register({family!r}): {op!r} is not an operator overload such as "
                "torch.ops.aten.add.Tensor"
            )
        if op in _rules and not replace:
            raise ValueError(
                f"register({family!r}): {op} has a rule already, in family {_rules[op].family!r}; "
                "pass replace=True to put another in its place"
            )

    def decorate(rule: Rule) -> Rule:
        if not callable(rule):
            raise ValueError(
                f"register({family!r}): the rule of {', '.join(map(str, operators))} is {rule!r}, "
                "not a function rule(b, eq, args, kwargs)"
            )
        for op in present:
            _decompositions.pop(op, None)
            _rules[op] = Entry(rule, family)
        _changed()
        return rule

    return decorate


def batching_rule(*operators: Operator, replace: bool = False) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule that batches `operators`.

    The rule is called once per program, with a builder, the recorded call and its arguments, and
    emits calls on whole batches: `rule(b, eq, args, kwargs)`. A tensor argument is a `V`: its value
    at replay is `[B, *v.shape]` if `v.mapped`, `v.shape` if not. `b.call(function, *args,
    shape=..., dtype=...)` emits a call and returns the `V` of its result. `docs/rules.md` is a
    guide.

    Args:
        *operators: Operator overloads, such as `torch.ops.mylib.scale.default`.
        replace: True to replace a rule that an operator has already.

    Returns:
        A decorator that returns the rule unchanged.

    Raises:
        OptionError: An operator has a rule already and `replace` is false, is not an operator
            overload, or is recorded as the operators that it calls; or the decorated object is no
            function.

    Example:
        >>> import torch, shardmap
        >>> @torch.library.custom_op("doc::twice", mutates_args=())
        ... def twice(x: torch.Tensor) -> torch.Tensor:
        ...     return x * 2
        >>> @shardmap.batching_rule(torch.ops.doc.twice.default)
        ... def twice_rule(b, eq, args, kwargs):
        ...     return b.call(torch.ops.doc.twice.default, *args)
        >>> shardmap.vmap(twice)(torch.ones(2, 1))
        tensor([[2.],
                [2.]])
    """
    call = "shardmap.batching_rule"
    if not operators:
        raise OptionError(
            f"{call}(): no operator is given; write @{call}(torch.ops.mylib.scale.default)"
        )
    if type(replace) is not bool:
        raise OptionError(f"{call}(..., replace={replace!r}): replace is True or False")
    for op in operators:
        if isinstance(op, Operator) and _is_composite(op):
            raise OptionError(
                f"{call}({op}): {op} is made of other operators, which are what is recorded of a "
                "call of it, so that its rule would never be used; register rules of those"
            )
        if op in _decompositions and not replace:
            raise OptionError(
                f"{call}({op}): {op} is recorded as the operators of its decomposition; pass "
                "replace=True to have it recorded whole and batched by your rule"
            )
    try:
        decorate = register("user", *operators, replace=replace)
    except ValueError as error:
        raise OptionError(f"{call}: {error}") from None

    def decorated(rule: Rule) -> Rule:
        try:
            return decorate(rule)
        except ValueError as error:
            raise OptionError(f"{call}: {error}") from None

    return decorated


def _is_composite(op: Operator) -> bool:
    """True if a call of `op` is always decomposed before it reaches a recording."""
    has = has_kernel
    return has(op.name(), "CompositeImplicitAutograd") and op not in _rules


def register_decomposition(op: Operator, function: Callable[..., Any]) -> None:
    """Record `op` as the operators that `function` calls.

    Raises:
        ValueError: The operator has a rule or a decomposition already.
    """
    if isinstance(op, AbsentOperator):
        return
    if op in _rules or op in _decompositions:
        raise ValueError(f"register_decomposition: {op} is registered already")
    _decompositions[op] = function
    _changed()


def lookup(op: Operator) -> Rule | None:
    """Our rule for `op`, or None."""
    entry = _rules.get(op)
    return None if entry is None else entry.rule


def has_rule(op: Operator) -> bool:
    """True if `op` has a rule of ours."""
    return op in _rules


def decomposition(op: Operator) -> Callable[..., Any] | None:
    """The decomposition by which `op` is recorded, or None."""
    return _decompositions.get(op)


def has_functorch_kernel(op: Operator) -> bool:
    """True if `torch.func.vmap` batches `op` without its slow loop."""
    has = has_kernel
    return has(op.name(), "FuncTorchBatched") or has(op.name(), "FuncTorchBatchedDecomposition")


def tier(op: Operator) -> str:
    """The tier that batches `op`.

    It is "rule", "decomposition", "functorch" (`torch.func.vmap` of the one operator) or "loop".
    """
    if op in _rules:
        return "rule"
    if op in _decompositions:
        return "decomposition"
    return "functorch" if has_functorch_kernel(op) else "loop"


def table() -> list[tuple[str, str, str]]:
    """`(operator, tier, family)` of every registered operator, by name."""
    rows = [(op.name(), "rule", entry.family) for op, entry in _rules.items()]
    rows += [(op.name(), "decomposition", "torch") for op in _decompositions]
    return sorted(rows)


def recordable() -> list[tuple[str, str, str]]:
    """`(operator, tier, family)` of every operator of this torch that recordings may hold, by name.

    Left out are those that are recorded as other operators, those that return python values or
    take no tensors, and forms with `out=`, which the rule of the operator itself serves.
    """
    rows = []
    for name in operator_names():
        try:
            op = operator(name)
        except AttributeError:  # a kernel is registered under a name that no schema declares
            continue
        if op in _rules or op in _decompositions or _needs_batching(op):
            entry = _rules.get(op)
            rows.append((name, tier(op), "" if entry is None else entry.family))
    return sorted(rows)


def _needs_batching(op: Operator) -> bool:
    """True if a call of an operator without a rule is recorded and has to be batched."""
    info = op_info(op)
    if info.composite or info.question or info.metadata:
        return False
    arguments = schema_of(op).arguments
    takes = any("Tensor" in str(a.type) for a in arguments)
    return takes and not any(a.is_out for a in arguments)


def lacking() -> list[str]:
    """Sentences on the parts that this torch lacks: operators without a rule, and private names."""
    absent, torchs = absent_operators(), f"torch {torch.__version__}"
    found = [f"{torchs} lacks, and so no rule is registered for: {', '.join(absent)}"]
    names = [f"{torchs} has no {name}: {purpose} fails" for name, purpose in missing().items()]
    return (found if absent else []) + names
