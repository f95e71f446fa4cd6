"""Views at an index that differs by sample, where the function writes one and reads the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from tests.trace.ways import WAYS

Tensor = torch.Tensor


def writes_the_view(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    """As evolutionary algorithms assign rows."""
    x = x.clone()
    x[i][:] = v
    return x


def returns_both(x: Tensor, i: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone()
    y = x[i]
    y.mul_(2)
    return x, y * v


def writes_a_part(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    x = x * 2
    x[i, 1:][0] = v[1]
    return x.sin()


def writes_the_source(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    x = x * 1
    row = x[i]
    x[i] = v  # row is a view of it
    return row.sum() + x.sum()


def adds_at_the_largest(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    y = x.sum(1) + i
    y[y.argmax()].add_(v.sum())
    return y


def another_view(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    a, b = x[i], x[(i + v[0].sign().long()) % 5]  # the same row, for some
    c = x[v[1].sign().long()]
    a.mul_(2)
    return b * v + c


def a_pivots_column(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    """What is divided by is divided as well, before the elements that follow."""
    x, j = x.exp(), i % 3
    x[:, j] /= x[i, j]
    return x * v


def swapped_by_views(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    """Python's exchange, which loses a row: both names are views."""
    x, j = x * 1, (i + 2) % 5
    x[i], x[j] = x[j], x[i]
    return x * v


def copied_and_added(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    """These are batched: the rows are the same, or share nothing."""
    x, j = x * 1, (i + v[0].sign().long()) % 5
    x[i] = x[j]
    x[j] += x[i]
    x[i] -= x[j] * v
    return x


def one_row_into_another(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    """These are batched: what is read is all of the row that is written, or none of it."""
    x, j = x * 1, i % 3
    x[i] = x[2]
    x[:, j] = x[:, 1]
    x[i, 1:] = x[3:4, 1:]
    x[i, j] = x[0, 1:2]
    x.t()[j] = x.t()[2:3]
    x[1:][i % 4] = x[0]
    x.detach()[i] = x[1].detach()
    return x * v


def swapped_with_the_first(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    """Python's exchange, of rows and of elements: which loses one, since both are views."""
    x, y = x * 1, x[:, 0] * 2
    x[i], x[0] = x[0], x[i]
    y[i], y[0] = y[0], y[i]
    return x * v + y.unsqueeze(1)


def some_of_it_is_read(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    """The column and the row share an element, which is written before it is read."""
    x = x[:3] * 1
    x[i % 3] = x[:, 0]
    return x * v


FUNCTIONS = [
    writes_the_view, returns_both, writes_a_part, writes_the_source, adds_at_the_largest,
    another_view, swapped_by_views, a_pivots_column, copied_and_added,
    one_row_into_another, swapped_with_the_first, some_of_it_is_read,
]  # fmt: skip
WITHOUT_GRADIENTS = [a_pivots_column, copied_and_added]
"""Autograd refuses them in the loop: what is divided by has been written since."""


def rows(function: Callable[..., Any], *batch: Tensor) -> tuple[Tensor, ...]:
    found = [function(*sample) for sample in zip(*batch, strict=True)]
    columns = zip(*found, strict=True) if isinstance(found[0], tuple) else [found]
    return tuple([torch.stack(list(column)) for column in columns])


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_write_reaches_the_other(function: Callable[..., Any], way: dict[str, Any]) -> None:
    mapped = shardmap.vmap(function, **way)
    for size in (1, 3, 7, 41, 41):
        generator = torch.Generator().manual_seed(size)
        x = torch.randn(size, 5, 3, dtype=torch.float64, generator=generator)
        v = torch.randn(size, 3, dtype=torch.float64, generator=generator)
        x.requires_grad_(function not in WITHOUT_GRADIENTS)
        v.requires_grad_(function not in WITHOUT_GRADIENTS)
        i = torch.randint(0, 5, (size,), generator=generator)
        found, wanted = mapped(x, i, v), rows(function, x, i, v)
        found = found if isinstance(found, tuple) else (found,)
        torch.testing.assert_close(found, wanted)
        if function in WITHOUT_GRADIENTS:
            continue
        wrt = [x, v]
        got = torch.autograd.grad(sum(t.cos().sum() for t in found), wrt)
        torch.testing.assert_close(
            got, torch.autograd.grad(sum(t.cos().sum() for t in wanted), wrt)
        )


def test_what_all_samples_share_is_not_written() -> None:
    shared = torch.zeros(5, 3)

    def function(i: Tensor) -> Tensor:
        shared[i][:] = 1
        return shared.sum()

    with pytest.raises(errors.CapturedWriteError, match="that all samples share"):
        shardmap.vmap(function)(torch.tensor([1, 3, 2]))
    assert not shared.any()


@pytest.mark.parametrize("way", WAYS)
def test_views_that_share_some_elements_are_refused_by_torch(way: dict[str, Any]) -> None:
    def function(x: Tensor, i: Tensor) -> Tensor:
        windows = x.clone().unfold(0, 3, 1)
        windows[i].sub_(windows[i + 1])
        return windows

    x, i = torch.randn(5, 9), torch.tensor([0, 3, 2, 5, 1])
    for call in (function, shardmap.vmap(function, **way)):
        batch = (x[0], i[0]) if call is function else (x, i)
        with pytest.raises(RuntimeError, match="refer to a single memory location"):
            call(*batch)


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_what_is_written_are_refused_by_torch(way: dict[str, Any]) -> None:
    def function(x: Tensor, i: Tensor) -> Tensor:
        x = x.clone()
        x[i, 1:] = x[2, :-1]
        return x

    x, i = torch.randn(5, 4, 4), torch.tensor([0, 3, 1, 0, 1])
    torch.testing.assert_close(shardmap.vmap(function, **way)(x, i), rows(function, x, i)[0])
    i[1] = 2
    for call in (lambda: function(x[1], i[1]), lambda: shardmap.vmap(function, **way)(x, i)):
        with pytest.raises(RuntimeError, match="refer to a single memory location"):
            call()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_indices_of_every_integer(dtype: torch.dtype, way: dict[str, Any]) -> None:
    def function(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        x, y = x.clone(), x * 2
        x[i] = 7
        y[i, 1:] += x[:2, i]
        return x, y, x[i] + y[:, i].sum()

    x = torch.randn(5, 3, 3, dtype=torch.float64)
    i = torch.tensor([0, 2, 1, 1, 0], dtype=dtype)
    torch.testing.assert_close(shardmap.vmap(function, **way)(x, i), rows(function, x, i))
