"""The settings that `torch.backends` holds, found by the names that code reads them by.

Code may read them through any name of a module (`from torch.backends.cuda import matmul`), so that
they are found by the last name alone: `allow_tf32`, `enabled`, `flash_sdp_enabled`.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from enum import Enum

import torch

_Look = Callable[[], object]
Flag = tuple[str, _Look]
"""Where a setting is kept, and what reads it."""

_SIMPLE = bool, int, float, str, type(None), tuple, Enum
_PREFIX = f"{torch.backends.__name__}."
_ASKING = ("_enabled", "_allowed")
_PREFERENCE = "preferred_"


@functools.cache
def backend_flags() -> Mapping[str, tuple[Flag, ...]]:
    """The settings of `torch.backends`, by the name of the attribute or function that tells one."""
    found: dict[str, list[Flag]] = {}
    for path, module in list(sys.modules.items()):
        if path == _PREFIX[:-1] or path.startswith(_PREFIX):
            for name, where, look in _of_module(path, module):
                if _tells(look):
                    found.setdefault(name, []).append((where, look))
    return {name: tuple(flags) for name, flags in found.items()}


def _tells(look: _Look) -> bool:
    """True if a setting can be read here."""
    try:
        value = look()
    except (TypeError, RuntimeError, AttributeError, AssertionError, ImportError):
        return False  # it is another device's, or takes arguments
    return isinstance(value, _SIMPLE) or hasattr(type(value), "__members__")  # an enum of C


def _of_module(path: str, module: types.ModuleType) -> Iterator[tuple[str, str, _Look]]:
    """For each setting of a module: its name, where it is kept, and what reads it."""
    own = getattr(module, "m", module)  # behind the module whose class has the properties
    names = {name for each in type(module).__mro__ for name in vars(each)} | vars(own).keys()
    for name in names:
        if name.startswith("_") or name.isupper():
            continue
        value = inspect.getattr_static(module, name, None) or vars(own).get(name)
        kind = type(value)
        ours = kind.__module__.startswith(_PREFIX[:-1])
        if isinstance(value, types.FunctionType):
            if name.endswith(_ASKING) or name.startswith((_PREFERENCE, "get_")):
                yield name, f"{path}.{name}()", value
        elif (ours and hasattr(kind, "__get__")) or isinstance(value, bool | str | None):
            yield name, f"{path}.{name}", functools.partial(getattr, module, name)
        elif ours and not isinstance(value, type):
            for inner in _attributes(kind):
                where = f"{path}.{name}.{inner}"
                yield inner, where, functools.partial(getattr, value, inner)


def _attributes(kind: type) -> list[str]:
    """The attributes that objects of a class compute: they are spelled out in its code."""
    code = getattr(getattr(kind, "__getattr__", None), "__code__", None)
    constants = () if code is None else code.co_consts
    texts = [c for c in constants if isinstance(c, str) and c.isidentifier()]
    return [*texts, *[name for name, v in vars(kind).items() if isinstance(v, property)]]


def precisions() -> tuple[str, ...]:
    """The precision of float32 in each backend, by the getter that takes its name."""
    return tuple([str(look()) for _, look in backend_flags().get("fp32_precision", ())])
