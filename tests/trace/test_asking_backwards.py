"""Backwards that ask about values, of functions that ask too, under gradients from outside."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from tests.call.paths import batch
from tests.same import assert_same


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Samples of a path that is too rare are looped, which is no matter here."""
    shardmap.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
        yield


class Clipped(torch.autograd.Function):
    """A square whose gradient is halved if it is large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        out = 2 * grads[0] * x
        return out * 0.5 if out.abs().max() > 1 else out


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "on one path": lambda r: Clipped.apply(r) if r[0] > 0 else r,
    "on both": lambda r: Clipped.apply(Clipped.apply(r)) if r[0] > 0 else Clipped.apply(r.sin()),
    "after": lambda r: Clipped.apply(r) * (1 if r[0] > 0 else 2),
    "without": lambda r: Clipped.apply(r),
}

OPTIONS: list[dict[str, Any]] = [{}, {"chunk_size": 3}, {"trace": "once"}, {"max_paths": 1}]


def gradients(run: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The gradient of the sum."""
    x = rows.clone().requires_grad_()
    return torch.autograd.grad(run(x).sum(), x)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_gradients_of_samples_that_answer_alike_behind(
    name: str, options: dict[str, Any], scale: float
) -> None:
    function = FUNCTIONS[name]
    mapped = shardmap.vmap(function, **options)
    for size in (1, 3, 13, 139):
        x = scale * batch(size).sign() * (1 + batch(size).abs())
        if name == "on both":
            x = x / scale * 0.01
        want = gradients(lambda t: torch.stack([function(r) for r in t]), x)
        assert_same(gradients(mapped, x), want, f"{name}, {size}")


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"trace": "once"}], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_samples_that_answer_otherwise_are_refused(name: str, options: dict[str, Any]) -> None:
    """No gradient is another than the loop's."""
    mapped = shardmap.vmap(FUNCTIONS[name], strict=True, **options)
    with pytest.raises(errors.VariesError, match="in a backward .*take the gradient inside"):
        gradients(mapped, batch(139))

    def gradient(r: torch.Tensor) -> torch.Tensor:  # the remedy
        return gradients(FUNCTIONS[name], r.detach())

    x = batch(139)
    want = torch.stack([gradient(r) for r in x])
    assert_same(shardmap.vmap(gradient, **options)(x), want, f"{name}, inside")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["on one path", "after"])
def test_looped_samples_may_answer_otherwise(name: str, options: dict[str, Any]) -> None:
    function, x = FUNCTIONS[name], batch(13)
    want = gradients(lambda t: torch.stack([function(r) for r in t]), x)
    assert_same(gradients(shardmap.vmap(function, **options), x), want, name)
