"""Ways to change what a function does between two calls: globals, functions, closures and containers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from tests.call.changes import Way, way

SCALE = 2.0
WEIGHT = torch.arange(3.0)
TABLE = {"scale": 2.0, "shift": [1.0, 2.0]}
FLAGS = {"a"}


def helper(x: Tensor) -> Tensor:
    return x * 2


def scaled(x: Tensor, by: float = 2.0, *, shift: float = 1.0) -> Tensor:
    return x * by + shift


@way
def global_number() -> Way:
    global SCALE

    def f(x: Tensor) -> Tensor:
        return x * SCALE

    SCALE = 2.0
    yield f
    SCALE = 5.0
    yield f


@way
def global_number_to_int() -> Way:
    global SCALE

    def f(x: Tensor) -> Tensor:
        return (x.long() * SCALE).to(torch.get_default_dtype()) if type(SCALE) is int else x * SCALE

    SCALE = 2.0
    yield f
    SCALE = 2
    yield f


@way
def global_tensor_rebound() -> Way:
    global WEIGHT

    def f(x: Tensor) -> Tensor:
        return x * WEIGHT

    WEIGHT = torch.arange(3.0)
    yield f
    WEIGHT = WEIGHT + 1
    yield f


@way
def global_tensor_of_another_shape() -> Way:
    global WEIGHT

    def f(x: Tensor) -> Tensor:
        return x * WEIGHT.sum() + WEIGHT.shape[0]

    WEIGHT = torch.arange(3.0)
    yield f
    WEIGHT = torch.arange(5.0)
    yield f


@way
def global_tensor_of_another_dtype() -> Way:
    global WEIGHT

    def f(x: Tensor) -> Tensor:
        return x * WEIGHT

    WEIGHT = torch.arange(3.0)
    yield f
    WEIGHT = torch.arange(3.0).double()
    yield f


@way
def global_function_rebound() -> Way:
    global helper
    kept = helper

    def f(x: Tensor) -> Tensor:
        return helper(x)

    yield f
    helper = torch.neg
    yield f
    helper = kept


@way
def global_function_code() -> Way:
    def one(x: Tensor) -> Tensor:
        return x + 1

    def two(x: Tensor) -> Tensor:
        return x + 2

    def f(x: Tensor) -> Tensor:
        return one(x)

    yield f
    one.__code__ = two.__code__
    yield f


@way
def own_code() -> Way:
    def two(x: Tensor) -> Tensor:
        return x + 2

    def f(x: Tensor) -> Tensor:
        return x + 1

    yield f
    f.__code__ = two.__code__
    yield f


@way
def defaults_of_a_helper() -> Way:
    def f(x: Tensor) -> Tensor:
        return scaled(x)

    yield f
    scaled.__defaults__ = (9.0,)
    yield f
    scaled.__defaults__ = (2.0,)


@way
def keyword_defaults_of_a_helper() -> Way:
    def f(x: Tensor) -> Tensor:
        return scaled(x)

    yield f
    scaled.__kwdefaults__ = {"shift": 4.0}
    yield f
    scaled.__kwdefaults__ = {"shift": 1.0}


@way
def keyword_defaults_in_place() -> Way:
    def f(x: Tensor) -> Tensor:
        return scaled(x)

    yield f
    assert scaled.__kwdefaults__ is not None
    scaled.__kwdefaults__["shift"] = 6.0
    yield f
    scaled.__kwdefaults__["shift"] = 1.0


@way
def own_defaults() -> Way:
    def f(x: Tensor, by: float = 2.0) -> Tensor:
        return x * by

    yield f
    f.__defaults__ = (3.0,)
    yield f


@way
def closure_number() -> Way:
    scale = 2.0

    def f(x: Tensor) -> Tensor:
        return x * scale

    yield f
    scale = 3.0
    yield f


@way
def closure_tensor() -> Way:
    weight = torch.ones(3)

    def f(x: Tensor) -> Tensor:
        return x * weight

    yield f
    weight = torch.arange(3.0)
    yield f


@way
def closure_of_a_helper() -> Way:
    scale = 2.0

    def inner(x: Tensor) -> Tensor:
        return x * scale

    def f(x: Tensor) -> Tensor:
        return inner(x) + 1

    yield f
    scale = 4.0
    yield f


@way
def closure_function() -> Way:
    act = torch.sin

    def f(x: Tensor) -> Tensor:
        return act(x)

    yield f
    act = torch.cos
    yield f


@way
def closure_list_in_place() -> Way:
    shifts = [1.0, 2.0]

    def f(x: Tensor) -> Tensor:
        return x + sum(shifts)

    yield f
    shifts.append(3.0)
    yield f


@way
def bound_method_of_a_dict() -> Way:
    table = {"shift": 1.0}
    get = table.get

    def f(x: Tensor) -> Tensor:
        return x + get("shift")

    yield f
    table["shift"] = 2.0
    yield f


@way
def bound_operator_of_a_list() -> Way:
    shifts = [1.0, 2.0]
    item = shifts.__getitem__

    def f(x: Tensor) -> Tensor:
        return x + item(0)

    yield f
    shifts[0] = 4.0
    yield f


@way
def bound_method_in_a_partial() -> Way:
    table = {"shift": 1.0}
    get = functools.partial(table.get, "shift")

    def f(x: Tensor) -> Tensor:
        return x + get()

    yield f
    table["shift"] = 2.0
    yield f


@way
def closure_list_of_tensors() -> Way:
    weights = [torch.ones(3), torch.ones(3)]

    def f(x: Tensor) -> Tensor:
        return x * weights[0] + weights[1]

    yield f
    weights[1] = torch.arange(3.0)
    yield f


@way
def closure_list_of_layers() -> Way:
    layers = [nn.Linear(3, 3), nn.Tanh()]

    def f(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    yield f
    layers.append(nn.ReLU())
    yield f


@way
def tensors_that_become_one() -> Way:
    weights = [torch.ones(3), torch.arange(3.0)]

    def f(x: Tensor) -> Tensor:
        return x * weights[0] + (0.0 if weights[0] is weights[1] else weights[1])

    yield f
    weights[1] = weights[0]
    yield f


@way
def dict_entry() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * TABLE["scale"]

    TABLE["scale"] = 2.0
    yield f
    TABLE["scale"] = 3.0
    yield f


@way
def nested_list_in_a_dict() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * sum(TABLE["shift"])

    yield f
    TABLE["shift"][0] += 5.0
    yield f


@way
def dict_that_gets_a_key() -> Way:
    table: dict[str, float] = {"a": 1.0}

    def f(x: Tensor) -> Tensor:
        for value in table.values():
            x = x + value
        return x

    yield f
    table["b"] = 5.0
    yield f


@way
def dict_in_another_order() -> Way:
    table = {"a": 1.0, "b": 3.0}

    def f(x: Tensor) -> Tensor:
        for value in table.values():
            x = x * value + 1
        return x

    yield f
    table["a"] = table.pop("a")
    yield f


@way
def a_set() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if "a" in FLAGS else x * 3

    FLAGS.add("a")
    yield f
    FLAGS.discard("a")
    yield f
    FLAGS.add("a")


@way
def an_empty_dict_that_is_filled() -> Way:
    table: dict[str, float] = {}

    def f(x: Tensor) -> Tensor:
        return x * table.get("scale", 1.0)

    yield f
    table["scale"] = 4.0
    yield f
