"""`shardmap.batching_rule`: rules of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.lower import cache as engine
from shardmap.rules import registry
from shardmap.trace import repeat as follow
from tests import oracle

x = torch.arange(6.0).view(3, 2) + 1


@torch.library.custom_op("shardmap_rule_test::scale", mutates_args=())
def scale(t: torch.Tensor, by: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """An operator that torch cannot batch."""
    return t * by**power


@scale.register_fake
def _(t: torch.Tensor, by: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    return torch.empty_like(t)


OP = torch.ops.shardmap_rule_test.scale.default


@pytest.fixture(autouse=True)
def _tables_are_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    rules = dict(registry._rules)
    for module, name in ((engine, "_cache"), (engine, "_by_identity"), (follow, "_last")):
        monkeypatch.setattr(module, name, type(getattr(module, name))())
    yield
    registry._rules.clear()
    registry._rules.update(rules)


def test_a_registered_rule_is_used() -> None:
    """Without a loop and its warning, and with the arguments as they were recorded."""
    seen = []

    @shardmap.batching_rule(OP)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        seen.append((args[0].mapped, args[1].mapped, args[0].shape, args[2:], kwargs))
        return b.call(
            lambda t, by, power: t * by**power,
            *args,
            shape=eq.outs[0].spec.shape,
            dtype=eq.outs[0].spec.dtype,
        )

    by = torch.tensor(3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = shardmap.vmap(lambda r: scale(r, by, 2.0), strict=True)(x)
    oracle.assert_same(got, x * 9, "output")
    assert seen == [(True, False, (2,), (2.0,), {})]
    assert registry.tier(OP) == "rule"
    assert ("shardmap_rule_test::scale", "rule", "user") in registry.table()


def test_without_a_rule_there_is_a_loop() -> None:
    by = torch.tensor(3.0)
    assert registry.tier(OP) == "loop"
    with pytest.warns(shardmap.SlowLoopWarning, match="shardmap_rule_test::scale"):
        got = shardmap.vmap(lambda r: scale(r, by))(x)
    oracle.assert_same(got, x * 3, "output")


def test_a_rule_may_decline() -> None:
    """`NotImplemented` hands the call to the next tier."""

    @shardmap.batching_rule(OP)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return NotImplemented

    with pytest.warns(shardmap.SlowLoopWarning):
        got = shardmap.vmap(scale)(x, x)
    oracle.assert_same(got, x * x, "output")


def test_a_second_rule_is_refused() -> None:
    shardmap.batching_rule(OP)(lambda b, eq, args, kwargs: NotImplemented)
    with pytest.raises(errors.OptionError, match="has a rule already"):
        shardmap.batching_rule(OP)
    with pytest.raises(errors.OptionError, match="has a rule already"):
        shardmap.batching_rule(torch.ops.aten.add.Tensor)


@pytest.mark.parametrize("wrong", [torch.add, torch.ops.aten.add, "aten::add", scale, None])
def test_what_is_no_operator_is_refused(wrong: Any) -> None:
    with pytest.raises(errors.OptionError, match="not an operator overload"):
        shardmap.batching_rule(wrong)
