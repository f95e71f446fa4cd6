"""Tests of replayed tensors in autograd: histories by writes, fresh leaves, tangents of outputs.

Each case is a small form of a program that the differential fuzzer found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import shardmap
from tests.loop import loop

N = 5
PATHS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 3},
    {"devices": ["cpu", "cpu"]},
    {"trace": "once"},
]


def compare(
    function: Callable[..., torch.Tensor],
    batch: Callable[[], list[torch.Tensor]],
    wrt: list[torch.Tensor],
    options: dict[str, Any],
) -> None:
    """Values, `requires_grad` and gradients of every sample, by the loop and by the map."""
    want = loop(function)(*batch())
    got = shardmap.vmap(function, **options)(*batch())
    torch.testing.assert_close(got, want)
    assert got.requires_grad == want.requires_grad
    if not wrt:
        return
    weights = torch.linspace(0.5, 1.5, want.numel(), dtype=want.dtype).view(want.shape)
    found = [
        torch.autograd.grad((out * weights).sum(), wrt, allow_unused=True) for out in (got, want)
    ]
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


def matrices(rows: int = 3, columns: int = 4) -> list[torch.Tensor]:
    return [torch.randn(N, rows, columns, generator=torch.Generator().manual_seed(7))]


@pytest.mark.parametrize("options", PATHS)
def test_a_view_written_after_another_view_brought_gradients(options: dict[str, Any]) -> None:
    """The map drops the dead `cumsum`, which is where autograd asks for the view's history."""
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        square = x @ x.mT
        view = square[..., None]
        square[-1] = scale
        view.cumsum(-2)
        view *= 2
        return view

    compare(function, matrices, [scale], options)


def test_a_view_written_after_another_view_under_transforms() -> None:
    scale = torch.tensor(2.0)

    def function(x: torch.Tensor) -> torch.Tensor:
        square = x @ x.mT
        view = square[..., None]
        square[-1] = x[0, 0] * scale
        view.cumsum(-2)
        view *= 2
        return view

    (x,) = matrices()
    for transform in (torch.func.vjp, _jvp):
        got, want = (transform(m(function), x) for m in (shardmap.vmap, loop))
        torch.testing.assert_close(got[0], want[0])
        if transform is _jvp:
            torch.testing.assert_close(got[1], want[1])
        else:
            weights = want[0].detach().cos()
            torch.testing.assert_close(got[1](weights), want[1](weights))


def _jvp(function: Callable[..., torch.Tensor], x: torch.Tensor) -> Any:
    return torch.func.jvp(function, (x,), (x.cos(),))


