"""Calls of `getattr` and its kin in code: by names that are spelled out, or by computed ones."""

from __future__ import annotations

import dis
from collections.abc import Iterable

LOOKUPS = frozenset("getattr hasattr setattr delattr".split())
"""Functions that take an object and the name of an attribute."""


def are_spelled_out(steps: Iterable[dis.Instruction]) -> bool:
    """True if every call of `getattr`, `hasattr`, `setattr` and `delattr` has a constant name.

    `hasattr(self, "scale")` reads what `self.scale` reads. The stack is followed along straight
    code; a call whose arguments branch, or that is not understood, counts as one by a computed
    name.
    """
    stack = _Stack()
    for step in steps:
        if step.is_jump_target and not stack.cut():
            return False
        if not _follow(stack, step):
            return False
        if step.opname in _LEAVES and not stack.cut():
            return False
    return stack.cut()


_LEAVES = frozenset(
    "JUMP_FORWARD JUMP_BACKWARD JUMP_BACKWARD_NO_INTERRUPT RETURN_VALUE RETURN_CONST "
    "RAISE_VARARGS RERAISE".split()
)
"""Steps after which code does not go on with the next one."""
_MOVES = frozenset(("SWAP", "COPY"))
"""Steps that move or repeat what lies deeper in the stack."""

_LOADS = frozenset(
    "LOAD_FAST LOAD_FAST_CHECK LOAD_FAST_BORROW LOAD_GLOBAL LOAD_NAME LOAD_DEREF LOAD_CLOSURE "
    "PUSH_NULL".split()
)
"""Steps that push and look at nothing in the stack."""
_NOTHING = frozenset("NOP RESUME CACHE EXTENDED_ARG KW_NAMES".split())
"""Steps that leave the stack as it is."""


class _Function:
    """Stands in the stack for a function that looks up an attribute."""


_FUNCTION = _Function()


class _Stack:
    """The known top of the stack: constants, functions that look up, and None for all others."""

    def __init__(self) -> None:
        self._items: list[object] = []

    def push(self, item: object) -> None:
        self._items.append(item)

    def pop(self, count: int) -> list[object]:
        """Remove items; those below the known ones are None."""
        known = self._items[len(self._items) - min(count, len(self._items)) :]
        del self._items[len(self._items) - len(known) :]
        return [None] * (count - len(known)) + known

    def waits(self) -> bool:
        """True if a function that looks up has not been called yet."""
        return _FUNCTION in self._items

    def cut(self) -> bool:
        """Forget the items where branches meet; False if a function is among them."""
        waits = self.waits()
        self._items.clear()
        return not waits


def _follow(stack: _Stack, step: dis.Instruction) -> bool:
    """Take one step; False if an attribute may be looked up by a computed name."""
    if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in LOOKUPS:
        if "NULL" not in step.argrepr:  # handed on instead of called
            return False
        stack.push(_FUNCTION)
        stack.push(_FUNCTION)
        return True
    if step.opname == "PRECALL":  # python 3.11 announces a call
        return True
    if step.opname == "CALL":
        count = step.arg or 0
        removed = stack.pop(count + 2)
        stack.push(None)
        if _FUNCTION not in removed:
            return True
        called, arguments = removed[:2], removed[2:]
        if _FUNCTION not in called or _FUNCTION in arguments or count < 2:
            return False
        name = arguments[1]
        return isinstance(name, str) and name.isidentifier()
    if step.opname == "LOAD_CONST":
        stack.push(step.argval)
        return True
    if step.opname in _MOVES and stack.waits():
        return False
    if step.opname in _NOTHING:
        return True
    effect = dis.stack_effect(step.opcode, step.arg, jump=False)
    # A step that does more than load has made something else of what lay on top.
    touched = 0 if step.opname in _LOADS else 1
    removed = stack.pop(touched + max(0, -effect))
    for _ in range(touched + max(0, effect)):
        stack.push(None)
    return _FUNCTION not in removed
