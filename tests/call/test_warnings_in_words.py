"""Warnings and errors about calls are sentences of a few lines, in words."""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap.call.routes import last_asked
from shardmap.call.spread import Spread
from shardmap.trace.recording import UNKNOWN

LONGEST = 900
"""Most characters of a message; the serialised program of a backward alone has more."""


class Repeated(torch.autograd.Function):
    """A Function whose backward makes as many calls as it is told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> Tensor:
        ctx.times = times
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        for _ in range(ctx.times):
            g = g.sin()
        return g, None


def changing() -> Callable[[Tensor], Tensor]:
    """A function whose backward is another one each time."""
    count = itertools.count(8)
    return lambda x: Repeated.apply(x, next(count)).cos()


def listing() -> Callable[[Tensor], Tensor]:
    """A function that stacks another number of tensors each time."""
    count = itertools.count(80)
    return lambda x: torch.stack([x] * next(count)).sum(0)


def said(func: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> str:
    """All that the call warns of, and its error."""
    shardmap.clear_caches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            shardmap.vmap(func, **options)(x)
        except shardmap.errors.ShardmapError as error:
            return "\n".join([*(str(w.message) for w in caught), str(error)])
    return "\n".join(str(w.message) for w in caught)


@pytest.mark.parametrize("options", [{}, {"trace": "once"}, {"chunk_size": 2}], ids=str)
def test_a_backward_of_the_functions_own(options: dict[str, Any]) -> None:
    """Its program is not printed."""
    text = said(changing(), torch.randn(7, 3, requires_grad=True), **options)
    assert "a backward of the function's own computes something else" in text
    assert "own_backward" not in text
    assert len(text) < LONGEST


def test_a_long_call() -> None:
    """A list of many tensors is cut."""
    text = said(listing(), torch.randn(7, 3))
    assert "stack" in text
    assert len(text) < LONGEST


def selected(row: Tensor) -> Tensor:
    """As many elements as the sample has above a bound of its own."""
    values = torch.linspace(-1, 1, 200)
    return row * values[values > row[0]].sum()


def numbers(row: Tensor) -> Tensor:
    return row * row.sum().item()


@pytest.mark.parametrize("func", [selected, numbers])
@pytest.mark.parametrize("options", [{}, {"max_paths": 2, "trace": "once"}], ids=str)
def test_the_users_line(func: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    """Of a number that python asked for, and of a shape that depends on values."""
    text = said(func, torch.randn(100, 3), **options)
    assert f"(the last at {__file__}:{func.__code__.co_firstlineno + 1}" in text or (
        f"(the last at {__file__}:{func.__code__.co_firstlineno + 3}" in text
    )
    assert "known" not in text


def test_a_line_that_is_in_no_file_is_left_out() -> None:
    """A recording may hold none."""
    equation = types.SimpleNamespace(source=UNKNOWN, op=torch.ops.aten.nonzero.default)
    program = types.SimpleNamespace(equations=[equation])
    recording: Any = types.SimpleNamespace(program=program, asked=(0,), sources={})
    assert last_asked(recording) == ""


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["a"], "one sample was tried, and gave answers to what python asks"),
        (["a"] * 6, "6 samples that were tried gave the same answers to what python asks"),
        (["a", "b"], "2 samples that were tried gave 2 different sequences of answers to what"),
    ],
)
def test_one_and_many(given: list[str], text: str) -> None:
    """One sample, one sequence of answers, several."""
    spread = Spread()
    spread.look([(answer,) for answer in given], 3, 8, 64)
    assert spread.too_few(" (the last at a.py:1)").startswith(text)
