"""The one table of batching rules: which operator is batched how, and by which family.

A rule lowers one recorded call to calls on whole batches. It has one shape for all operators::

    def rule(b: Lowering, eq: Equation, args: list, kwargs: dict) -> V | tuple of V | None

`args` and `kwargs` are the recorded ones with a `V` for each tensor; inside, the mapped dimension
is always first. A rule emits calls through `b.call(...)` and returns the `V` (or one for each
result) that holds the batch of results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from shardmap.errors import OptionError

Operator = torch._ops.OpOverload
Rule = Callable[..., Any]


class Entry(NamedTuple):
    """A registered rule."""

    rule: Rule
    family: str


_rules: dict[Operator, Entry] = {}
_decompositions: dict[Operator, Callable[..., Any]] = {}


def register(family: str, *operators: Operator) -> Callable[[Rule], Rule]:
    """Register the decorated rule for `operators`.

    Raises:
        ValueError: An operator has a rule already, or is not an operator overload.
    """
    for op in operators:
        if not isinstance(op, Operator):
            raise ValueError(
                f"register({family!r}): {op!r} is not an operator overload such as "
                "torch.ops.aten.add.Tensor"
            )
        if op in _rules:
            raise ValueError(
                f"register({family!r}): {op} has a rule already, in family {_rules[op].family!r}"
            )

    def decorate(rule: Rule) -> Rule:
        for op in operators:
            _rules[op] = Entry(rule, family)
        return rule

    return decorate


def batching_rule(*operators: Operator) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule that batches `operators`.

    The rule is called once per program, with a builder, the recorded call and its arguments, and
    emits calls on whole batches: `rule(b, eq, args, kwargs)`. A tensor argument is a `V`: its value
    at replay is `[B, *v.shape]` if `v.mapped`, `v.shape` if not. `b.call(function, *args,
    shape=..., dtype=...)` emits a call and returns the `V` of its result.

    Args:
        *operators: Operator overloads, such as `torch.ops.mylib.scale.default`.

    Returns:
        A decorator that returns the rule as it is.

    Raises:
        OptionError: An operator has a rule already, or is not an operator overload.

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
    try:
        return register("user", *operators)
    except ValueError as error:
        raise OptionError(f"shardmap.batching_rule: {error}") from None


def register_decomposition(op: Operator, function: Callable[..., Any]) -> None:
    """Have `op` recorded as the operators that `function` calls.

    Raises:
        ValueError: The operator has a rule or a decomposition already.
    """
    if op in _rules or op in _decompositions:
        raise ValueError(f"register_decomposition: {op} is registered already")
    _decompositions[op] = function


def lookup(op: Operator) -> Rule | None:
    """Our rule for `op`, or None."""
    entry = _rules.get(op)
    return None if entry is None else entry.rule


def has_rule(op: Operator) -> bool:
    """Whether `op` has a rule of ours."""
    return op in _rules


def decomposition(op: Operator) -> Callable[..., Any] | None:
    """The decomposition by which `op` is recorded, or None."""
    return _decompositions.get(op)


def has_functorch_kernel(op: Operator) -> bool:
    """Whether `torch.func.vmap` batches `op` without its slow loop."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(op.name(), "FuncTorchBatched") or has(op.name(), "FuncTorchBatchedDecomposition")


def tier(op: Operator) -> str:
    """How `op` is batched.

    "rule", "decomposition", "functorch" (`torch.func.vmap` of the one operator) or "loop".
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


def overloads(*names: str) -> Iterable[Operator]:
    """The operators `aten.<name>`, each written `name` (its default overload) or `name.Overload`."""
    for name in names:
        packet, _, overload = name.partition(".")
        yield getattr(getattr(torch.ops.aten, packet), overload or "default")


def version() -> int:
    """A number that changes whenever a rule is registered or replaced: what was lowered before may be another now."""
    return len(_rules) + len(_decompositions)
