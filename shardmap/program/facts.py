"""Facts about objects that code can read, as two listings of them are compared."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable

import torch

from shardmap._torch import functorch, storage_id


class OfTensor:
    """A tensor that is not held, equal to itself only, and only in the same memory.

    `t.data = other` puts another in its place. The memory is held, or another might be made there.
    """

    def __init__(self, tensor: torch.Tensor):
        self.reference = weakref.ref(tensor)
        wrapped = functorch.is_functorch_wrapped_tensor(tensor)
        has_memory = tensor.layout is torch.strided and not wrapped
        self.memory = tensor.untyped_storage() if has_memory else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OfTensor) or self.reference() is not other.reference():
            return False
        if self.memory is None or other.memory is None:
            return self.reference() is not None and self.memory is other.memory
        return self.reference() is not None and storage_id(self.memory) == storage_id(other.memory)

    def __hash__(self) -> int:
        return hash(id(self))


class Itself:
    """An object that is compared by identity: a class, a function of a library, a lock."""

    def __init__(self, value: object):
        self.text = getattr(value, "__qualname__", f"a {type(value).__name__}")
        self.look: Callable[[], object] = functools.partial(_same, value)
        try:
            self.look = weakref.ref(value)
        except TypeError:
            pass  # not an error: it is held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.look() is other.look() is not None

    def __hash__(self) -> int:
        return hash(self.text)


class Incomparable:
    """A state that cannot be compared, and so is equal to none."""

    def __init__(self, what: str):
        self.what = what

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return hash(self.what)


def _same(value: object) -> object:
    return value


def text_of(fact: object) -> str:
    """A fact for a message."""
    if isinstance(fact, OfTensor):
        return "a tensor"
    if isinstance(fact, Incomparable):
        return fact.what
    if isinstance(fact, Itself):
        return fact.text
    if isinstance(fact, types.CodeType):
        return f"the function {fact.co_name}"
    if isinstance(fact, tuple):
        text = str(fact[1])
        return text if len(text) < 80 else f"{text[:77]}..."
    return str(fact)
