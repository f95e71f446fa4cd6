"""The names that code spells out, and whether it reads attributes by names that it does not."""

from __future__ import annotations

import dis
import functools
import os
import re
import types
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from shardmap.program.lookups import LOOKUPS, are_spelled_out
from shardmap.trace.watch import BUILTINS, is_trusted, reads_more


@functools.lru_cache(maxsize=16384)
def named_in(code: types.CodeType) -> Names:
    """The names that a code object spells out."""
    globals_, attributes, modules, texts = set(), set(), set(), set()
    matches = whole = False
    values: set[str] = set()
    chains: set[tuple[str, ...]] = set()
    chain: tuple[str, ...] = ()
    steps = list(dis.get_instructions(code))
    for step in steps:
        name = step.argval
        whole |= _reads_whole(step)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            globals_.add(name)
            chain = (name,)
            if step.opname == "LOAD_GLOBAL" and "NULL" not in step.argrepr:  # not to be called
                values.add(name)
        elif step.opname == "IMPORT_NAME":
            modules.add(name)
            chain = (name,)
        elif step.opname == "MATCH_CLASS":
            matches, chain = True, ()
        elif step.opname in _WITH_ATTRIBUTE:
            attributes.add(name)
            chain = (*chain, name) if chain else ()
            if chain:
                chains.add(chain)
        elif step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL"):
            chain = ()
    for constant in code.co_consts:
        for text in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(text, str):
                texts |= {text, *text.split(".")}
    return Names(
        frozenset(globals_),
        frozenset(attributes),
        frozenset(modules),
        frozenset(texts),
        frozenset(chains),
        matches,
        frozenset(values),
        whole,
        bool(globals_ & LOOKUPS) and not are_spelled_out(steps),
    )


def _reads_whole(step: dis.Instruction) -> bool:
    """True if a step makes a text of an object, or may compare it with another one."""
    if step.opname in _TEXTS:
        return True
    if step.opname == "COMPARE_OP":
        return "=" in str(step.argval)
    if step.opname == "BINARY_OP":
        return "%" in step.argrepr
    return step.opname.startswith("LOAD_") and step.argval in _OF_TEXTS


_TEXTS = frozenset(
    "FORMAT_VALUE FORMAT_SIMPLE FORMAT_WITH_SPEC CONVERT_VALUE CONTAINS_OP BINARY_MODULO".split()
)
"""Steps that make a text, or look for an equal item."""
_OF_TEXTS = frozenset(
    "str repr ascii format print format_map __str__ __repr__ __format__ __eq__ __ne__ eq ne "
    "index count remove".split()
)
"""Names of functions that do."""
_WITH_ATTRIBUTE = frozenset(
    "LOAD_ATTR LOAD_METHOD STORE_ATTR DELETE_ATTR IMPORT_FROM LOAD_SUPER_ATTR".split()
)


@dataclass(frozen=True, slots=True)
class Names:
    """The names that a code object spells out."""

    globals: frozenset[str]
    attributes: frozenset[str]
    modules: frozenset[str]
    """Modules that it imports."""
    texts: frozenset[str]
    """Its constant strings, and their parts between dots."""
    chains: frozenset[tuple[str, ...]]
    """The name of a global or module followed by those of attributes: `torch.nn.Linear`."""
    matches: bool
    """True if it matches patterns of classes, whose `__match_args__` name attributes."""
    values: frozenset[str]
    """Globals that it hands on or keeps, where others are called at once."""
    whole: bool
    """True if it may make texts of objects or compare them, which reads all their attributes."""
    computed: bool
    """True if it may look up attributes by names that it computes (`getattr(x, name)`)."""


