"""More ways to change what a function does between two calls: found by users' eyes."""

from __future__ import annotations

import abc
import collections
import functools
import operator
import types
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from tests.call.changes import Way, way


@way
def a_parameter_untied() -> Way:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    yield model
    model[1].weight = nn.Parameter(torch.ones(3, 3))
    yield model


@way
def an_embedding_untied_from_its_head() -> Way:
    table, head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
    head.weight = table.weight

    def f(x: Tensor) -> Tensor:
        return head(table.weight.sum(0) * x)

    yield f
    table.weight = nn.Parameter(torch.ones(4, 3))
    yield f


@way
def by_attrgetter() -> Way:
    config, get = types.SimpleNamespace(scale=2.0), operator.attrgetter("scale")

    def f(x: Tensor) -> Tensor:
        return x * get(config)

    yield f
    config.scale = 5.0
    yield f


@way
def a_cached_method() -> Way:
    class Has:
        scale = 1.0
        twice = functools.lru_cache(lambda self: self.scale * 2)

    has = Has()

    def f(x: Tensor) -> Tensor:
        return x * has.twice()

    yield f
    has.scale = 3.0
    Has.twice.cache_clear()
    yield f


@way
def an_ordered_dict_moved_to_end() -> Way:
    steps = collections.OrderedDict(a=torch.sin, b=torch.exp)

    def f(x: Tensor) -> Tensor:
        for step in steps.values():
            x = step(x)
        return x

    yield f
    steps.move_to_end("a")
    yield f


@way
def an_attribute_of_a_scripted_module() -> Way:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    scripted = torch.jit.script(Scaled())

    def f(x: Tensor) -> Tensor:
        return scripted(x)

    yield f
    scripted.scale = 5.0
    yield f


@way
def a_method_of_tensor_patched() -> Way:
    def f(x: Tensor) -> Tensor:
        return x.sin()

    yield f
    with mock.patch.object(torch.Tensor, "sin", lambda x: x.cos(), create=True):
        yield f


@way
def an_attribute_of_a_number() -> Way:
    class Number(float):
        pass

    number = Number(1.0)
    number.scale = 2.0

    def f(x: Tensor) -> Tensor:
        return x * number.scale

    yield f
    number.scale = 7.0
    yield f


@way
def whether_tensors_share_memory() -> Way:
    weights = [torch.ones(3), torch.ones(3)]

    def f(x: Tensor) -> Tensor:
        return x * (2 if weights[0].data_ptr() == weights[1].data_ptr() else 3)

    yield f
    weights[1] = weights[0].view(3)
    yield f


@way
def the_version_of_a_tensor() -> Way:
    weight = torch.ones(3)

    def f(x: Tensor) -> Tensor:
        return x * (weight._version + 1)

    yield f
    weight.add_(0)
    yield f


@way
def the_bases_of_a_class() -> Way:
    class One:
        def apply(self, x: Tensor) -> Tensor:
            return x + 1

    class Two:
        def apply(self, x: Tensor) -> Tensor:
            return x + 2

    class Has(One):
        pass

    has = Has()

    def f(x: Tensor) -> Tensor:
        return has.apply(x)

    yield f
    Has.__bases__ = (Two,)
    yield f


@way
def a_class_registered_with_an_abc() -> Way:
    class Kind(abc.ABC):
        @abc.abstractmethod
        def apply(self) -> None: ...

    class Other:
        pass

    other = Other()

    def f(x: Tensor) -> Tensor:
        return x * 2 if isinstance(other, Kind) else x * 3

    yield f
    Kind.register(Other)
    yield f


@way
def how_numpy_treats_errors() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if np.geterr()["divide"] == "raise" else x * 3

    yield f
    with np.errstate(divide="raise"):
        yield f


@way
def weights_tied_by_data() -> Way:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    yield model
    model[1].weight.data = model[0].weight.data
    yield model


@way
def a_model_deep_in_a_namespace() -> Way:
    held: dict[str, Any] = {"parts": types.SimpleNamespace(net=nn.Linear(3, 3))}

    def f(x: Tensor) -> Tensor:
        return held["parts"].net(x)

    yield f
    held["parts"].net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    yield f
