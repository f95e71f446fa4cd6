"""The names that python code spells out: globals, attributes, texts that may name attributes."""

from __future__ import annotations

import dis
import functools
import types
from typing import NamedTuple

from shardmap.program.lookups import LOOKUPS, are_spelled_out


class Names(NamedTuple):
    """The names that code spells out."""

    globals: frozenset[str]
    attributes: frozenset[str]
    """Attributes, and texts by which `getattr` may look them up."""
    dynamic: bool
    """True if it reads attributes by names that it computes."""

    def and_of(self, other: Names) -> Names:
        """The names that either of two pieces of code spells out."""
        return Names(
            self.globals | other.globals,
            self.attributes | other.attributes,
            self.dynamic or other.dynamic,
        )


@functools.lru_cache(4096)
def names_in(code: types.CodeType) -> Names:
    """The names that a code object and the code inside of it spell out."""
    globals_, attributes, dynamic = set(), set(), False
    steps = list(dis.get_instructions(code))
    for step in steps:
        name = step.argval
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            globals_.add(name)
            dynamic |= name in _DYNAMIC
        elif step.opname.endswith(("_ATTR", "_METHOD")) or step.opname == "IMPORT_FROM":
            attributes.add(name)
            dynamic |= name in _DYNAMIC
        dynamic |= step.opname == "MATCH_CLASS"
    dynamic |= bool(globals_ & LOOKUPS) and not are_spelled_out(steps)
    found = Names(frozenset(globals_), frozenset(attributes), dynamic)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found = found.and_of(names_in(constant))
        texts = constant if isinstance(constant, tuple) else (constant,)
        words = {part for t in texts if isinstance(t, str) for part in t.split(".")}
        texts = frozenset(filter(str.isidentifier, words))
        found = found._replace(attributes=found.attributes | texts)
    return found


_DYNAMIC = frozenset("vars dir attrgetter __dict__ getattr_static getmembers asdict".split())
