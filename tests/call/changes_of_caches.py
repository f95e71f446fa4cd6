"""Ways to change what `functools.lru_cache` and `functools.cache` keep between two calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tests.call.changes import Way, state, way

Reads = tuple[Callable[[], float], Callable[[], object]]
LIMITS = {"one": 1, "some": 128, "any": None, "none": 0}


def cleared_and_filled_again(limit: int | None) -> Reads:
    """As many results, calls and hits as before, by which nothing could be told."""
    value = [2.0]

    @functools.lru_cache(maxsize=limit)
    def cached() -> float:
        return value[0]

    def change() -> None:
        hits = cached.cache_info().hits
        value[0] = 3.0
        cached.cache_clear()
        for _ in range(hits + 1):
            cached()

    return cached, change


def others_put_in(limit: int | None) -> Reads:
    """The result that is read is put out where there is no room, and made of another value."""
    value = [2.0]

    @functools.lru_cache(maxsize=limit)
    def cached(place: int) -> float:
        return value[place] if place < len(value) else 0.0

    def change() -> None:
        value[0] = 3.0
        for place in range(1, 200):
            cached(place)

    return lambda: cached(0), change


def put_out_and_in_again(limit: int | None) -> Reads:
    """The entry of the result that is read comes to hold others, and one of the same argument."""
    cached, put_out = others_put_in(limit)

    def change() -> None:
        put_out()
        cached()

    return cached, change


for name, limit in LIMITS.items():
    for make in (cleared_and_filled_again, others_put_in, put_out_and_in_again):
        if name != "any" or make is cleared_and_filled_again:  # the others change nothing
            made: Any = functools.partial(make, limit)
            made.__name__, made.__module__ = f"a_cache_of_{name}_{make.__name__}", __name__
            state(made)


@state
def a_cached_list_that_is_written() -> Reads:
    cached = functools.cache(lambda: [2.0])
    return lambda: cached()[0], lambda: cached().__setitem__(0, 3.0)


@state
def an_attribute_of_a_cached_object() -> Reads:
    class Held:
        scale = 2.0

    cached = functools.lru_cache(lambda place: Held())
    return lambda: cached(1).scale, lambda: setattr(cached(1), "scale", 3.0)


@state
def how_often_a_cache_was_hit() -> Reads:
    cached = functools.cache(lambda: 2.0)
    cached()
    return lambda: float(cached.cache_info().hits), cached


@state
def the_function_around_which_a_cache_lies() -> Reads:
    def helper() -> float:
        return 2.0

    cached = functools.lru_cache(maxsize=0)(helper)
    return cached, lambda: setattr(helper, "__code__", (lambda: 3.0).__code__)


@way
def a_cached_tensor_made_anew() -> Way:
    value = [2.0]
    cached = functools.cache(lambda: torch.tensor([value[0]]))

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * cached()

    yield f
    value[0] = 3.0
    cached.cache_clear()
    yield f


def keyed_by_a_tensor(limit: int | None) -> Way:
    cached = functools.lru_cache(maxsize=limit)(lambda tensor: tensor * 2)
    held = [torch.ones(3)]

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * cached(held[0])

    yield f
    held[0] = torch.full((3,), 4.0)
    yield f


@way
def a_tensor_by_which_any_is_cached() -> Way:
    return keyed_by_a_tensor(None)


@way
def a_tensor_by_which_some_are_cached() -> Way:
    return keyed_by_a_tensor(128)


@way
def a_cached_tensor_written_in_place() -> Way:
    cached = functools.cache(lambda: torch.tensor([2.0]))
    cached()  # outside: a tensor that the function made and keeps would be refused

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * cached()

    yield f
    cached().fill_(3.0)
    yield f


@way
def a_cached_method_of_another_object() -> Way:
    class Scales:
        def __init__(self, scale: float):
            self.scale = scale

        doubled = functools.lru_cache(lambda self: self.scale * 2)

    held = [Scales(1.0)]

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * held[0].doubled()

    yield f
    held[0] = Scales(2.0)
    yield f
