"""Samples of unequal shapes: results whose shapes follow from values, and `shardmap.compare`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from shardmap.rules import registry
from tests.same import assert_same

Tensor = torch.Tensor

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks_of_one": {"chunk_size": 1},
    "chunks_of_three": {"chunk_size": 3},
    "two_lanes": {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    "once": {"trace": "once"},
}


def ragged(size: int = 23) -> list[Tensor]:
    torch.manual_seed(size)
    return [torch.randn(n % 5 + 1) for n in range(size)]


def several(r: Tensor) -> dict[str, Any]:
    return {
        "positive": r[r > 0],
        "others": (r[r <= 0], r.nonzero()),
        "sum": r.sum(),
        "count": int((r > 0).sum()),
        "nothing": None,
    }


def in_another_order(r: Tensor) -> dict[str, Tensor]:
    if r.sum() > 0:
        return {"a": r[r > 0], "b": r}
    return {"b": r * 2, "a": r[r < 0]}


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3, 23])
@pytest.mark.parametrize("how", ["list", "nested"])
def test_several_outputs_whose_shapes_follow_from_values(how: str, size: int, way: str) -> None:
    rows = ragged(size)
    mapped = shardmap.vmap(several, ragged=how, **WAYS[way])
    for batch in (rows, [-r for r in rows]):
        got = mapped(shardmap.Ragged(batch))
        assert got["nothing"] is None
        for k, r in enumerate(batch):
            want = several(r)
            assert_same(got["positive"][k], want["positive"], f"positive of {k}")
            assert_same(got["others"][0][k], want["others"][0], f"others of {k}")
            assert_same(got["others"][1][k], want["others"][1], f"places of {k}")
            assert_same(got["sum"][k], want["sum"], f"sum of {k}")
            assert int(got["count"][k]) == want["count"]


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
def test_keys_in_another_order(way: str) -> None:
    rows = ragged()
    got = shardmap.vmap(in_another_order, ragged="list", **WAYS[way])(shardmap.Ragged(rows))
    assert list(got) == list(in_another_order(rows[0]))
    for k, r in enumerate(rows):
        for key, want in in_another_order(r).items():
            assert_same(got[key][k], want, f"{key} of {k}")


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
def test_gradients_of_several_ragged_outputs() -> None:
    weight = torch.randn((), dtype=torch.float64, requires_grad=True)
    rows = [r.double() for r in ragged()]

    def function(r: Tensor) -> tuple[Tensor, Tensor]:
        return (r * weight.sin())[r > 0], (r * weight)[r < 0].cos()

    found = shardmap.vmap(function, ragged="list")(shardmap.Ragged(rows))
    got = sum([(t * t).sum() for column in found for t in column])
    want = sum([(t * t).sum() for r in rows for t in function(r)])
    assert isinstance(got, Tensor)
    assert isinstance(want, Tensor)
    assert_same(torch.autograd.grad(got, weight)[0], torch.autograd.grad(want, weight)[0], "grad")


def test_the_error_names_the_remedy() -> None:
    with pytest.raises(errors.RaggedError, match="ragged='list' or ragged='nested'"):
        shardmap.vmap(lambda r: (r[r > 0], r[r < 0]))(shardmap.Ragged(ragged()))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}], ids=str)
@pytest.mark.parametrize("samples", [1, 5, [0, 7, 22]])
def test_compare(samples: Any, options: dict[str, Any]) -> None:
    net = nn.Linear(1, 2)

    def function(r: Tensor) -> dict[str, Any]:
        loss = net(r.unsqueeze(1)).square().mean()
        return {
            "rows": r.sin(),
            "grad": torch.autograd.grad(loss, net.weight)[0],
            "nothing": None,
        }

    found = shardmap.compare(function, **options)(shardmap.Ragged(ragged()), samples=samples)
    assert found.agrees, str(found)
    assert len(found.samples) == (samples if isinstance(samples, int) else 3)
    assert [out.name for out in found.outputs] == ["rows", "grad"]
    share = shardmap.compare(lambda r: function(r)["grad"])(shardmap.Ragged(ragged()), samples=3)
    assert share.agrees
    assert "agrees with the loop on 3 samples" in str(share)


@torch.library.custom_op("shardmap_ragged_test::twice", mutates_args=())
def twice(t: Tensor) -> Tensor:
    """An operator whose rule is wrong."""
    return t * 2


def test_compare_names_the_operator_that_is_wrong() -> None:
    shardmap.clear_caches()
    rules = dict(registry._rules)

    @shardmap.batching_rule(torch.ops.shardmap_ragged_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t: t * 2.5 if t.shape[1] == 3 else t * 2, *args)

    try:
        function = lambda r: (torch.ops.shardmap_ragged_test.twice(r) + 1).sum()
        rows = shardmap.Ragged(ragged())
        right = shardmap.compare(function, check="off")(rows, samples=[0, 1, 3])
        found = shardmap.compare(function, check="off")(rows, samples=[0, 1, 2, 3])
    finally:
        registry._rules.clear()
        registry._rules.update(rules)
        shardmap.clear_caches()
    assert right.agrees
    assert not found.agrees
    assert found.outputs[0].sample == 2  # of length 3
    assert "shardmap_ragged_test::twice" in (found.parted or "")


def test_compare_refuses_samples_that_are_not_there() -> None:
    with pytest.raises(errors.OptionError, match="name samples from 0 to 22"):
        shardmap.compare(torch.sum)(shardmap.Ragged(ragged()), samples=[23])
