"""Operators that call functions (`torch.cond`, `while_loop`, `scan`, `map`, `flex_attention`).

Torch compiles their bodies, or passes them to modes one by one. While recording, the bodies are
called as python calls them, so that their operators are recorded, and derivatives of them too. A
condition is a question about a value, as in `if condition:`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch.overrides import TorchFunctionMode

from shardmap._torch import (
    HigherOrderOperator,
    compute_keyset,
    dense_key,
    functorch,
    kernels_of,
    pytree,
)

Tensor = torch.Tensor
Body = Callable[..., object]


def _cond(pred: object, true: Body, false: Body, operands: Sequence[object]) -> object:
    if isinstance(pred, Tensor) and _differs_under_vmap(pred):
        chosen, other = true(*operands), false(*operands)
        return pytree.tree_map(lambda a, b: torch.where(pred.reshape(()), a, b), chosen, other)
    return true(*operands) if pred else false(*operands)


def _while_loop(
    condition: Body,
    body: Body,
    carried: Sequence[object],
    additional: Sequence[object] = (),
    **_: object,
) -> object:
    values = [v.clone() if isinstance(v, Tensor) else v for v in carried]
    found: object = tuple(values)
    while condition(*values, *additional):
        found = body(*values, *additional)
        values = pytree.tree_leaves(found)
    return found


def _scan(
    combine: Body,
    init: Sequence[Tensor],
    xs: Sequence[Tensor],
    additional: Sequence[object] = (),
) -> object:
    carry = list(init)
    # A graph returns the carry and its results flat, a function nested.
    out: object = None
    rows = []
    for i in range(xs[0].shape[0]):
        out = combine(*carry, *[x.select(0, i) for x in xs], *additional)
        leaves = pytree.tree_leaves(out)
        carry = leaves[: len(init)]
        rows.append(leaves[len(init) :])
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    return pytree.tree_unflatten([*carry, *stacked], pytree.tree_structure(out))


def _map(body: Body, xs: Sequence[Tensor], arguments: Sequence[object]) -> object:
    found = [body(*[x.select(0, i) for x in xs], *arguments) for i in range(xs[0].shape[0])]
    return pytree.tree_map(lambda *column: torch.stack(column), *found)


def _subgraph(graph: Body, *operands: object, **_: object) -> object:
    return graph(*operands)


def _named_subgraph(graph: Body, identifier: object, *operands: object) -> object:
    return graph(*operands)


def _strict(graph: Body, operands: Sequence[object]) -> object:
    return graph(*operands)


_BODIES: dict[str, Body] = {
    "cond": _cond,
    "while_loop": _while_loop,
    "scan": _scan,
    "map_impl": _map,
    "invoke_subgraph": _named_subgraph,
    "invoke_quant": _subgraph,
    "strict_mode": _strict,
}
"""For an operator's name: the function that runs it, if its own kernel refuses to run under a mode
or is not differentiable."""


class AsPython(TorchFunctionMode):
    """Mode that runs these operators as python control flow when a function is not recorded.

    Torch's own second gradients of `cond` and `scan` are wrong (2.13): without it a map would give
    one sample those, and others those of the recording.
    """

    met = False
    """True if a recording of this process has met such an operator: the mode costs each call a
    microsecond, so that it is left out until then."""

    def __torch_function__(
        self, func: Body, kinds: object, args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> object:
        """Run one call."""
        if isinstance(func, HigherOrderOperator):
            with self:
                return run(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def run(
    operator: HigherOrderOperator,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    depth: int = 0,
) -> object:
    """Call an operator so that its bodies are recorded.

    Args:
        operator: The operator.
        args: Its arguments.
        kwargs: Its arguments that are named.
        depth: How many inert levels stand for transforms around the map.
    """
    top = functorch.peek_interpreter_stack()
    if operator.name() == "custom_function_call" and top is not None and top.level() <= depth:
        return _applied(cast(type[torch.autograd.Function], args[0]), *args[1:])
    AsPython.met = True
    body = _BODIES.get(operator.name())
    if body is not None:
        return body(*args, **kwargs)
    key = compute_keyset(args, kwargs, operator.non_fallthrough_keys).highestPriorityTypeId()
    kernel = kernels_of(operator).get(dense_key)
    if kernel is not None and not key.name.startswith("Autocast"):
        return kernel(*args, **kwargs)
    return operator.dispatch(key, *args, **kwargs)


def _applied(function: type[torch.autograd.Function], *args: object) -> object:
    """Apply a Function as where no transform is: inert levels must not ask it for a rule."""
    allowed = functorch.get_single_level_autograd_function_allowed()
    functorch.set_single_level_autograd_function_allowed(True)
    try:
        return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        functorch.set_single_level_autograd_function_allowed(allowed)


def _differs_under_vmap(tensor: Tensor) -> bool:
    """True if a `torch.func.vmap` inside the function maps a tensor, at any level of transforms."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
