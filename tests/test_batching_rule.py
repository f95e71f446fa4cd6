"""`shardmap.batching_rule`: rules of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.rules import registry
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
def _tables_are_put_back() -> Iterator[None]:
    rules = dict(registry._rules)
    shardmap.clear_caches()
    yield
    shardmap.clear_caches()
    registry._rules.clear()
    registry._rules.update(rules)
    shardmap.clear_caches()


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


def test_a_rule_is_replaced_when_asked() -> None:
    """The later rule serves; the version tells caches so."""
    first = registry.version()
    shardmap.batching_rule(OP)(lambda b, eq, args, kwargs: NotImplemented)
    second = registry.version()

    @shardmap.batching_rule(OP, replace=True)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t, by: t * by, *(b.batch(v) for v in args[:2]), shape=args[0].shape)

    assert first < second < registry.version()
    got = shardmap.vmap(scale, strict=True)(x, x)
    oracle.assert_same(got, x * x, "output")


def test_a_rule_of_ours_is_replaced_and_the_number_of_rules_stays() -> None:
    """A count of the rules would not show a replacement; the version does."""
    count, before = len(registry._rules), registry.version()

    @shardmap.batching_rule(torch.ops.aten.sinh.default, replace=True)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t: (t.exp() - (-t).exp()) / 2, args[0], shape=args[0].shape)

    assert len(registry._rules) == count
    assert registry.version() > before
    torch.testing.assert_close(shardmap.vmap(torch.sinh)(x), x.sinh())


@pytest.mark.parametrize("rule", [None, 3, "scale", torch.ones(2)])
def test_a_rule_that_is_no_function_is_refused(rule: Any) -> None:
    before = registry.version()
    with pytest.raises(errors.OptionError, match="not a function rule"):
        shardmap.batching_rule(OP)(rule)
    assert not registry.has_rule(OP)
    assert registry.version() == before


def test_options_of_a_registration_are_checked() -> None:
    with pytest.raises(errors.OptionError, match="no operator is given"):
        shardmap.batching_rule()
    with pytest.raises(errors.OptionError, match="replace is True or False"):
        shardmap.batching_rule(OP, replace=1)  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match="made of other operators"):
        shardmap.batching_rule(torch.ops.aten.linear.default)


@torch.library.custom_op("shardmap_rule_test::both", mutates_args=())
def both(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator with two results."""
    return t + 1, t * 2


@torch.library.custom_op("shardmap_rule_test::grow_", mutates_args=("t",))
def grow_(t: torch.Tensor) -> None:
    """An operator that writes and returns nothing."""
    t.mul_(2)


BOTH = torch.ops.shardmap_rule_test.both.default
WRONG_RESULTS: list[tuple[str, Any, str]] = [
    ("nothing", lambda v, w: None, "returned nothing"),
    ("a tensor", lambda v, w: torch.ones(3, 2), "a Tensor of shape (3, 2)"),
    ("a number", lambda v, w: 1.5, "1.5 (a float)"),
    ("one of two", lambda v, w: v, "1 result,"),
    ("three of two", lambda v, w: (v, w, v), "3 results"),
    ("None as one of two", lambda v, w: (v, None), "None as result 1"),
    ("a tensor as one of two", lambda v, w: [v, torch.ones(2)], "a Tensor of shape (2,)"),
]


@pytest.mark.parametrize(
    ("returned", "words"), [c[1:] for c in WRONG_RESULTS], ids=[c[0] for c in WRONG_RESULTS]
)
def test_wrong_results_of_a_rule_are_refused_in_words(returned: Any, words: str) -> None:
    """The operator, what the rule returned, and what was expected."""

    @shardmap.batching_rule(BOTH)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return returned(*b.calls_several(BOTH, 2, *args))

    with pytest.raises(errors.RuleError) as caught:
        shardmap.vmap(both)(x)
    text = str(caught.value)
    assert "shardmap_rule_test::both" in text
    assert words in text
    assert "[B, 2] torch.float32" in text


def test_what_a_rule_may_return() -> None:
    """A list as well as a tuple, and None of a call that only writes."""

    @shardmap.batching_rule(BOTH)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return list(b.calls_several(BOTH, 2, *args))

    @shardmap.batching_rule(torch.ops.shardmap_rule_test.grow_.default)
    def writes(b: Any, eq: Any, args: Any, kwargs: Any) -> None:
        b.effect(eq.op, *args)

    def f(row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = row.clone()
        grow_(own)
        return (own, *both(row))

    got = shardmap.vmap(f)(x)
    for mine, theirs in zip(got, (x * 2, x + 1, x * 2), strict=True):
        oracle.assert_same(mine, theirs, "output")


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
def test_a_rule_that_comes_later_is_used_by_replays(trace: str) -> None:
    by = torch.tensor(3.0)
    mapped = shardmap.vmap(lambda t: scale(t, by), trace=trace)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
        for seed in range(5):
            rows = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(mapped(rows), rows * by)
    seen = []

    @shardmap.batching_rule(OP)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        seen.append(args[0].mapped)
        spec = eq.outs[0].spec
        return b.call(lambda t, by: t * by, *args, shape=spec.shape, dtype=spec.dtype)

    for seed in range(3):
        rows = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(mapped(rows), rows * by)
    assert seen == [True]
