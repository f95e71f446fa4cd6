"""Ways to give something an attribute that it had not when the function was recorded."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import shardmap
from tests.call.changes import Way, state, way

ABSENT = "scale_of_absent"
Reads = tuple[Callable[[], float], Callable[[], object]]


def a_module() -> Any:
    return types.ModuleType("settings_of_absent")


def a_function() -> Any:
    def helper() -> None:
        """Hold nothing yet."""

    return helper


def a_class() -> Any:
    return type("Settings", (), {})


def an_object() -> Any:
    return a_class()()


def a_namespace() -> Any:
    return types.SimpleNamespace()


def a_partial() -> Any:
    return functools.partial(print)


def a_layer() -> Any:
    return nn.Linear(1, 1)


def a_tensor() -> Any:
    return torch.ones(2)


def by_default(of: Any) -> float:
    return getattr(of, ABSENT, 2.0)


def by_asking(of: Any) -> float:
    return of.scale_of_absent if hasattr(of, "scale_of_absent") else 2.0


def by_trying(of: Any) -> float:
    try:
        return of.scale_of_absent
    except AttributeError:
        return 2.0


def by_all_names(of: Any) -> float:
    return vars(of).get("scale_of_absent", 2.0)


def made_of(holder: Callable[[], Any], read: Callable[[Any], float]) -> Reads:
    held = holder()
    return lambda: read(held), lambda: setattr(held, ABSENT, 3.0)


for held in (
    a_module, a_function, a_class, an_object, a_namespace, a_partial, a_layer, a_tensor,
):  # fmt: skip
    for read in (by_default, by_asking, by_trying, by_all_names):
        made: Any = functools.partial(made_of, held, read)
        made.__name__, made.__module__ = (
            f"an_attribute_of_{held.__name__}_{read.__name__}",
            __name__,
        )
        state(made)


@way
def what_answers_for_a_module() -> Way:
    """A function `__getattr__` of a module, which answers for what is missing (PEP 562)."""
    module = a_module()

    def f(x: Tensor) -> Tensor:
        return x * by_default(module)

    yield f
    module.__getattr__ = lambda name: 3.0
    yield f


@way
def an_attribute_of_sys() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * getattr(sys, "scale_of_absent", 2.0)

    yield f
    setattr(sys, ABSENT, 3.0)
    yield f
    delattr(sys, ABSENT)


@way
def a_global_of_text_under_a_map() -> Way:
    """The inner function's globals are no module's, and shardmap calls it."""
    names: dict[str, Any] = {"scale": 2.0}
    exec("def inner(x): return x * scale", names)

    def f(x: Tensor) -> Tensor:
        return shardmap.vmap(names["inner"])(torch.stack([x, x * 2])).sum(0)

    yield f
    names["scale"] = 3.0
    yield f
