"""Ways to change objects of numpy and torch whose state C keeps."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.call.changes import state


@state
def a_numpy_array() -> Any:
    held = np.array([2.0])
    return lambda: float(held[0]), lambda: held.__setitem__(0, 3.0)


@state
def a_structured_array() -> Any:
    held = np.zeros(2, dtype=[("a", "f8"), ("b", "i4")])
    held["a"][0] = 2.0
    return lambda: float(held["a"][0]), lambda: held["a"].__setitem__(0, 3.0)


@state
def a_structured_scalar() -> Any:
    held = np.zeros(2, dtype=[("a", "f8")])
    one = held[0]
    held["a"] = 2.0
    return lambda: float(one["a"]), lambda: one.__setitem__("a", 3.0)


@state
def a_record() -> Any:
    held = np.rec.array([(2.0,)], dtype=[("a", "f8")])
    one = held[0]
    return lambda: float(one.a), lambda: setattr(one, "a", 3.0)


@state
def the_names_of_a_dtype() -> Any:
    held = np.dtype([("a", "f8")])
    return lambda: 1.0 + len(held.names[0]), lambda: setattr(held, "names", ("ab",))


@state
def an_array_of_objects() -> Any:
    inner = [2.0]
    held = np.array([None], dtype=object)
    held[0] = inner
    return lambda: held[0][0], lambda: inner.__setitem__(0, 3.0)


@state
def a_masked_array() -> Any:
    held = np.ma.array([2.0, 1.0], mask=[False, False])
    return lambda: float(held.sum()), lambda: held.__setitem__(1, np.ma.masked)


@state
def a_view_of_memory_of_numpy() -> Any:
    memory = np.array([2.0, 1.0])
    held = memory[:1]
    return lambda: float(held[0]), lambda: memory.__setitem__(0, 3.0)


@state
def an_iterator_of_numpy() -> Any:
    memory = np.array([2.0, 1.0])
    held = memory.flat
    return lambda: float(held[0]), lambda: memory.__setitem__(0, 3.0)


@state
def an_iterator_with_a_state() -> Any:
    held = itertools.cycle([2.0, 3.0, 4.0])
    pair = [next(held), held]
    return lambda: pair[0], lambda: pair.__setitem__(0, next(held))


@state
def a_generator_that_has_ended() -> Any:
    def counting() -> Any:
        yield 1.0

    held = counting()
    return lambda: 3.0 if held.gi_frame is None else 2.0, lambda: list(held)


@state
def what_is_left_of_an_iterator() -> Any:
    held = iter([1.0, 2.0])
    return lambda: 1.0 + operator.length_hint(held), lambda: next(held)


@state
def the_state_of_a_torch_generator() -> Any:
    held = torch.Generator().manual_seed(2)
    return lambda: float(held.initial_seed() + 1), lambda: held.manual_seed(3)


@state
def an_attribute_of_a_tensor_of_a_class() -> Any:
    class Held(Tensor):
        scale = 2.0

    held = torch.ones(()).as_subclass(Held)
    return lambda: held.scale, lambda: setattr(Held, "scale", 3.0)


@state
def the_class_of_a_tensor() -> Any:
    class Held(Tensor):
        scale = 2.0

    class Other(Tensor):
        scale = 3.0

    held = torch.ones(()).as_subclass(Held)
    return lambda: held.scale, lambda: setattr(held, "__class__", Other)


@state
def the_name_of_a_tensor() -> Any:
    held = torch.ones((), requires_grad=True)
    held.grad = torch.tensor(2.0)
    return lambda: held.grad.clone(), lambda: held.grad.add_(1.0)