def spelled_out(
    codes: Iterable[types.CodeType], asked: Set[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """The names of attributes that code may read, and those that the user's code may.

    Args:
        codes: The code that ran.
        asked: Names of C functions that it called.
    """
    names = [(is_trusted(code.co_filename), named_in(code)) for code in codes]
    texts = [frozenset(filter(str.isidentifier, n.texts)) for _, n in names]
    own = [n.attributes | n.texts for trusted, n in names if not trusted]
    every = frozenset(asked).union(*[n.attributes for _, n in names], *texts)
    return every, frozenset().union(*own)


@dataclass(frozen=True, slots=True)
class Reflection:
    """How the code that ran looks at objects other than by names that it spells out."""

    blame: str = ""
    """What it reads that cannot be listed at all; empty if there is nothing."""
    dynamic: bool = False
    """True if it reads attributes by names that are made while it runs."""
    whole: bool = False
    """True if code of the user's may make texts of objects or compare them."""


def lost_code(
    codes: Iterable[types.CodeType], bound: Set[types.CodeType], apart: Set[types.CodeType]
) -> str:
    """The name of a function that ran and was not found by name; empty if there is none.

    Args:
        codes: The code that ran.
        bound: The code of functions that were found.
        apart: Code whose globals are unknown.
    """
    inside: set[types.CodeType] = set()
    waiting = [*codes, *bound]
    while waiting:
        for constant in waiting.pop().co_consts:
            if isinstance(constant, types.CodeType) and constant not in inside:
                inside.add(constant)
                waiting.append(constant)
    for code in codes:
        known = code in bound or code in inside or is_trusted(code.co_filename)
        text = code.co_filename == "<string>" and not code.co_freevars
        if code in apart or not (known or text):
            return code.co_name
    return ""


def reflection(codes: Mapping[types.CodeType, dict[str, object]]) -> Reflection:
    """Find out from the code that ran, each with its globals, how it looks at objects."""
    blame, dynamic, whole = "", False, False
    for code, of in codes.items():
        file = code.co_filename
        if is_trusted(file):
            dynamic |= code.co_name in _OF_LIBRARIES.get(os.path.basename(file), ())
            if code.co_name == "get_type_hints":
                blame = blame or "it calls typing.get_type_hints"
            continue
        names = named_in(code)
        where = f"{os.path.basename(file)}:{code.co_firstlineno}"
        handed = [name for name in names.values if reads_more(of.get(name, BUILTINS.get(name)))]
        if handed:
            blame = blame or f"it hands {min(handed)} to a function in {code.co_name} ({where})"
        hidden = names.attributes & _HIDDEN
        if hidden:
            blame = blame or f"it reads {min(hidden)} in {code.co_name} ({where})"
        dynamic |= _looks(names)
        whole |= names.whole
    return Reflection(blame, dynamic, whole)


def _looks(names: Names) -> bool:
    """True if code may read attributes by names that it does not spell out."""
    if names.matches or names.computed or (names.globals | names.attributes) & _ATTRIBUTES:
        return True
    if names.globals & _FUNCTIONS:
        return True
    if not names.attributes & {"format", "format_map"}:
        return False
    templates = [text for text in names.texts if "{" in text]
    return not templates or any(map(_FIELD_OF_FIELD.search, templates))


_ATTRIBUTES = frozenset(
    "attrgetter __dict__ __getattribute__ __getstate__ __reduce__ __reduce_ex__ __dir__ "
    "getattr_static getmembers __slots__ __match_args__".split()
)
"""Attributes that give others by name, or all of them."""
_FUNCTIONS = frozenset(("vars", "dir"))
"""Functions that do, by the names of globals."""
_HIDDEN = frozenset(
    "__globals__ __closure__ cell_contents __defaults__ __kwdefaults__ __builtins__ __doc__ "
    "__annotations__ "
    "__subclasses__ f_back f_locals f_globals gi_frame tb_frame".split()
)
"""Attributes of functions and frames that lead to what no name leads to."""
_OF_LIBRARIES = {
    "copy.py": frozenset({"copy", "deepcopy", "_reconstruct"}),
    "dataclasses.py": frozenset(
        {"asdict", "_asdict_inner", "astuple", "_astuple_inner", "replace"}
    ),
    "inspect.py": frozenset({"getattr_static", "getmembers", "_getmembers"}),
    "string.py": frozenset({"get_field"}),
    "pprint.py": frozenset({"pformat", "pprint"}),
}
"""Functions of python's library that read all attributes, or those that a text names, by file."""
_FIELD_OF_FIELD = re.compile(r"\{[^{}:!]*[.\[]")
"""A template's field that reads an attribute or item of its argument."""
