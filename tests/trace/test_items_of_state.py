"""Backwards that read one item of a container, beside items whose state cannot be compared."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from tests.same import assert_same
from tests.trace.gradient_readers import KINDS, gradient, loop

Tensor = torch.Tensor


class Holder:
    """An object of which a backward reads an attribute."""

    def __init__(self) -> None:
        self.scale = 2.0
        self.table: dict[str, Any] = new_table()


def new_table() -> dict[str, Any]:
    return {
        "scale": 2.0, "inner": {"scale": 2.0}, "steps": iter([1, 2]),
        "get": operator.attrgetter("scale"),
    }  # fmt: skip


TABLE = new_table()
ITEMS: list[Any] = [2.0, iter([1, 2])]
HOLDER = Holder()
PROXY = weakref.proxy(HOLDER)
KEY = "scale"


def closed_over(table: dict[str, Any]) -> Callable[[], float]:
    return lambda: table["scale"]


def read_by_default(table: dict[str, Any] = TABLE) -> float:
    return table["scale"]


READS: dict[str, tuple[Callable[[], float], Callable[[], object]]] = {
    "an item": (lambda: TABLE["scale"], lambda: TABLE.update(scale=3.0)),
    "an item within": (lambda: TABLE["inner"]["scale"], lambda: TABLE["inner"].update(scale=3.0)),
    "another dict within": (
        lambda: TABLE["inner"]["scale"],
        lambda: TABLE.update(inner={"scale": 3.0}),
    ),
    "an item of a list": (lambda: ITEMS[0], lambda: ITEMS.__setitem__(0, 3.0)),
    "one from behind": (lambda: ITEMS[-2], lambda: ITEMS.__setitem__(0, 3.0)),
    "of an attribute": (lambda: HOLDER.table["scale"], lambda: HOLDER.table.update(scale=3.0)),
    "closed over": (closed_over(TABLE), lambda: TABLE.update(scale=3.0)),
    "by a default": (read_by_default, lambda: TABLE.update(scale=3.0)),
    "by a proxy": (lambda: PROXY.scale, lambda: setattr(HOLDER, "scale", 3.0)),
    "an item by a proxy": (lambda: PROXY.table["scale"], lambda: HOLDER.table.update(scale=3.0)),
}

WHOLE: dict[str, Callable[[], float]] = {
    "by a computed key": lambda: TABLE[KEY],
    "by a method": lambda: TABLE["scale"] + sum(k == "other" for k in TABLE),
    "handed on": lambda: dict(TABLE)["scale"],
}


@pytest.fixture(autouse=True)
def as_before() -> None:
    """Every table is as it was, and Functions of other tests with the same code are gone."""
    shardmap.clear_caches()
    gc.collect()
    TABLE.update(new_table())
    ITEMS[0], HOLDER.scale = 2.0, 2.0
    HOLDER.table = new_table()


@pytest.mark.parametrize("trace", ["auto", "once"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READS)
def test_gradients_are_those_of_the_loop(name: str, kind: str, trace: str) -> None:
    read, change = READS[name]
    function = KINDS[kind](read)
    mapped = shardmap.vmap(function, trace=trace)
    for _ in range(3):
        assert_same(gradient(mapped), gradient(loop(function)), name)
    change()
    assert read() == 3.0
    for _ in range(2):
        assert_same(gradient(mapped), gradient(loop(function)), f"{name}, changed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READS)
def test_a_change_before_the_gradient_is_refused(name: str, kind: str) -> None:
    read, change = READS[name]
    with pytest.raises(errors.AutogradFunctionError, match="has changed between the map and its"):
        gradient(shardmap.vmap(KINDS[kind](read)), between=change)


def test_a_change_of_another_item_is_none() -> None:
    function = KINDS["hook"](READS["an item"][0])
    found = gradient(shardmap.vmap(function), between=lambda: TABLE.update(steps=iter([])))
    assert_same(found, gradient(loop(function)), "the gradient")


@pytest.mark.parametrize("name", WHOLE)
def test_what_may_be_read_whole_is_compared_whole(name: str) -> None:
    read = WHOLE[name]

    def function(r: Tensor) -> Tensor:
        h = r * 1
        h.register_hook(lambda g: g * read())
        return h

    with pytest.raises(errors.AutogradFunctionError, match="cannot be compared|not followed"):
        gradient(shardmap.vmap(function))


def test_a_proxy_whose_object_is_gone() -> None:
    holder = Holder()
    proxy = weakref.proxy(holder)

    def read() -> float:
        try:
            return proxy.scale
        except ReferenceError:
            return 5.0

    def drop() -> None:
        nonlocal holder
        holder = HOLDER

    with pytest.raises(errors.AutogradFunctionError, match="has changed between the map and its"):
        gradient(shardmap.vmap(KINDS["hook"](read)), between=drop)
    function = KINDS["hook"](read)
    assert_same(gradient(shardmap.vmap(function)), gradient(loop(function)), "afterwards")
