"""What an operator's schema says: its name, and the arguments of a call by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from shardmap._torch import OpOverload, schema_of

T = TypeVar("T")


def base_name(op: OpOverload) -> str:
    """The name without namespace and overload: `add_` for `aten::add_.Tensor`."""
    return schema_of(op).name.partition("::")[2]


def short_name(op: OpOverload) -> str:
    """The name as texts show it: `add_.Tensor` for `aten::add_.Tensor`, others in full."""
    return op.name().removeprefix("aten::")


_OURS = {
    "shardmap::own_backward": "a backward of the function's own",
    "shardmap::own_function": "a torch.autograd.Function",
    "shardmap::data": "the .data of a tensor",
}


def in_words(op: OpOverload) -> str:
    """The operator as warnings and errors name it: those that stand for python code in words."""
    return _OURS.get(op.name(), short_name(op))


def by_name(op: OpOverload, args: Sequence[T], kwargs: Mapping[str, T]) -> dict[str, T]:
    """All arguments of a call by their names in the schema, with defaults."""
    named: dict[str, T] = {}
    for i, a in enumerate(schema_of(op).arguments):
        named[a.name] = args[i] if i < len(args) else kwargs.get(a.name, a.default_value)
    return named


def in_form(op: OpOverload, named: Mapping[str, T]) -> tuple[list[T], dict[str, T]]:
    """The positional and the keyword arguments of a call, from those of `by_name`."""
    arguments = schema_of(op).arguments
    positional = [named[a.name] for a in arguments if not a.kwarg_only]
    return positional, {a.name: named[a.name] for a in arguments if a.kwarg_only}


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements of memory from the first to the last of a tensor; 0 if it has none."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
