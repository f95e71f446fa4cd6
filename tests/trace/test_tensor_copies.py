"""`copy.copy` and `copy.deepcopy` of tensors, and exchanged tensors, as in the loop."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardmap
from shardmap.errors import EscapeError
from tests import oracle
from tests.trace.ways import WAYS

WEIGHT = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
LAYER = nn.Linear(3, 3)


def written_through_a_copy(x: Tensor) -> Tensor:
    doubled = x * 2
    copy.copy(doubled.detach()).add_(1)
    other = copy.copy(doubled.detach())
    other[0] = 7
    return doubled * x


def of_the_argument(x: Tensor) -> Any:
    return copy.copy(x) * x, copy.copy(x)


def of_a_view(x: Tensor) -> Tensor:
    return copy.copy((x * 2).view(3, 1).expand(3, 2)[1:]).exp() * x[0]


def of_a_parameter(x: Tensor) -> Tensor:
    return copy.copy(WEIGHT) * x * WEIGHT


def of_a_module(x: Tensor) -> Tensor:
    return copy.copy(LAYER)(x)


def of_a_container(x: Tensor) -> Tensor:
    found = copy.copy({"a": x, "b": [x * 2]})
    return found["a"] * found["b"][0]


def with_an_attribute(x: Tensor) -> Tensor:
    doubled: Any = x * 2
    doubled.scale = 3
    found = copy.copy(doubled)
    return found * found.scale * x


def differentiated(x: Tensor) -> Tensor:
    leaf = copy.copy(x.detach()).requires_grad_()
    return torch.autograd.grad((leaf * x).sin().sum(), leaf)[0]


def deep_copies_of_leaves(x: Tensor) -> Tensor:
    return copy.deepcopy(x.detach()) * x + copy.deepcopy({"w": WEIGHT})["w"]


COPIED: list[Callable[[Tensor], Any]] = [
    written_through_a_copy,
    of_the_argument,
    of_a_view,
    of_a_parameter,
    of_a_module,
    of_a_container,
    with_an_attribute,
    differentiated,
    deep_copies_of_leaves,
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("function", COPIED)
def test_copies_are_those_of_the_loop(
    function: Callable[[Tensor], Any], grad: bool, way: dict[str, Any]
) -> None:
    mapped = shardmap.vmap(function, **way)
    for _ in range(4):
        x = torch.randn(5, 3, requires_grad=grad)
        expected, found = oracle.loop(function)(x), mapped(x)
        pairs = zip(*[v if isinstance(v, tuple) else (v,) for v in (expected, found)], strict=True)
        for wanted, got in pairs:
            assert wanted.requires_grad == got.requires_grad
            torch.testing.assert_close(got, wanted)
            if wanted.requires_grad and grad:
                losses = [t.square().sum() for t in (wanted, got)]
                of = [torch.autograd.grad(loss, x, allow_unused=True)[0] for loss in losses]
                torch.testing.assert_close(of[1], of[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: copy.deepcopy(x) * 2,
        lambda x: copy.deepcopy(x * 2),
        lambda x: copy.copy(x).mul_(2),
    ],
)
def test_the_loops_errors_are_the_maps(function: Callable[[Tensor], Tensor]) -> None:
    """Of a deep copy of what is no leaf, and of a copy of such, which is a leaf."""
    x = torch.randn(3, 3, requires_grad=True)
    with pytest.raises(RuntimeError) as wanted:
        function(x[0])
    for trace in ("auto", "once", "each"):
        with pytest.raises(RuntimeError) as found:
            shardmap.vmap(function, trace=trace)(x)
        assert type(found.value) is type(wanted.value)
        assert str(found.value) == str(wanted.value)
    plain = x.detach()
    torch.testing.assert_close(shardmap.vmap(function)(plain.clone()), plain * 2)


def test_pickling_is_refused_as_ever() -> None:
    with pytest.raises(EscapeError, match="cannot be recorded"):
        shardmap.vmap(lambda x: pickle.loads(pickle.dumps(x * 2)))(torch.randn(3, 3))


def exchanged(x: Tensor) -> Tensor:
    a, b = x * 2, x + 1
    torch.utils.swap_tensors(a, b)
    return a * 3 + b


def exchanged_names(x: Tensor) -> Tensor:
    a, b = x * 2, x + 1
    a, b = b, a
    return a * 3 + b


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def exchanged_in_a_module(x: Tensor, swap: bool) -> Tensor:
    layer, weight = Scaled(), nn.Parameter(torch.ones(3))
    if swap:
        torch.utils.swap_tensors(layer.weight, weight)
    else:
        layer.weight = weight
    return layer(x)


def test_exchanged_tensors_are_refused_by_name_and_the_remedies_work() -> None:
    x = torch.randn(5, 3)
    expected = torch.stack([exchanged(row) for row in x])
    for trace in ("auto", "once", "each"):
        with pytest.raises(EscapeError, match=r"swap_tensors .*a, b = b, a.*module\.weight = "):
            shardmap.vmap(exchanged, trace=trace)(x)
        for _ in range(4):
            found = shardmap.vmap(exchanged_names, trace=trace, chunk_size=2)(x)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
def test_parameters_of_a_module_are_exchanged(trace: Any) -> None:
    """By its attributes; and by the function where no operator has seen them yet."""
    x = torch.randn(5, 3)
    for swap in (False, True):
        mapped = shardmap.vmap(lambda row, swap=swap: exchanged_in_a_module(row, swap), trace=trace)
        for _ in range(4):
            torch.testing.assert_close(mapped(x), x)
