"""Attributes that code looks up by names that it spells out, or computes."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap.program.lookups import are_spelled_out
from tests.call.runs import counting
from tests.loop import loop

# The functions below are never called: their code is what is looked at.
# ruff: noqa: B009, B010 - attributes by constant names are what is tested here


def several(x: Any) -> Any:
    if not hasattr(x, "cache") or x.cache is None:
        x.cache = {k: getattr(x, "w") for k in range(3)}
    for each in x:
        try:
            y = getattr(each, "b", None)
        except AttributeError:
            raise ValueError(getattr(each, "c")) from None
        setattr(x, "y", y)
    with x as z:
        print(getattr(z, "m")(hasattr(z, "q"), k=getattr(x, "e")))
    return getattr(x, "a", x.foo(1, 2)[0].y)


SPELLED: list[Callable[..., Any]] = [
    several,
    lambda x: hasattr(x.y.z[0], "a"),
    lambda x: setattr(x, "a", getattr(x, "b") + 1),
    lambda x: delattr(x, "a"),
    lambda x: x.other("a"),
]
COMPUTED: list[Callable[..., Any]] = [
    lambda x, n: hasattr(x, n),
    lambda x, n: getattr(getattr(x, "a"), n),
    lambda x, n: getattr(x, n)("a", "b"),
    lambda x, n: x.foo(x, "a") + getattr(x, n),
    lambda x, n: getattr(x, "a", getattr(x, n)),
    lambda x, n: getattr(x, f"{n}_a"),
    lambda x, n: getattr(x, "a" if n else "b"),
    lambda x, n: getattr(x, "a" + n),
    lambda x: getattr(x, "by hand"),
    lambda x: list(map(getattr, x)),
    lambda x, *rest: getattr(*rest),
    lambda x: x.foo(getattr, x, "a"),
]


@pytest.mark.parametrize("function", SPELLED)
def test_constant_names_are_spelled_out(function: Callable[..., Any]) -> None:
    assert are_spelled_out(dis.get_instructions(function))


@pytest.mark.parametrize("function", COMPUTED)
def test_computed_names_are_not(function: Callable[..., Any]) -> None:
    assert not are_spelled_out(dis.get_instructions(function))


class Layer:
    """Has an optional part, as layers of torch_geometric do."""

    def __init__(self) -> None:
        self.scale = torch.tensor(2.0)


def test_optional_parts_do_not_make_a_function_unknown() -> None:
    """`hasattr(self, "extra")` names what it reads: no other attribute of a module in reach."""
    layer = Layer()

    def function(row: Tensor) -> Tensor:
        row = row * layer.scale + len(sys.byteorder)
        return row.sin() if hasattr(layer, "extra") else row

    mapped = shardmap.vmap(function)
    x = torch.randn(4, 3)
    want = loop(function)(x)
    with counting(function) as runs:
        for _ in range(6):
            torch.testing.assert_close(mapped(x), want)
        assert runs() < 6, "it is recorded at each call"
    assert "replayed while what it reads is unchanged" in shardmap.plan(function)(x).explain()
    layer.extra = True
    for options in ({}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}):
        found = shardmap.vmap(function, **options)(x)
        torch.testing.assert_close(found, loop(function)(x))