@pytest.mark.parametrize("options", PATHS)
def test_an_integer_tensor_filled_with_what_requires_grad(options: dict[str, Any]) -> None:
    """Torch lets it require grad; its backward fails an internal assertion, so only the flag."""
    scale = torch.tensor(2.0, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        counts = x.long()
        counts[-1] = scale.tanh()
        return torch.maximum(counts, torch.tensor(0.1))

    compare(function, matrices, [], options)


@pytest.mark.parametrize("options", PATHS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_without_grad_that_is_written_with_it(rows: int, options: dict[str, Any]) -> None:
    """`x @ m` of a vector squeezes its result in place, which makes no view."""
    scale = torch.tensor(2.0, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            product = x[0] @ x.mT
        product.mul_(scale)
        return product + x.sum()

    compare(function, lambda: matrices(rows), [scale], options)


@pytest.mark.parametrize("options", PATHS)
@pytest.mark.parametrize("how", ["index_select", "take_along", "diagonal", "cumulative"])
def test_memory_that_is_read_and_written_later(how: str, options: dict[str, Any]) -> None:
    """A rule may serve a call by others, whose backward keeps what the call's own does not."""
    weight = torch.randn(N, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    at = torch.arange(N).view(N, 1) % 4

    def function(x: torch.Tensor, w: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        shifted = x - w
        if how == "index_select":
            read = shifted.index_select(-1, i)
        elif how == "take_along":
            read = shifted.index_fill(-1, i, 0.5)
        elif how == "diagonal":
            read = shifted.diagonal().clone().flip(0)
        else:
            read = shifted.cumsum(-1).roll(1, 0)
        shifted.masked_fill_(shifted > 0, 0.25)
        return read.sum() + shifted.sum()

    compare(function, lambda: [*matrices(), weight, at], [weight], options)


@pytest.mark.parametrize("options", PATHS)
def test_a_fresh_leaf_that_only_transforms_read(options: dict[str, Any]) -> None:
    """`torch.func.hessian` reads the leaf by an alias; outputs require grad all the same."""

    def function(x: torch.Tensor) -> torch.Tensor:
        leaf = x[0].detach().clone().requires_grad_()
        second = torch.func.hessian(lambda t: (t**3).sum())(leaf)
        return F.layer_norm(second, (4,))

    compare(function, matrices, [], options)


def forward(function: Callable[..., Any], *primals: torch.Tensor) -> Any:
    """Primals and tangents of the results."""
    return torch.func.jvp(function, primals, tuple(p.cos() for p in primals))


@pytest.mark.parametrize("size", [1, 3])
def test_tangents_of_outputs_have_memory_of_their_own(size: int) -> None:
    """The tangent of `v % 3` is that of `v`, and of `x + 1` the argument's own."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        v = x.sin()
        return v % 3, v, x + 1, v.view(-1)

    x = torch.randn(size, 2, 2, generator=torch.Generator().manual_seed(1))
    tangent = x.cos()
    for m in (loop, shardmap.vmap):
        primals, tangents = torch.func.jvp(m(function), (x,), (tangent,))
        addresses = [t.untyped_storage().data_ptr() for t in (*primals, *tangents, tangent)]
        assert len(set(addresses)) == len(addresses), m
    for got, want in zip(
        forward(shardmap.vmap(function), x), forward(loop(function), x), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", PATHS)
@pytest.mark.parametrize("viewed", ["before", "after", "base", "through", "without"])
def test_a_view_of_everything_that_is_written(viewed: str, options: dict[str, Any]) -> None:
    """`x[..., :]` is an alias; its base, and what was made of it before, keep their histories."""
    scale = torch.tensor(2.0, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        total = (x * scale).sum(0, keepdim=True)
        if viewed == "without":
            with torch.no_grad():
                total[..., :].mul_(3)
            return total * scale
        view = total[..., :]
        if viewed == "before":
            made = view * 3  # its backward needs nothing that is written below
            view[..., 0] = 0.5
            return made + x
        if viewed == "base":
            view[..., 0].mul_(scale)
            return total.sin()
        if viewed == "through":
            total[..., 1].mul_(scale)
            return view.sin()
        view[..., 0] = 0.5
        return view.sin() + total.cos()

    compare(function, matrices, [scale], options)


@pytest.mark.parametrize("options", PATHS)
def test_a_written_view_of_everything_saved_for_a_backward(options: dict[str, Any]) -> None:
    """Both refuse the gradient: the result requires it, and what it needs is overwritten."""
    rows = torch.randn(N, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        total = x.sum(0, keepdim=True)
        view = total[..., :1]
        made = view.sin()
        view[..., 0] = 0.5
        return made

    for way in (loop(function), shardmap.vmap(function, **options)):
        out = way(rows)
        torch.testing.assert_close(out.detach(), rows.detach().sum(1, keepdim=True).sin())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), rows)


@pytest.mark.parametrize("options", PATHS)
def test_integers_that_a_gradient_was_written_into_are_written_again(
    options: dict[str, Any],
) -> None:
    """Torch lets a view of them require grad, and cannot say where its gradients would end."""
    scale = torch.tensor(2.0, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        counts = torch.stack([x.long(), x.long() + 1], -1)
        counts[-1, 0] = (scale * 3).sum()
        with torch.no_grad():
            counts.transpose(0, 1)[0].mul_(3)
        return counts.detach() + x.long()[..., None]

    compare(function, matrices, [], options)
