"""Samples that go different ways and draw: the same numbers however they are computed."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import shardmap
from shardmap import errors
from tests.call.paths import batch

Tensor = torch.Tensor

WAYS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 7},
    {"chunk_size": 64},
    {"chunk_size": None},
    {"devices": ["cpu", "cpu"], "chunk_size": 5},
    {"trace": "once"},
    {"check": "off"},
    {"check": "always"},
]


def on_one_way(r: Tensor) -> Tensor:
    """Draws for samples of one way."""
    return r if r.sum() > 0 else r + torch.rand(3)


def on_both(r: Tensor) -> Tensor:
    """Draws before the question, and on each way another kind."""
    start = torch.rand(3)
    if r.sum() > 0:
        return r + start + torch.randn(3)
    return r * 2 + start + functional.dropout(torch.ones(3), 0.5)


def permuted(r: Tensor) -> Tensor:
    """Draws that torch makes sample by sample."""
    return r[torch.randperm(3)] if r[0] > 0 else r * torch.poisson(torch.full((3,), 4.0))


def loops(r: Tensor) -> Tensor:
    """As many draws as the sample says."""
    for _ in range(int((r > 0).sum())):
        r = r + torch.rand(3)
    return r


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [on_one_way, on_both, permuted, loops]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_bit_identical_however_computed(function: Callable[[Tensor], Tensor]) -> None:
    x = batch(131)
    shardmap.clear_caches()
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", shardmap.SlowLoopWarning)
        warnings.filterwarnings("ignore", ".*no rule batches")
        for options in WAYS:
            mapped = shardmap.vmap(function, randomness="different", **options)
            torch.manual_seed(5)
            found.append((mapped(x), mapped(x)))
    for first, second in found:
        assert torch.equal(first, found[0][0])
        assert torch.equal(second, found[0][1])
        assert not torch.equal(first, second)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_what_a_sample_draws_depends_on_its_number_alone(
    function: Callable[[Tensor], Tensor],
) -> None:
    """Other samples of the batch, and those of other ways, do not matter."""
    x, found = batch(61), []
    for flipped in (1, -1):
        other = x.clone()
        other[1::2] *= flipped
        torch.manual_seed(5)
        found.append(shardmap.vmap(function, randomness="different")(other)[::2])
    assert torch.equal(*found)


def test_every_sample_goes_its_own_way() -> None:
    x = batch(2000)
    torch.manual_seed(0)
    found = shardmap.vmap(on_one_way, randomness="different", chunk_size=300)(x)
    draws = x.sum(1) <= 0
    assert torch.equal(found[~draws], x[~draws])
    drawn = (found - x)[draws]
    assert ((drawn > -1e-6) & (drawn < 1)).all()
    assert len(drawn.unique(dim=0)) == len(drawn)
    assert abs(float(drawn.mean()) - 0.5) < 0.03
    assert abs(float(drawn.var()) - 1 / 12) < 0.01


def test_samples_that_share_their_draws() -> None:
    x = batch(61)
    torch.manual_seed(0)
    found = shardmap.vmap(on_one_way, randomness="same", chunk_size=7)(x)
    drawn = (found - x)[x.sum(1) <= 0]
    torch.testing.assert_close(drawn, drawn[:1].expand_as(drawn))


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_reduced(how: str) -> None:
    x, found = batch(61), []
    for reduce in (None, how):
        torch.manual_seed(1)
        options: dict[str, Any] = {"randomness": "different", "chunk_size": 7}
        found.append(shardmap.vmap(on_both, reduce=reduce, **options)(x))
    torch.testing.assert_close(getattr(found[0], how)(0), found[1])


def test_stored(tmp_path: Any) -> None:
    x = batch(61)
    torch.manual_seed(1)
    want = shardmap.vmap(on_both, randomness="different")(x)
    sink = shardmap.MemmapSink(tmp_path / "rows")
    torch.manual_seed(1)
    store = shardmap.vmap(on_both, randomness="different", out=sink, chunk_size=7)(x)
    assert torch.equal(torch.as_tensor(store.read("result", 0, 61)), want)


def test_gradients() -> None:
    """Through what is drawn: of a product the gradient is the draw itself."""
    x = batch(61).requires_grad_()
    function = lambda r: r * 3 if r.sum() > 0 else r * torch.rand(3)
    torch.manual_seed(2)
    out = shardmap.vmap(function, randomness="different", chunk_size=7)(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad * x, out)


def test_ragged_results() -> None:
    x, found = batch(61), []
    function = lambda r: r[r > 0] + torch.rand(())
    ways: list[dict[str, Any]] = [{}, {"chunk_size": 3}, {"trace": "once"}]
    for options in ways:
        mapped = shardmap.vmap(function, randomness="different", ragged="list", **options)
        for _ in range(2):
            torch.manual_seed(2)
            found.append(mapped(x))
    drawn = []
    for got in found:
        assert all(torch.equal(a, b) for a, b in zip(got, found[0], strict=True))
    for row, got in zip(x, found[0], strict=True):
        if len(got):
            difference = got - row[row > 0]
            torch.testing.assert_close(difference, difference[:1].expand_as(difference))
            drawn.append(float(difference[0]))
    assert len({round(d, 5) for d in drawn}) == len(drawn)


@pytest.mark.parametrize("passed", [True, False])
def test_a_generator_of_the_users_own(passed: bool) -> None:
    x, found = batch(61), []
    ways: list[dict[str, Any]] = [
        {},
        {"chunk_size": 3},
        {"devices": ["cpu", "cpu"], "chunk_size": 7},
    ]
    for options in ways:
        own = torch.Generator().manual_seed(3)

        def function(r: Tensor, g: torch.Generator | None = None, own: Any = own) -> Tensor:
            start = torch.rand(3)
            if r.sum() > 0:
                return r + start
            return r + 10 + torch.rand(3, generator=g or own)

        torch.manual_seed(4)
        mapped = shardmap.vmap(function, (0, None), randomness="different", **options)
        calls = [mapped(x, own if passed else None) for _ in range(2)]
        found.append((*calls, own.get_state()))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
    assert not torch.equal(found[0][0], found[0][1])
    drawn = (found[0][0] - x - 10)[x.sum(1) <= 0]
    assert ((drawn > -1e-5) & (drawn < 1)).all()
    assert len(drawn.unique(dim=0)) == len(drawn)


def test_more_ways_than_are_allowed_draw_the_same_each_time() -> None:
    x, found = batch(31), []
    function = lambda r: r * r.sum().item() + torch.rand(3)
    ways: list[dict[str, Any]] = [
        {},
        {"chunk_size": 3},
        {"devices": ["cpu", "cpu"], "chunk_size": 7},
    ]
    for options in ways:
        mapped = shardmap.vmap(function, randomness="different", max_paths=3, **options)
        for _ in range(2):
            torch.manual_seed(4)
            with pytest.warns(shardmap.SlowLoopWarning, match="max_paths=3"):
                found.append(mapped(x))
    assert all(torch.equal(found[0], other) for other in found)


def test_draws_are_refused_where_they_are_not_asked_for() -> None:
    x = batch(61)
    x[0] = 1
    with pytest.raises(errors.RandomnessError, match="randomness is 'error'"):
        shardmap.vmap(on_one_way)(x)


def test_ways_that_draw_unlike_amounts_share_no_numbers() -> None:
    """Each sample's numbers are its own, also where another way draws more in the same call."""
    x = batch(400)

    def function(r: Tensor) -> Tensor:
        return torch.rand(3) if r.sum() > 0 else torch.rand(30)[:3]

    torch.manual_seed(0)
    found = shardmap.vmap(function, randomness="different")(x)
    assert len(found.flatten().unique()) > 0.999 * found.numel()
    assert len(found.unique(dim=0)) == len(found)


@pytest.mark.parametrize("size", [3, 61, 200])
def test_shared_draws_follow_from_the_seed(size: int) -> None:
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))

    def function(row: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(4)
        return drawn + row if row.sum() > 0 else drawn * row

    ways: list[dict[str, Any]] = [
        {},
        {"chunk_size": 7},
        {"devices": ["cpu", "cpu"], "chunk_size": 7},
        {"trace": "once"},
    ]
    found = []
    for seed in (1, 2, 1):
        for how in ways:
            torch.manual_seed(seed)
            found.append((seed, shardmap.vmap(function, randomness="same", **how)(x)))
    for (seed, a), (other, b) in itertools.combinations(found, 2):
        assert torch.equal(a, b) == (seed == other)
    for _, result in found:  # one draw for all samples
        first = result[0] - x[0] if x[0].sum() > 0 else result[0] / x[0]
        for row, got in zip(x, result, strict=True):
            torch.testing.assert_close(got, first + row if row.sum() > 0 else first * row)
