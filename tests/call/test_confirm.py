"""The assembled result is compared with the function, on the path that really ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from shardmap.rules import registry
from shardmap.run import gather
from tests import oracle
from tests.loop import loop

x = torch.arange(24.0).view(12, 2) + 1


@torch.library.custom_op("shardmap_confirm_test::twice", mutates_args=())
def twice(t: torch.Tensor) -> torch.Tensor:
    """An operator whose rule is right for small batches only."""
    return t * 2


@pytest.fixture
def wrong_for_many() -> Iterator[None]:
    shardmap.clear_caches()
    rules = dict(registry._rules)

    @shardmap.batching_rule(torch.ops.shardmap_confirm_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t: t * 2 if t.shape[0] < 5 else t * 2.5, *args)

    yield
    registry._rules.clear()
    registry._rules.update(rules)
    shardmap.clear_caches()


def function(r: torch.Tensor) -> torch.Tensor:
    return torch.ops.shardmap_confirm_test.twice(r) + 1


@pytest.mark.usefixtures("wrong_for_many")
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 6}, {"devices": ["cpu", "cpu"], "chunk_size": 6}], ids=str
)
def test_a_rule_that_is_wrong_for_more_samples_than_were_tried_is_seen(
    options: dict[str, Any],
) -> None:
    with pytest.raises(errors.MismatchError, match="output 0 of the map is not what the function"):
        shardmap.vmap(function, **options)(x)
    oracle.assert_same(shardmap.vmap(function, chunk_size=3)(x), x * 2 + 1, "small chunks")


@pytest.mark.usefixtures("wrong_for_many")
@pytest.mark.parametrize(("shift", "wrong"), [(1e-8, False), (1e-3, True)])
def test_what_is_nothing_but_rounding_is_measured_by_the_weights(shift: float, wrong: bool) -> None:
    """The gradient of an attention's key bias is 0, and tokens are no magnitudes."""
    registry._rules.pop(torch.ops.shardmap_confirm_test.twice.default)

    @shardmap.batching_rule(torch.ops.shardmap_confirm_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t: t * 2 if t.shape[0] < 5 else t * 2 + shift, *args)

    weight = torch.arange(30.0).view(10, 3) / 30
    tokens = torch.arange(12) % 10

    def cancels(token: torch.Tensor) -> torch.Tensor:
        row = weight.index_select(0, token[None])
        return torch.ops.shardmap_confirm_test.twice(row - row)

    if wrong:
        with pytest.raises(errors.MismatchError, match="output 0 of the map"):
            shardmap.vmap(cancels)(tokens)
    else:
        torch.testing.assert_close(
            shardmap.vmap(cancels)(tokens), torch.zeros(12, 1, 3), rtol=0, atol=1e-7
        )


@pytest.mark.usefixtures("wrong_for_many")
def test_rows_are_read_back_from_a_store(tmp_path: Path) -> None:
    with pytest.raises(errors.MismatchError, match="output 0 of the map"):
        shardmap.vmap(function, out=shardmap.MemmapSink(tmp_path / "s"), chunk_size=6)(x)


@pytest.mark.parametrize(
    "reduce",
    ["sum", "mean", "max", "min", (torch.maximum, None)],
    ids=["sum", "mean", "max", "min", "fold"],
)
def test_a_reduction_that_loses_a_chunk_is_seen(
    reduce: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two samples in two chunks show it."""
    shardmap.clear_caches()
    original = gather.Total._take

    def forgetful(self: Any, partial: torch.Tensor) -> None:
        if self.value is None and self.recent is None:
            original(self, partial)

    if not isinstance(reduce, tuple):
        monkeypatch.setattr(gather.Total, "_take", forgetful)
        smallest_last = torch.neg if reduce == "min" else torch.square
        with pytest.raises(errors.MismatchError, match="the reduction of two samples"):
            shardmap.vmap(smallest_last, reduce=reduce)(x)
        monkeypatch.undo()
        shardmap.clear_caches()
    got = shardmap.vmap(torch.square, reduce=reduce, chunk_size=5)(x)
    want: dict[Any, Callable[[], torch.Tensor]] = {
        "sum": lambda: x.square().sum(0),
        "mean": lambda: x.square().mean(0),
        "min": lambda: x.square().amin(0),
    }
    oracle.assert_same(got, want.get(reduce, lambda: x.square().amax(0))(), "reduced")


def attention() -> tuple[Any, torch.Tensor]:
    """Words that attend to each other: the gradient of the keys' bias is 0 but for rounding."""
    torch.manual_seed(0)
    embed, key, query = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 16)
    for layer in (embed, key, query):
        nn.init.normal_(layer.double().weight)
    parameters = (embed.weight, key.weight, key.bias, query.weight)

    def gradient(words: torch.Tensor) -> Any:
        x = embed(words)[None]
        q, k, v = (t.view(1, 6, 2, 8).transpose(1, 2) for t in (query(x), key(x), x))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(out.square().sum(), parameters)

    return gradient, torch.randint(9, (13, 6))


def less_precise_inside() -> tuple[Any, torch.Tensor]:
    """Weights of float64, of which a model computes a part in float32."""
    torch.manual_seed(0)
    weight = torch.randn(3000, 5, dtype=torch.float64)
    rows = torch.randn(40, 3000, dtype=torch.float64)
    return lambda row: (row.float() @ weight.float()).double(), rows


ROUNDED: dict[str, Any] = {"attention": attention, "less_precise_inside": less_precise_inside}
"""Functions whose results differ from the loop's by rounding of more than the results' own size."""


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("trace", ["auto", "each", "once"])
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"]}, {"check": "always"}], ids=str
)
def test_rounding_is_no_reason_to_refuse(name: str, trace: str, options: dict[str, Any]) -> None:
    function, batch = ROUNDED[name]()
    want = loop(function)(batch)
    mapped = shardmap.vmap(function, trace=trace, **options)
    for _ in range(5):
        pairs = zip(pytree.tree_leaves(mapped(batch)), pytree.tree_leaves(want), strict=True)
        for got, own in pairs:
            torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduce", ["mean", "norm"])
@pytest.mark.parametrize("name", ROUNDED)
def test_nor_is_it_of_reductions(name: str, reduce: str) -> None:
    function, batch = ROUNDED[name]()
    shardmap.vmap(function, reduce=reduce)(batch)


@pytest.mark.usefixtures("wrong_for_many")
def test_an_error_beyond_the_least_precise_dtype_is_refused() -> None:
    """A float32 inside excuses no error of a part in four."""
    rows = x.double()
    with pytest.raises(errors.MismatchError, match="output 0 of the map is not what the function"):
        shardmap.vmap(lambda r: torch.ops.shardmap_confirm_test.twice(r.float()).double())(rows)
