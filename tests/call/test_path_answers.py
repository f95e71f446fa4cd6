"""Writes on some ways, and other ways to ask, each sample against the loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.call import routes
from tests import oracle
from tests.call.paths import WAYS, batch, expected

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("paths_pay_early")

WRITING: dict[str, Callable[[Tensor], Tensor]] = {
    "add_": lambda r: r.add_(1) * 1 if r.sum() > 0 else r * 1,
    "an item": lambda r: (r.__setitem__(0, 5.0), r * 1)[1] if r[1] > 0 else r * 1,
    "a mask": lambda r: (r.__setitem__(r > 0.5, 0.0), r.sum())[1] if r[1] > 0 else r.sum(),
    "out=": lambda r: torch.mul(r, 2, out=r) + 0 if r.sum() > 0 else r + 0,
}


@pytest.mark.parametrize("size", [2, 3, 5, 17, 61])
@pytest.mark.parametrize("way", ["plain", "chunk 3", "two lanes", "once", "off"])
@pytest.mark.parametrize("name", WRITING)
def test_writes_on_a_way_that_was_not_recorded_first(name: str, way: str, size: int) -> None:
    """The first sample does not write; one other does, or several, looped or recorded."""
    for writers in {1, size - 1}:
        theirs = -batch(size).abs()
        theirs[-writers:] = theirs[-writers:].abs()
        own = theirs.clone()
        want = expected(WRITING[name], theirs)
        oracle.assert_same(shardmap.vmap(WRITING[name], **WAYS[way])(own), want, "result")
        oracle.assert_same(own, theirs, "argument")


ASKED_OTHERWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "all true": lambda r: r * 2 if torch._is_all_true(r > 0) else -r,
    "any true": lambda r: r * 2 if torch._is_any_true(r > 1) else -r,
    "a text": lambda r: r * float(f"{r[0]:.1f}"),
    "a list": lambda r: r * sum(v > 0 for v in r.tolist()),
    "NaN": lambda r: r * 0 if (r[0] / r[0] * float("nan")).item() != 0 else r,
    "NaN or not": lambda r: r * 0 if r.log().sum().isnan() else r * 2,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ASKED_OTHERWISE)
def test_other_ways_to_ask(name: str, way: str) -> None:
    x = batch(61)
    mapped = shardmap.vmap(ASKED_OTHERWISE[name], **WAYS[way])
    for _ in range(2):
        oracle.assert_same(mapped(x), expected(ASKED_OTHERWISE[name], x), name)


def test_distributions_that_refuse_some_samples() -> None:
    def function(r: Tensor) -> Tensor:
        try:
            return torch.distributions.Normal(0.0, r).log_prob(torch.zeros(()))
        except ValueError:
            return -r * 100

    for first in (-1.0, 1.0):
        x = batch(61)[:, 0]
        x[0] = first
        for _ in range(2):
            oracle.assert_same(shardmap.vmap(function)(x), expected(function, x), "result")


def test_paths_of_earlier_calls_do_not_count() -> None:
    mapped = shardmap.vmap(lambda r: r * r[0].item(), strict=True, trace="once", max_paths=10)
    for seed in range(4):
        x = torch.randn(9, 2, generator=torch.Generator().manual_seed(seed))
        oracle.assert_same(mapped(x), expected(lambda r: r * r[0].item(), x), "result")


def test_draws_of_ragged_results_are_those_of_results_of_one_shape() -> None:
    """Path by path the samples keep their numbers, by which they draw."""
    x, found = batch(20), []
    function = lambda r: r if r.sum() > 0 else r + torch.rand(3)
    for ragged in ("error", "list"):
        torch.manual_seed(1)
        mapped = shardmap.vmap(function, randomness="different", ragged=ragged, strict=True)
        found.append(mapped(x))
    oracle.assert_same(found[0], found[1], "draws")

    given = lambda r, drawn: r if r.sum() > 0 else r + drawn
    noise = torch.rand(20, 3)
    oracle.assert_same(shardmap.vmap(given)(x, noise), expected(given, x, noise), "passed in")


def test_strict_never_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample without a path of its own is refused by its number, not run by the function."""
    calls = 0

    def function(r: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return r.sin() if r.sum() > 0 else r.cos()

    x = batch(61)
    oracle.assert_same(
        shardmap.vmap(function, strict=True)(x), expected(function, x), "each way is recorded"
    )
    assert calls < 20 + len(x)  # the loop's own calls count too
    monkeypatch.setattr(
        routes.Router, "_send", lambda self, prefix, rows, waiting: self._loop(rows)
    )
    shardmap.clear_caches()
    with pytest.raises(errors.VariesError, match=r"sample \d+ and \d+ others.*strict=False"):
        shardmap.vmap(function, strict=True)(x)
    oracle.assert_same(shardmap.vmap(function)(x), expected(function, x), "not strict")
