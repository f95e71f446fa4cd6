"""Dictionaries whose keys come in another order for some samples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from tests.call.ways import WAYS
from tests.same import assert_same

Tensor = torch.Tensor


def loop(function: Callable[[Tensor], Any], batch: Any) -> Any:
    results = [function(r) for r in batch]
    return pytree.tree_map(
        lambda *rows: rows[0] if rows[0] is None else torch.stack(rows), results[0], *results[1:]
    )


def by_branch(r: Tensor) -> dict[str, Tensor]:
    if r.sum() > 0:
        return {"a": r, "b": r.sum()}
    return {"b": r.sum() * 3, "a": r.cos()}


def nested(r: Tensor) -> dict[str, Any]:
    if r.sum() > 0:
        return {"a": (r, {"x": r * 2, "y": r.sum()}), "b": None}
    return {"b": None, "a": (r * 5, {"y": r.sum() * 7, "x": r.sin()})}


def ordered(r: Tensor) -> OrderedDict[str, Tensor]:
    if r.sum() > 0:
        return OrderedDict(a=r, b=r * 2)
    return OrderedDict(b=r * 3, a=r * 4)


def by_a_door(r: Tensor) -> dict[str, Tensor]:
    if float(repr(r.sum())[7:-1]) > 0:
        return {"a": r, "b": r.sum()}
    return {"b": r.sum() * 3, "a": r.cos()}


def compare(got: Any, wanted: Any, what: str) -> None:
    """The same structure, in the order of the first sample's keys, and the same values."""
    leaves, structure = pytree.tree_flatten(got)
    expected, of_loop = pytree.tree_flatten(wanted)
    assert structure == of_loop
    for g, w in zip(leaves, expected, strict=True):
        if w is None:
            assert g is None
        else:
            assert_same(g, w, what)


FUNCTIONS = [by_branch, nested, ordered]


@pytest.fixture(autouse=True)
def _functions_are_new() -> None:
    shardmap.clear_caches()


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 3, 7, 211])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_results_are_those_of_the_loop(
    function: Callable[[Tensor], Any], size: int, way: str
) -> None:
    mapped = shardmap.vmap(function, **WAYS[way])
    for seed in range(3):
        torch.manual_seed(seed)
        batch = torch.randn(size, 3)
        compare(mapped(batch), loop(function, batch), way)


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 3, 7])
def test_an_order_by_what_python_reads(size: int, way: str) -> None:
    mapped = shardmap.vmap(by_a_door, **WAYS[way])
    batch = torch.linspace(1, -1.5, size).view(-1, 1) * torch.tensor([1.0, 2.0, 3.0])
    for rows in (batch, batch.flip(0), batch):  # the first and the last sample differ
        compare(mapped(rows), loop(by_a_door, rows), way)


@pytest.mark.parametrize("way", WAYS)
def test_an_order_that_depends_on_the_shape(way: str) -> None:
    def function(r: Tensor) -> dict[str, Tensor]:
        if r.shape[0] > 2:
            return {"a": r.sum(), "b": r.max()}
        return {"b": r.max() * 2, "a": r.sum().cos()}

    mapped = shardmap.vmap(function, **WAYS[way])
    for seed in range(3):
        torch.manual_seed(seed)
        rows = [torch.randn(n) for n in (2, 3, 5, 2, 3, 1, 2)]
        got, wanted = mapped(shardmap.Ragged(rows)), loop(function, rows)
        assert list(got) == list(wanted) == ["b", "a"]
        for key, value in wanted.items():
            assert_same(got[key], value, f"{key} {way}")


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("size", [3, 7, 211])
def test_results_of_unequal_shapes(size: int) -> None:
    def function(r: Tensor) -> dict[str, Tensor]:
        if r.sum() > 0:
            return {"a": r[r > 0], "b": r}
        return {"b": r * 3, "a": r[r > 0.5]}

    torch.manual_seed(1)
    batch = torch.randn(size, 3)
    got = shardmap.vmap(function, ragged="list")(batch)
    wanted = [function(r) for r in batch]
    assert list(got) == list(wanted[0])
    for k, of_sample in enumerate(wanted):
        for key, value in of_sample.items():
            assert_same(got[key][k], value, f"{key} of {k}")


def test_gradients_and_reductions() -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 3, dtype=torch.float64, requires_grad=True)
    got = shardmap.vmap(by_branch, reduce={"a": "sum", "b": "mean"})(batch)
    wanted = loop(by_branch, batch)
    assert_same(got["a"], wanted["a"].sum(0), "a")
    assert_same(got["b"], wanted["b"].mean(0), "b")
    (g,) = torch.autograd.grad(got["a"].sum() + got["b"], batch)
    (w,) = torch.autograd.grad(wanted["a"].sum() + wanted["b"].mean(), batch)
    assert_same(g, w, "gradient")


def test_other_keys_are_refused_still() -> None:
    def function(r: Tensor) -> dict[str, Tensor]:
        return {"a": r, "b": r} if r.sum() > 0 else {"a": r, "c": r}

    batch = torch.tensor([[1.0], [-1.0]]).repeat(50, 1)
    with pytest.raises(errors.VariesError, match="return one structure for all samples"):
        shardmap.vmap(function)(batch)
