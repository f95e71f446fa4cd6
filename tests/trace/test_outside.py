"""Tensors that are computed from a sample where no operator call is seen."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap.errors import VariesError
from tests.trace.ways import WAYS

WEIGHT = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
POOL = ThreadPoolExecutor(1)


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    shardmap.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
        yield


def of_a_pool(x: Tensor, y: Tensor) -> Tensor:
    return POOL.submit(lambda: (x * WEIGHT).sin().sum()).result() + y.sum()


def of_a_new_pool(x: Tensor, y: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: (x * WEIGHT).sin()).result() * y


def of_a_thread(x: Tensor, y: Tensor) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append((x * WEIGHT).sin()))
    thread.start()
    thread.join()
    return found[0].sum() * y.sum()


def of_what_was_computed(x: Tensor, y: Tensor) -> Tensor:
    doubled = x * WEIGHT
    return POOL.submit(torch.sin, doubled).result() + y


def of_another_argument(x: Tensor, y: Tensor) -> Tensor:
    return x * POOL.submit(torch.exp, y).result() * WEIGHT


FUNCTIONS: list[Callable[..., Tensor]] = [
    of_a_pool,
    of_a_new_pool,
    of_a_thread,
    of_what_was_computed,
    of_another_argument,
]
ROWS = {
    "one": ([0], [0]),
    "two": ([0, 1], [1, 2]),
    "all alike": ([0, 0, 0], [1, 1, 1]),
    "ends alike": ([0, 1, 0], [1, 2, 1]),
    "ends of one argument alike": ([0, 1, 2, 3], [1, 0, 2, 1]),
    "one argument alike": ([0, 1, 2, 3], [1, 1, 1, 1]),
    "several": ([0, 1, 2, 3, 0], [2, 1, 0, 3, 3]),
}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_and_gradients_are_those_of_the_loop(
    function: Callable[..., Tensor], rows: str, way: dict[str, Any]
) -> None:
    first, second = ROWS[rows]
    mapped = shardmap.vmap(function, **way)
    for grad in (True, True, False, True, True):
        x, y = (torch.randn(4, 3)[r].clone().requires_grad_(grad) for r in (first, second))
        expected = torch.stack([function(*row) for row in zip(x, y, strict=True)])
        found = mapped(x, y)
        torch.testing.assert_close(found, expected)
        if grad:
            wanted = torch.autograd.grad(expected.square().sum(), (x, y, WEIGHT))
            got = torch.autograd.grad(found.square().sum(), (x, y, WEIGHT))
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_call_whose_rows_are_alike_says_nothing_about_later_ones(
    function: Callable[..., Tensor], trace: Any
) -> None:
    mapped = shardmap.vmap(function, trace=trace)
    rows = [([0, 0, 0], [1, 1, 1]), ([0, 1, 0], [1, 1, 1]), ([0, 1, 0], [1, 2, 1])]
    with torch.no_grad():
        for first, second in [rows[0], *rows, *rows]:
            x, y = torch.randn(4, 3)[first], torch.randn(4, 3)[second]
            expected = torch.stack([function(*row) for row in zip(x, y, strict=True)])
            torch.testing.assert_close(mapped(x, y), expected)


def test_the_warning_and_the_refusal_say_it_and_the_remedy_is_batched() -> None:
    x = torch.randn(1, 3, requires_grad=True)
    with pytest.warns(shardmap.SlowLoopWarning, match="such as in another thread, so the function"):
        shardmap.vmap(of_a_pool)(x, x)
    with pytest.raises(VariesError, match="use torch's operators for it"):
        shardmap.vmap(of_a_pool, strict=True)(x, x)
    found = shardmap.vmap(lambda x, y: (x * WEIGHT).sin().sum() + y.sum(), strict=True)(x, x)
    torch.testing.assert_close(found, torch.stack([of_a_pool(x[0], x[0])]))


def test_a_weight_with_a_history_is_captured_as_ever() -> None:
    """Its history does not lead to the sample."""
    weight = (WEIGHT * 2).sin()
    x = torch.randn(5, 3, requires_grad=True)
    found = shardmap.vmap(lambda row: (row * weight).exp(), strict=True)(x)
    expected = (x * weight).exp()
    torch.testing.assert_close(found, expected)
    got = torch.autograd.grad(found.sum(), (x, WEIGHT), retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), (x, WEIGHT)))
