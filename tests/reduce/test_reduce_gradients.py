"""Gradients from outside through reduced outputs, and reductions inside other maps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from tests import oracle
from tests.reduce.expected import CHUNKS, DEVICES, batch_of, reduced


def stacked_then(name: str) -> oracle.Subject:
    """The loop, its results reduced by torch."""

    def subject(func: Callable[..., Any], in_dims: Any = 0, **options: Any) -> Callable[..., Any]:
        return lambda *batch: pytree.tree_map(
            lambda t: reduced(name, t), oracle.loop(func, in_dims)(*batch)
        )

    return subject


@pytest.mark.parametrize("name", ["sum", "mean"])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("devices", DEVICES)
def test_gradients_through_sum_and_mean_equal_the_loops(
    name: str, remat: bool, chunk_size: Any, devices: Any
) -> None:
    """To the inputs and to what is captured, twice differentiated."""

    def build() -> oracle.Setting:
        batch, weight = (
            batch_of(torch.float64, 7, 3).requires_grad_(),
            batch_of(torch.float64, 3, 2, seed=2).requires_grad_(),
        )

        def function(x: torch.Tensor) -> Any:
            return (x @ weight).sin(), weight.exp(), x.square().sum()

        options = {"reduce": name, "remat": remat, "chunk_size": chunk_size, "devices": devices}
        return oracle.Setting(lambda vmap: vmap(function, **options)(batch), [batch], [weight])

    verdict = oracle.compare(
        build,
        shardmap.vmap,
        oracle.Checks(second_order=True, refusals=()),
        reference=stacked_then(name),
    )
    assert (verdict.kind, verdict.gradient) == ("right", "second"), verdict.detail


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gradients_through_a_fold_equal_the_loops(chunk_size: Any) -> None:
    def build() -> oracle.Setting:
        batch = batch_of(torch.float64, 7, 3, 3).requires_grad_()

        def run(vmap: oracle.Subject) -> Any:
            if vmap is shardmap.vmap:
                return vmap(torch.sin, reduce=(torch.matmul, torch.cos), chunk_size=chunk_size)(
                    batch
                )
            return functools.reduce(torch.matmul, vmap(torch.sin)(batch).unbind(0)).cos()

        return oracle.Setting(run, [batch])

    verdict = oracle.compare(build, shardmap.vmap, oracle.Checks(refusals=()))
    assert (verdict.kind, verdict.gradient) == ("right", "first"), verdict.detail


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_through_narrow_sums(dtype: torch.dtype) -> None:
    batch = batch_of(dtype, 101, 3).requires_grad_()
    out = shardmap.vmap(torch.square, reduce="sum", chunk_size=10)(batch)
    assert out.dtype == dtype
    oracle.assert_same(torch.autograd.grad(out.sum(), batch)[0], (2 * batch).detach(), "gradient")


@pytest.mark.parametrize("name", ["max", "min"])
def test_gradients_through_max_and_min_are_refused(name: str) -> None:
    batch = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(errors.OptionError, match=rf"shardmap.vmap\(exp.*reduce='{name}'.*no_grad"):
        shardmap.vmap(torch.exp, reduce=name)(batch)
    with torch.no_grad():
        oracle.assert_same(shardmap.vmap(torch.exp, reduce=name)(batch), batch[0].exp(), name)
    oracle.assert_same(
        shardmap.vmap(lambda x: x.detach().exp(), reduce=name)(batch), batch[0].detach().exp(), name
    )


def test_reductions_inside_another_map_and_a_transform() -> None:
    batch = batch_of(torch.float64, 5, 4, 3)
    inner = shardmap.vmap(lambda x: x.sin(), reduce="sum")
    oracle.assert_same(shardmap.vmap(inner)(batch), batch.sin().sum(1), "nested")
    oracle.assert_same(
        shardmap.vmap(inner, reduce="mean", chunk_size=2)(batch),
        batch.sin().sum(1).mean(0),
        "nested and reduced",
    )
    oracle.assert_same(
        torch.func.grad(lambda t: inner(t).sum())(batch[0]), batch[0].cos(), "transformed"
    )
