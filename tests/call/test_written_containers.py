"""Functions that write keys into the dicts, lists and TensorDicts that they are passed.

A sample's containers are its own, in the loop as well: the caller's batch keeps its keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

import shardmap
from shardmap import errors
from tests import oracle

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 1": {"chunk_size": 1},
    "chunk 3": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "always": {"check": "always"},
}


def new_key_returned(d: Any) -> Any:
    d["new"] = d["a"] * 2
    return d


def new_key_read(d: Any) -> Any:
    d["new"] = d["a"] * 2
    return d["new"] + 1


def new_key_unread(d: Any) -> Any:
    d["new"] = d["a"] * 2
    return d["a"].sin()


def key_replaced(d: Any) -> Any:
    d["a"] = d["a"] * 2
    d["a"] = d["a"].cos()
    return d["a"] * 3


def key_removed(d: Any) -> Any:
    d["sum"] = d.pop("a") + d["b"]
    return d


def keys_updated(d: Any) -> Any:
    d.update({"c": d["b"].sum(-1, keepdim=True), "a": d["a"] + 1})
    return d["c"] * d["a"]


def keys_by_default(d: Any) -> Any:
    return d.setdefault("q", d["a"] + 1) * d["b"]


FUNCTIONS = (
    new_key_returned, new_key_read, new_key_unread, key_replaced, key_removed, keys_updated,
    keys_by_default,
)  # fmt: skip


def as_dict(x: Tensor) -> Any:
    return {"a": x, "b": x.cos()}


def as_tensordict(x: Tensor) -> Any:
    return TensorDict(as_dict(x), batch_size=[] if x.dim() == 1 else [len(x)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [as_dict, as_tensordict])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_key_that_is_written(
    function: Callable[..., Any], make: Callable[[Tensor], Any], way: str
) -> None:
    batch = make(X.clone())
    want = [function(make(row)) for row in X]
    mapped = shardmap.vmap(function, **WAYS[way])
    for _ in range(2):
        got = mapped(batch)
        assert sorted(batch.keys()) == ["a", "b"]
        assert torch.equal(batch["a"], X)
        if isinstance(want[0], Tensor):
            oracle.assert_same(got, torch.stack(want), way)
            continue
        assert sorted(got.keys()) == sorted(want[0].keys())
        for key in want[0].keys():
            oracle.assert_same(got[key], torch.stack([w[key] for w in want]), way)


def test_a_list_that_is_appended_to() -> None:
    def function(given: list[Tensor]) -> Tensor:
        given.append(given[0] * 2)
        return given[-1].sin()

    batch = [X.clone(), X.cos()]
    oracle.assert_same(shardmap.vmap(function)(batch), (X * 2).sin(), "appended")
    assert len(batch) == 2


def test_containers_that_are_kept_elsewhere_are_refused_still() -> None:
    kept: list[Any] = []

    def function(d: dict[str, Tensor]) -> Tensor:
        d["new"] = d["a"] * 2
        kept.append(d)
        return d["new"] + 1

    with pytest.raises(errors.EscapeError, match="keeps a tensor that differs by sample.*'new'"):
        shardmap.vmap(function)(as_dict(X.clone()))
