"""The names that python code spells out: globals, attributes, texts that may name attributes."""

from __future__ import annotations

import dis
import functools
import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from shardmap.program.lookups import LOOKUPS, are_spelled_out


class Names(NamedTuple):
    """The names that code spells out."""

    globals: frozenset[str]
    attributes: frozenset[str]
    """Attributes, and texts by which `getattr` may look them up."""
    dynamic: bool
    """True if it reads attributes by names that it computes."""
    items: frozenset[tuple[str, object]]
    """Names that are followed by a constant key or index (`table["scale"]`), each with that."""
    whole: frozenset[str]
    """Names that are used in any other way, and texts."""
    modules: frozenset[str]
    """Modules that it imports, with a dot in front for each level above its own."""

    def and_of(self, other: Names) -> Names:
        """The names that either of two pieces of code spells out."""
        return Names(
            self.globals | other.globals,
            self.attributes | other.attributes,
            self.dynamic or other.dynamic,
            self.items | other.items,
            self.whole | other.whole,
            self.modules | other.modules,
        )

    def keys_of(self, name: str) -> list[object]:
        """The constants by which items of a container are read; empty if it may be read whole."""
        if self.dynamic or name in self.whole:
            return []
        return [key for of, key in self.items if of == name]


@functools.lru_cache(4096)
def names_in(code: types.CodeType) -> Names:
    """The names that a code object and the code inside of it spell out."""
    globals_, attributes, modules, dynamic = set(), set(), set(), False
    steps = list(dis.get_instructions(code))
    for number, step in enumerate(steps):
        name = step.argval
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            globals_.add(name)
            dynamic |= name in _DYNAMIC
        elif step.opname.endswith(("_ATTR", "_METHOD")) or step.opname == "IMPORT_FROM":
            if name != "grad" or not _is_of_torch(steps[:number]):
                attributes.add(name)
            dynamic |= name in _DYNAMIC
        elif step.opname == "IMPORT_NAME":
            level = steps[number - 2].argval  # then come the names, then the module
            modules.add("." * (level if isinstance(level, int) else 0) + name)
        elif step.opname == "MATCH_CLASS":
            dynamic = True
            attributes.add("__match_args__")
    dynamic |= bool(globals_ & LOOKUPS) and not are_spelled_out(steps)
    found = Names(
        frozenset(globals_), frozenset(attributes), dynamic, *_subscripts(steps), frozenset(modules)
    )
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found = found.and_of(names_in(constant))
        texts = constant if isinstance(constant, tuple) else (constant,)
        words = {part for t in texts if isinstance(t, str) for part in t.split(".")}
        texts = frozenset(filter(str.isidentifier, words))
        found = found._replace(attributes=found.attributes | texts, whole=found.whole | texts)
    return found


def _is_of_torch(steps: Sequence[dis.Instruction]) -> bool:
    """True if the last step loads one of torch's modules that have a function `grad`."""
    if steps[-1].argval not in _TAKE_GRADIENTS:
        return False
    return steps[-1].opname == "LOAD_GLOBAL" or (len(steps) > 1 and steps[-2].argval == "torch")


def imported_by(name: str, scope: Mapping[str, object]) -> list[types.ModuleType]:
    """The modules that an import in code reads, as far as they are there: `a` and `a.b`.

    Args:
        name: One of `Names.modules`.
        scope: The globals of the function.
    """
    if name.startswith("."):
        package = scope.get("__package__")
        try:
            name = importlib.util.resolve_name(name, package if isinstance(package, str) else None)
        except ImportError:
            return []
    parts = name.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return [module for each in names if (module := sys.modules.get(each)) is not None]


def _subscripts(
    steps: Sequence[dis.Instruction],
) -> tuple[frozenset[tuple[str, object]], frozenset[str]]:
    """The names that are loaded to read one item, with its key, and those loaded otherwise."""
    items, whole = set[tuple[str, object]](), set[str]()
    for number, step in enumerate(steps):
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if step.opname in _NO_LOADS or not all(isinstance(name, str) for name in names):
            continue
        key, read = [*steps[number + 1 : number + 3], None, None][:2]
        if (
            len(names) == 1
            and key is not None
            and read is not None
            and key.opname == "LOAD_CONST"
            and type(key.argval) in (str, int)
            and read.opname == "BINARY_SUBSCR"
        ):
            items.add((names[0], key.argval))
        else:
            whole |= set(names)
    return frozenset(items), frozenset(whole)


_TAKE_GRADIENTS = frozenset(("autograd", "func"))
"""Modules of torch whose function `grad` reads no tensor's attribute of that name."""
_NO_LOADS = frozenset("LOAD_CONST LOAD_CLOSURE MAKE_CELL COPY_FREE_VARS KW_NAMES".split())
"""Steps that name something without reading it; what a closure reads is in its own code."""


_DYNAMIC = frozenset("vars dir attrgetter __dict__ getattr_static getmembers asdict".split())
