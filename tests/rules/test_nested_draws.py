"""Draws in a map inside a map: each pair of samples, or those that share, as torch.func says."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import shardmap
from shardmap import errors

Func = Callable[[torch.Tensor], torch.Tensor]

RULES: dict[str, Func] = {
    "randn": lambda r: r + torch.randn(3),
    "rand": lambda r: torch.rand(3, dtype=torch.float64),
    "rand_half": lambda r: torch.rand(4, dtype=torch.float16),
    "rand_complex": lambda r: torch.view_as_real(torch.rand(2, dtype=torch.complex64)),
    "randn_complex": lambda r: torch.view_as_real(torch.randn(2, dtype=torch.complex64)),
    "randint": lambda r: torch.randint(0, 10**6, (3,)),
    "randperm": lambda r: torch.randperm(12),
    "uniform_": lambda r: torch.empty(3).uniform_(-2, 2),
    "normal_": lambda r: (r * 1).normal_(3, 2),
    "bernoulli_": lambda r: torch.empty(30).bernoulli_(0.3),
    "exponential_": lambda r: torch.empty(3).exponential_(2.0),
    "log_normal_": lambda r: torch.empty(3).log_normal_(),
    "cauchy_": lambda r: torch.empty(3).cauchy_(),
    "geometric_": lambda r: torch.empty(20).geometric_(0.1),
    "bernoulli": lambda r: (r + 0.5).expand(20, 3).bernoulli(),
    "normal": lambda r: torch.normal(r, 2.0),
    "dropout": lambda r: F.dropout(r.expand(20, 3) + 1, 0.4),
    "native_dropout": lambda r: torch.ops.aten.native_dropout(r.expand(20, 3) + 1, 0.4, True)[0],
    "gumbel": lambda r: F.gumbel_softmax(r),
    "multinomial": lambda r: torch.multinomial(r.exp().repeat(10), 20, True),
    "rrelu": lambda r: F.rrelu(r - 1, training=True),
}
LOOPS: dict[str, Func] = {
    "poisson": lambda r: torch.poisson(r.exp() * 10**4),
}
WAYS: list[dict[str, Any]] = [
    {"chunk_size": 1},
    {"chunk_size": 7},
    {"chunk_size": 64},
    {"devices": ["cpu"] * 2},
    {"trace": "once", "chunk_size": 2},
    {"check": "always"},
]
PAIRS = list(itertools.product(("different", "same"), repeat=2))
x = torch.zeros(11, 4, 3)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.SlowLoopWarning)
        yield


def distinct(inner: str, outer: str, outers: int = 11) -> int:
    """Number of distinct rows, of 4 inner samples in each outer one."""
    return (4 if inner == "different" else 1) * (outers if outer == "different" else 1)


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
@pytest.mark.parametrize("name", [*RULES, *LOOPS])
def test_each_pair_draws_as_both_maps_say(name: str, inner: Any, outer: Any) -> None:
    """The same for any chunks and lanes, and as many different rows as there are draws."""
    f = {**RULES, **LOOPS}[name]
    if name in LOOPS and inner == "same":
        with pytest.raises(errors.RandomnessError, match="randomness='different'"):
            shardmap.vmap(shardmap.vmap(f, randomness=inner), randomness=outer)(x)
        inner = "different"  # the remedy

    def run(rows: torch.Tensor = x, **way: Any) -> torch.Tensor:
        torch.manual_seed(5)
        return shardmap.vmap(shardmap.vmap(f, randomness=inner), randomness=outer, **way)(rows)

    out = run()
    one = f(x[0, 0])
    assert out.shape == (11, 4, *one.shape)
    assert out.dtype == one.dtype
    rows = out.reshape(44, -1)
    found = len(rows.unique(dim=0))
    if name == "rand_half":  # 11 bits each: two may meet
        assert abs(found - distinct(inner, outer)) <= 1
    else:
        assert found == distinct(inner, outer)
    for way in WAYS:
        assert torch.equal(run(**way), out), way
    assert torch.equal(run(x[:3]), out[:3])


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_as_torch_says_for_nested_maps(inner: Any, outer: Any) -> None:
    """There are as many draws as with torch.func.vmap, whichever of the two maps is ours."""
    f = RULES["randn"]
    theirs = torch.func.vmap(torch.func.vmap(f, randomness=inner), randomness=outer)(x)
    mixed = torch.func.vmap(shardmap.vmap(f, randomness=inner), randomness=outer)(x)
    ours = shardmap.vmap(shardmap.vmap(f, randomness=inner), randomness=outer)(x)
    chunked = torch.func.vmap(
        shardmap.vmap(f, randomness=inner, chunk_size=3), randomness=outer
    )(x)  # fmt: skip
    for out in (theirs, mixed, ours, chunked):
        assert len(out.reshape(44, 3).unique(dim=0)) == distinct(inner, outer)


@pytest.mark.parametrize("inner", ["different", "same", "error"])
@pytest.mark.parametrize("outer", ["different", "same", "error"])
def test_either_map_may_refuse(inner: Any, outer: Any) -> None:
    """Either map refuses in the same cases as torch.func.vmap."""
    f = RULES["randn"]
    nested = shardmap.vmap(shardmap.vmap(f, randomness=inner), randomness=outer)
    if "error" not in (inner, outer):
        assert nested(x).shape == x.shape
        return
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(torch.func.vmap(f, randomness=inner), randomness=outer)(x)
    with pytest.raises(errors.RandomnessError, match="randomness='different'"):
        nested(x)


def test_three_maps_and_draws_of_the_outer_ones() -> None:
    """Each level's own draws are shared below it."""
    shape = (3, 4, 5, 2)

    def inmost(r: torch.Tensor) -> torch.Tensor:
        return r + torch.rand(2)

    def middle(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.rand(())
        return own.expand(5), shardmap.vmap(inmost, randomness="different")(rows)

    def outmost(rows: torch.Tensor) -> Any:
        return torch.rand(()), *shardmap.vmap(middle, randomness="different")(rows)

    found = []
    for size in (1, 2, None):
        torch.manual_seed(1)
        found.append(
            shardmap.vmap(outmost, randomness="different", chunk_size=size)(torch.ones(shape))
        )
    outer, mid, inner = found[0]
    assert outer.unique().numel() == 3
    assert mid.unique().numel() == 12
    assert (mid == mid[..., :1]).all()
    assert inner.unique().numel() == 3 * 4 * 5 * 2
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_distributions_of_nested_draws() -> None:
    """The forms that torch draws are distributed as the counted ones: mean and variance."""
    moments: dict[str, tuple[Func, float, float]] = {
        "uniform": (lambda r: torch.empty(50).uniform_(-1, 3), 1.0, 16 / 12),
        "normal": (lambda r: torch.empty(50).normal_(1, 2), 1.0, 4.0),
        "exponential": (lambda r: torch.empty(50).exponential_(2.0), 0.5, 0.25),
        "log_normal": (
            lambda r: torch.empty(50, dtype=torch.float64).log_normal_(0.1, 0.3).log(), 0.1, 0.09,
        ),
        "geometric": (lambda r: torch.empty(50).geometric_(0.5), 2.0, 2.0),
        "bernoulli": (lambda r: torch.empty(50).bernoulli_(0.3), 0.3, 0.21),
        "integers": (lambda r: torch.randint(-2, 3, (50,)), 0.0, 2.0),
        "cauchy": (lambda r: (torch.empty(50).cauchy_(1, 2) < 1).float(), 0.5, 0.25),
        "permutation": (lambda r: torch.randperm(50)[:25], 24.5, (50**2 - 1) / 12),
    }  # fmt: skip
    torch.manual_seed(0)
    for name, (f, mean, variance) in moments.items():
        out = shardmap.vmap(shardmap.vmap(f, randomness="different"), randomness="different")(
            torch.zeros(20, 40)
        ).double()
        error = 6 * (variance / out.numel()) ** 0.5
        assert abs(float(out.mean()) - mean) < error, name
        assert abs(float(out.var()) / variance - 1) < 0.15, name


@pytest.mark.parametrize("outer", ["different", "same"])
def test_generators_of_the_users_in_nested_maps(outer: Any) -> None:
    """The inner map's generator is the outer call's: advanced once by it."""
    g = torch.Generator()
    inner = shardmap.vmap(lambda r: r + torch.rand(3, generator=g), randomness="different")

    def run(**way: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        g.manual_seed(4)
        mapped = shardmap.vmap(inner, randomness=outer, **way)
        return mapped(x), mapped(x), g.get_state()

    first, second, state = run()
    assert len(first.reshape(44, 3).unique(dim=0)) == distinct("different", outer)
    assert not torch.equal(first, second)
    for way in WAYS:
        assert all(map(torch.equal, run(**way), (first, second, state))), way


def test_gradients_inside_and_outside_of_nested_dropout() -> None:
    """The mask that the value had is the mask of its gradient."""

    def f(r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = r.detach().requires_grad_()
        y = F.dropout(q, 0.5)
        return y.detach(), torch.autograd.grad(y.sum(), q)[0]

    rows = torch.rand(5, 4, 7) + 1
    for size in (1, 3, None):
        y, grad = shardmap.vmap(
            shardmap.vmap(f, randomness="different"), randomness="different", chunk_size=size
        )(rows)
        torch.testing.assert_close(grad, y / rows)
    leaf = rows.clone().requires_grad_()
    out = shardmap.vmap(
        shardmap.vmap(lambda r: F.dropout(r, 0.5), randomness="different"), randomness="different"
    )(leaf)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaf)[0], (out / leaf).detach())
