"""Samples whose outputs are of unlike dtypes: what `torch.stack` of the loop makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from tests import oracle
from tests.call.paths import batch

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("paths_pay_early")

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 3": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 7},
    "once": {"trace": "once"},
    "off": {"check": "off"},
    "one by one": {"max_paths": 1},
    "one by one in lanes": {"max_paths": 1, "devices": ["cpu", "cpu"], "chunk_size": 3},
}

FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "float, int64": lambda r: r if r.sum() > 0 else r.long(),
    "int64, float": lambda r: r.long() if r.sum() > 0 else r,
    "double, float": lambda r: r.double() if r.sum() > 0 else r,
    "bool, half": lambda r: (r > 0) if r.sum() > 0 else r.half(),
    "complex, float": lambda r: r.to(torch.complex64) if r.sum() > 0 else r,
    "bfloat16, half": lambda r: r.bfloat16() if r.sum() > 0 else r.half(),
    "numbers": lambda r: r.sum().item() if r.sum() > 0 else 3,
    "three": lambda r: r.double() if r[0] > 0 else r.long() if r[1] > 0 else r.half(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_torch_stack_promotes(name: str, way: str) -> None:
    function, mapped = FUNCTIONS[name], shardmap.vmap(FUNCTIONS[name], **WAYS[way])
    for x in (batch(61), batch(61).flip(0)):
        want = torch.stack([torch.as_tensor(function(r)) for r in x])
        oracle.assert_same(mapped(x), want, name)


@pytest.mark.parametrize("way", ["chunk 3", "one by one"])
def test_reduced(way: str) -> None:
    x, function = batch(61), FUNCTIONS["int64, float"]
    want = torch.stack([function(r) for r in x])
    assert want.dtype == torch.float32
    torch.testing.assert_close(shardmap.vmap(function, reduce="sum", **WAYS[way])(x), want.sum(0))


@pytest.mark.parametrize("way", ["plain", "one by one"])
def test_gradients(way: str) -> None:
    function, found = FUNCTIONS["double, float"], []
    for run in (shardmap.vmap(function, **WAYS[way]),
                lambda t: torch.stack([function(r) for r in t])):  # fmt: skip
        x = batch(61).requires_grad_()
        found.append(torch.autograd.grad(run(x).sin().sum(), x)[0])
    oracle.assert_same(found[0], found[1], "gradient")


def test_a_store_is_not_made_anew(tmp_path: Any) -> None:
    """It is refused in words, and the remedy works."""
    x = torch.cat([torch.ones(1, 3), batch(61)])
    options: dict[str, Any] = {"max_paths": 1, "chunk_size": 7}
    function = lambda r: r if r.sum() > 0 else r.double() * 2
    with pytest.raises(errors.VariesError, match="return one dtype for all samples"):
        shardmap.vmap(function, out=shardmap.MemmapSink(tmp_path / "a"), **options)(x)
    same = lambda r: function(r).double()
    store = shardmap.vmap(same, out=shardmap.MemmapSink(tmp_path / "b"), **options)(x)
    oracle.assert_same(store.read("result", 0, 62), torch.stack([same(r) for r in x]), "stored")


@pytest.mark.parametrize("way", WAYS)
def test_minus_zero_is_another_answer_than_zero(way: str) -> None:
    def function(r: Tensor) -> Tensor:
        return r + math.copysign(1.0, r[0].item())

    x = batch(61).round()
    x[::2, 0], x[1::4, 0] = 0.0, -0.0
    options: dict[str, Any] = WAYS[way] | (
        {"max_paths": 100} if "max_paths" not in WAYS[way] else {}
    )
    mapped = shardmap.vmap(function, **options)
    want = torch.stack([function(r) for r in x])
    for _ in range(2):
        oracle.assert_same(mapped(x), want, "result")


def test_minus_zero_where_only_it_differs() -> None:
    function = lambda r: r + math.copysign(1.0, r[0].item())
    for first in (0.0, -0.0):
        x = torch.full((20, 3), first)
        x[7, 0] = -first
        x[:, 1] = torch.arange(20)
        oracle.assert_same(
            shardmap.vmap(function)(x), torch.stack([function(r) for r in x]), "result"
        )
