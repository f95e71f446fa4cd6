"""Ways to change what a function does between two calls: arrays, settings, captured tensors and calls."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.call.changes import Way, way

NUMBERS = [1.0, 2.0]
ARRAY = np.array([1.0, 2.0, 3.0])
OPTIONAL: float
"""Defined by the way that deletes it."""


class Settings:
    kind = "sin"
    by = 2.0

    def __init__(self) -> None:
        self.scale = 2.0
        self.unread = 0

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale

    @property
    def twice(self) -> float:
        return 2 * self.scale

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * cls.by

    @staticmethod
    def plain(x: Tensor) -> Tensor:
        return x * 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.register_buffer("shift", torch.zeros(2))
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.training:
            x = x * self.scale
        return self.second(x) + self.shift


@way
def numpy_in_place() -> Way:
    ARRAY[:] = [1.0, 2.0, 3.0]

    def f(x: Tensor) -> Tensor:
        return x * float(ARRAY.sum())

    yield f
    ARRAY[1] = 7.0
    yield f


@way
def numpy_shared_with_a_tensor() -> Way:
    array = np.ones(3, dtype=np.float32)

    def f(x: Tensor) -> Tensor:
        return x * torch.from_numpy(array)

    yield f
    array[1] = 7.0
    yield f


@way
def a_bytearray() -> Way:
    data = bytearray([1, 2])

    def f(x: Tensor) -> Tensor:
        return x * data[0]

    yield f
    data[0] = 9
    yield f


@way
def default_dtype() -> Way:
    def f(x: Tensor) -> Tensor:
        return x.sum() + torch.ones(2)

    yield f
    torch.set_default_dtype(torch.float64)
    yield f
    torch.set_default_dtype(torch.float32)


@way
def grad_mode_asked() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if torch.is_grad_enabled() else x * 3

    yield f
    with torch.no_grad():
        yield f


@way
def autocast() -> Way:
    weight = torch.randn(3, 3)

    def f(x: Tensor) -> Tensor:
        return x @ weight

    yield f
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield f


@way
def a_flag_of_torch() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if torch.are_deterministic_algorithms_enabled() else x * 3

    yield f
    torch.use_deterministic_algorithms(True)
    yield f
    torch.use_deterministic_algorithms(False)


@way
def matmul_precision_asked() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if torch.get_float32_matmul_precision() == "highest" else x * 3

    yield f
    torch.set_float32_matmul_precision("high")
    yield f
    torch.set_float32_matmul_precision("highest")


@way
def cudnn_flag() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if torch.backends.cudnn.benchmark else x * 3

    yield f
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield f


@way
def number_of_threads() -> Way:
    kept = torch.get_num_threads()

    def f(x: Tensor) -> Tensor:
        return x * torch.get_num_threads()

    yield f
    torch.set_num_threads(kept + 1)
    yield f
    torch.set_num_threads(kept)


@way
def an_attribute_of_a_tensor() -> Way:
    weight = torch.ones(3)
    weight.scale = 2.0

    def f(x: Tensor) -> Tensor:
        return x * weight * weight.scale

    yield f
    weight.scale = 5.0
    yield f


@way
def the_grad_of_a_captured_tensor() -> Way:
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)

    def f(x: Tensor) -> Tensor:
        return x * weight.grad

    yield f
    weight.grad = torch.arange(3.0)
    yield f


@way
def the_value_of_a_captured_flag() -> Way:
    flag = torch.tensor(True)

    def f(x: Tensor) -> Tensor:
        return x * 2 if flag else x * 3

    yield f
    flag.fill_(False)
    yield f


@way
def the_item_of_a_captured_number() -> Way:
    rate = torch.tensor(2.0)

    def f(x: Tensor) -> Tensor:
        return x * rate.item()

    yield f
    rate.fill_(4.0)
    yield f


@way
def a_counter_that_is_written() -> Way:
    settings = Settings()
    settings.calls = 0

    def f(x: Tensor) -> Tensor:
        settings.scale = 2.0 if settings.unread < 3 else 3.0
        return x * settings.scale

    yield f
    settings.unread = 5
    yield f


@way
def an_iterator_over_numbers() -> Way:
    numbers = itertools.cycle([2.0])

    def f(x: Tensor) -> Tensor:
        return x * next(numbers)

    yield f
    numbers = itertools.cycle([5.0])
    yield f


@way
def a_generator_function() -> Way:
    def values() -> Iterator[float]:
        yield from NUMBERS

    def f(x: Tensor) -> Tensor:
        return x * sum(values())

    NUMBERS[:] = [1.0, 2.0]
    yield f
    NUMBERS[0] = 6.0
    yield f


@way
def a_comprehension() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * sum([n * 2 for n in NUMBERS])

    NUMBERS[:] = [1.0, 2.0]
    yield f
    NUMBERS[1] = 6.0
    yield f


@way
def a_lambda_in_a_table() -> Way:
    table = {"act": lambda x: x + 1}

    def f(x: Tensor) -> Tensor:
        return table["act"](x)

    yield f
    table["act"] = lambda x: x * 5
    yield f


@way
def a_callable_object() -> Way:
    class Scale:
        def __init__(self) -> None:
            self.by = 2.0

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.by

    scale = Scale()
    yield scale
    scale.by = 5.0
    yield scale


@way
def call_of_a_class_replaced() -> Way:
    class Scale:
        def __call__(self, x: Tensor) -> Tensor:
            return x * 2

    scale = Scale()

    def f(x: Tensor) -> Tensor:
        return scale(x)

    yield f
    Scale.__call__ = lambda self, x: x * 6
    yield f


@way
def a_module_as_the_function() -> Way:
    net = Net()
    yield net
    net.scale = 6.0
    yield net


@way
def a_custom_function() -> Way:
    class Scaled(torch.autograd.Function):
        factor = 2.0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * Scaled.factor

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * Scaled.factor

    def f(x: Tensor) -> Tensor:
        return Scaled.apply(x)

    yield f
    Scaled.factor = 7.0
    yield f


@way
def under_torch_func() -> Way:
    scale = [2.0]

    def loss(x: Tensor) -> Tensor:
        return (x * x).sum() * scale[0]

    yield torch.func.grad(loss)
    scale[0] = 5.0
    yield torch.func.grad(loss)


@way
def functional_call() -> Way:
    net = Net()
    params = dict(net.named_parameters())

    def f(x: Tensor) -> Tensor:
        return torch.func.functional_call(net, params, (x,))

    yield f
    params = {name: p.detach() + 1 for name, p in params.items()}
    yield f


@way
def a_module_passed_as_default() -> Way:
    net = Net()

    def f(x: Tensor, net: Net = net) -> Tensor:
        return net(x)

    yield f
    assert f.__defaults__ is not None
    f.__defaults__[0].scale = 9.0
    yield f


@way
def ordering_of_a_list() -> Way:
    acts = [torch.sin, torch.exp]

    def f(x: Tensor) -> Tensor:
        for act in acts:
            x = act(x)
        return x

    yield f
    acts.reverse()
    yield f


@way
def an_attribute_deleted() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * (settings.scale if hasattr(settings, "scale") else 11.0)

    yield f
    del settings.scale
    yield f


@way
def a_global_deleted() -> Way:
    globals()["OPTIONAL"] = 3.0

    def f(x: Tensor) -> Tensor:
        try:
            return x * OPTIONAL
        except NameError:
            return x * 12

    yield f
    del globals()["OPTIONAL"]
    yield f


@way
def another_module_reached_by_alias() -> Way:
    holder = types.SimpleNamespace(lib=torch.nn.functional)
    kept = F.silu

    def f(x: Tensor) -> Tensor:
        lib = holder.lib
        return lib.silu(x)

    yield f
    F.silu = lambda x, inplace=False: x * 3
    yield f
    F.silu = kept


@way
def a_namespace() -> Way:
    args = types.SimpleNamespace(scale=2.0)

    def f(x: Tensor) -> Tensor:
        return x * args.scale

    yield f
    args.scale = 3.0
    yield f
