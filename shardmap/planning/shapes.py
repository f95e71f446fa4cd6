"""Run calls on tensors without memory, to see what they would allocate.

A kernel of the meta device costs up to a millisecond, because many are written in python. The
layers of a model make the same calls over and over, so that what a call returned is remembered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch

from shardmap._torch import OpOverload, schema_of, storage_id
from shardmap.trace.recording import flat_tensors

Arguments = tuple[object, ...]


class _Result(NamedTuple):
    """Description of one result, which has memory of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class _Given(NamedTuple):
    """A call that returns the argument that it writes to."""

    name: str
    """The argument's name; empty for the first one."""


class Shapes:
    """Computes calls on the meta device, each kind of call once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Given | tuple[_Result, ...]] = {}

    def __call__(
        self, func: Callable[..., object], args: Arguments, kwargs: Mapping[str, object]
    ) -> object:
        """The results of a call, as tensors without memory."""
        if not isinstance(func, OpOverload) or not _is_remembered(func):
            return func(*args, **kwargs)
        try:
            key = func, _key(args), _key(tuple(sorted(kwargs.items())))
            known = self._known.get(key)
        except TypeError:  # an argument that has no hash
            return func(*args, **kwargs)
        if known is None:
            out = func(*args, **kwargs)
            found = _described(func, out, args, kwargs)
            if found is not None and key == (func, _key(args), _key(tuple(sorted(kwargs.items())))):
                self._known[key] = found
            return out
        if isinstance(known, _Given):
            return kwargs[known.name] if known.name else args[0]
        made = tuple([result.make() for result in known])
        return made if len(schema_of(func).returns) > 1 else made[0]


@functools.cache
def _is_remembered(func: OpOverload) -> bool:
    """True if an operator returns new tensors, or the one that it writes to."""
    schema = schema_of(func)
    if not schema.returns or not all(str(r.type) == "Tensor" for r in schema.returns):
        return False
    if not schema.is_mutable:
        return all(r.alias_info is None for r in schema.returns)
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return len(written) == len(schema.returns) == 1


def _key(value: object) -> Hashable:
    """A key that two arguments share if they lead to results of the same shape."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device, value.is_conj()
    if isinstance(value, tuple | list):
        return tuple([_key(each) for each in value])
    return type(value), value


def _described(
    func: OpOverload, out: object, args: Arguments, kwargs: Mapping[str, object]
) -> _Given | tuple[_Result, ...] | None:
    """The results of a call; None unless each has memory of its own, filled by it."""
    if schema_of(func).is_mutable:
        named = kwargs.get("out")
        return _Given("out") if out is named else _Given("") if args and out is args[0] else None
    seen = {storage_id(t.untyped_storage()) for t in flat_tensors((*args, *kwargs.values()))}
    found = []
    for t in out if isinstance(out, tuple | list) else (out,):
        if not isinstance(t, torch.Tensor) or t.device.type != "meta" or t.layout != torch.strided:
            return None
        storage, made = t.untyped_storage(), _Result(tuple(t.shape), t.stride(), t.dtype)
        dense = storage.nbytes() == made.make().untyped_storage().nbytes()
        lazy = t.is_conj() or t.is_neg() or t.storage_offset()
        if lazy or not dense or storage_id(storage) in seen:
            return None
        seen.add(storage_id(storage))
        found.append(made)
    return tuple(found) if len(found) == len(schema_of(func).returns) else None


def without_memory(t: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and dtype that has no memory."""
    if math.prod(t.shape) == 0 or not (t.is_conj() or t.is_neg()):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    raise TypeError(f"a lazy conjugate or negative of {tuple(t.shape)} is more than its shape")
