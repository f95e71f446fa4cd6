"""Writes of the caller's to what a map has returned, under gradients from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from tests.loop import loop
from tests.same import assert_same
from tests.trace import own_functions as own
from tests.trace.test_own_backwards import WAYS, M, W, batch

Tensor = torch.Tensor


def two_of_one_memory(r: Tensor) -> tuple[Tensor, Tensor]:
    h = (r * W).exp()
    return h.view(3, 1), (h * W).sum()


def its_argument_is_saved(r: Tensor) -> tuple[Tensor, Tensor]:
    h = r + W
    return h, h.sin()


def a_detached_part(r: Tensor) -> tuple[Tensor, Tensor]:
    h = r * W
    return h.detach()[1:], h * W


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "exp": lambda r: (r * W).exp(),
    "softmax": lambda r: (r * W).softmax(0),
    "norm": lambda r: (r * W).norm(),
    "linear": lambda r: M @ r,
    "rectified": lambda r: (M @ r).relu(),
    "a Function": lambda r: own.Exp.apply(r * W),
    "two of one memory": two_of_one_memory,
    "its argument is saved": its_argument_is_saved,
    "a detached part": a_detached_part,
}


def written(outs: Any) -> tuple[Tensor, ...]:
    outs = outs if isinstance(outs, tuple) else (outs,)
    for out in outs:
        with torch.set_grad_enabled(out.requires_grad):
            out.mul_(2).add_(1)
    return outs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_may_be_written_before_their_gradient_is_taken(name: str, way: str) -> None:
    for rows, grad in ((5, True), (3, False), (1, True)):
        x = batch(rows, grad)
        ins = [W, M, *([x] if grad else [])]
        found = []
        for mapped in (loop(FUNCTIONS[name]), shardmap.vmap(FUNCTIONS[name], **WAYS[way])):
            outs = written(mapped(x))
            total = sum(t.sin().sum() for t in outs if t.requires_grad)
            assert isinstance(total, Tensor)
            first = torch.autograd.grad(total, ins, create_graph=True, materialize_grads=True)
            second = torch.autograd.grad(
                torch.stack([g.square().sum() for g in first]).sum(), ins, materialize_grads=True
            )
            found.append([*outs, *first, *second])
        for k, (want, got) in enumerate(zip(*found, strict=True)):
            assert_same(got, want, f"{name}, {rows} rows, tensor {k}")


def test_results_may_be_written_under_transforms() -> None:
    x = batch(5, False)

    def total(mapped: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda w: mapped(lambda r: (r * w).exp())(x).mul_(2).sin().sum()

    w = W.detach()
    got, want = (torch.func.grad(total(m))(w) for m in (shardmap.vmap, loop))
    assert_same(got, want, "torch.func.grad")
