"""Random draws.

The same for any chunks and devices, one stream for each sample, and distributed as they should be.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.lower import cache as engine
from shardmap.rules import philox as draws

Func = Callable[[torch.Tensor], torch.Tensor]

FUNCTIONS: dict[str, Func] = {
    "rand": lambda x: x + torch.rand(3),
    "rand_double": lambda x: torch.rand(2, dtype=torch.float64),
    "rand_half": lambda x: torch.rand(2, dtype=torch.float16),
    "rand_complex": lambda x: torch.view_as_real(torch.rand(2, dtype=torch.complex64)),
    "rand_like": lambda x: torch.rand_like(x),
    "randn": lambda x: x * torch.randn(5, 3),
    "randn_one": lambda x: torch.randn(()),
    "randn_complex": lambda x: torch.view_as_real(torch.randn(2, dtype=torch.complex128)),
    "randn_like": lambda x: torch.randn_like(x.expand(2, 3).t()),
    "randint": lambda x: torch.randint(2, 9, (4,)),
    "randint_like": lambda x: torch.randint_like(x, 9),
    "randperm": lambda x: torch.randperm(7),
    "uniform_": lambda x: torch.empty(3).uniform_(-2, 2),
    "uniform_view": lambda x: _write(x, lambda t: t.uniform_()),
    "normal_": lambda x: (x * 1).normal_(3, 2),
    "normal": lambda x: torch.normal(x, 2.0),
    "normal_std": lambda x: torch.normal(x, x.abs() + 1),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: _write(x, lambda t: t.bernoulli_(0.3)),
    "bernoulli_tensor": lambda x: torch.empty(3).bernoulli_(x.sigmoid()),
    "exponential_": lambda x: torch.empty(3).exponential_(2.0),
    "log_normal_": lambda x: torch.empty(3).log_normal_(),
    "cauchy_": lambda x: torch.empty(3).cauchy_(),
    "geometric_": lambda x: torch.empty(3).geometric_(0.3),
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.4),
    "alpha_dropout": lambda x: torch.nn.functional.alpha_dropout(x, 0.4, training=True),
    "feature_dropout": lambda x: torch.nn.functional.dropout1d(x.expand(2, 4, 3), 0.4),
    "native_dropout": lambda x: torch.ops.aten.native_dropout(x, 0.4, True)[0],
    "gumbel": lambda x: torch.nn.functional.gumbel_softmax(x),
    "multinomial": lambda x: torch.multinomial(x.softmax(0), 2),
    "poisson": lambda x: torch.poisson(x.exp()),
    "rrelu": lambda x: torch.nn.functional.rrelu(x, training=True),
    "empty": lambda x: torch.rand(0, 3) + x,
}


def _write(x: torch.Tensor, draw: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    out = x.expand(2, 3).clone()
    draw(out[1])
    return out


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", engine.SlowLoopWarning)
        yield


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_independent_of_the_way_it_is_computed(name: str, randomness: str) -> None:
    """Draws depend on the seed and the sample alone, bit by bit.

    Not on the chunk size, the shards, or how many samples follow.
    """
    func = FUNCTIONS[name]
    shardmap.clear_caches()
    x = torch.randn(7, 3)

    def run(rows: torch.Tensor, seed: int = 3, **options: Any) -> torch.Tensor:
        torch.manual_seed(seed)
        return shardmap.vmap(func, randomness=randomness, **options)(rows)

    whole = run(x)
    with torch.no_grad():
        one = func(x[0])
    assert whole.shape == (7, *one.shape)
    assert whole.dtype == one.dtype
    ways: list[dict[str, Any]] = [
        {"chunk_size": 2},
        {"chunk_size": 1},
        {"devices": ["cpu"] * 2},
        {"devices": ["cpu"] * 2, "chunk_size": 3},
    ]
    for options in ways:
        assert torch.equal(run(x, **options), whole), options
    assert torch.equal(run(x[:4]), whole[:4])
    assert torch.equal(run(x), whole)
    if whole.numel():
        assert any(not torch.equal(run(x, seed=s), whole) for s in (4, 5, 6))
    for low in engine.lowerings():
        assert not low.fixes.tiers, low.fixes


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "empty"])
def test_samples_differ_or_agree(name: str) -> None:
    """The same row in each place: draws differ between samples, or all are the first one's."""
    x = torch.randn(1, 3).expand(12, 3).contiguous()
    torch.manual_seed(0)
    different = shardmap.vmap(FUNCTIONS[name], randomness="different")(x)
    torch.manual_seed(0)
    same = shardmap.vmap(FUNCTIONS[name], randomness="same")(x)
    assert any(not torch.equal(different[0], row) for row in different[1:])
    assert all(torch.equal(same[0], row) for row in same)
    assert torch.equal(same[0], different[0])


def test_refused_unless_asked_for() -> None:
    """The default refuses, and what draws nothing leaves the generator alone."""
    with pytest.raises(errors.RandomnessError):
        shardmap.vmap(lambda x: x + torch.rand(3))(torch.randn(2, 3))
    state = torch.get_rng_state()
    shardmap.vmap(lambda x: x * 2, randomness="different")(torch.randn(2, 3))
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(2, 3)
    assert torch.equal(after, torch.get_rng_state())


def test_two_calls_draw_apart() -> None:
    """Two calls of one operator in one sample do not share numbers."""
    out = shardmap.vmap(
        lambda x: torch.stack([torch.rand(4), torch.rand(4)]), randomness="different"
    )(torch.zeros(3, 1))
    assert not torch.equal(out[:, 0], out[:, 1])


def test_dropout_keeps_its_gradient() -> None:
    """Elements that are kept have gradient 1 / (1 - p), the others none.

    Inside the function and from outside.
    """
    x = torch.randn(50, 8, requires_grad=True)
    for dropout in (
        lambda v: torch.nn.functional.dropout(v, 0.25),
        lambda v: torch.ops.aten.native_dropout(v, 0.25, True)[0],
    ):
        out = shardmap.vmap(dropout, randomness="different")(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad, out.detach() / x.detach(), rtol=1e-5, atol=1e-6)

        def inside(v: torch.Tensor, dropout: Func = dropout) -> tuple[torch.Tensor, torch.Tensor]:
            v = v.detach().requires_grad_()
            y = dropout(v)
            return y.detach(), torch.autograd.grad(y.sum(), v)[0]

        y, inner = shardmap.vmap(inside, randomness="different")(x)
        torch.testing.assert_close(inner, (y / x).detach(), rtol=1e-5, atol=1e-6)


# -- distributions: one fixed seed each, bounds far in the tails -----------------------------------

COUNT = 40_000
DEVICE = torch.device("cpu")


def _distance(values: torch.Tensor, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """The Kolmogorov-Smirnov statistic, scaled: above 2.2 with probability 1e-4."""
    ordered = np.sort(values.double().numpy().ravel())
    expected = cdf(ordered)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return math.sqrt(len(ordered)) * max(
        np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max()
    )


def _phi(x: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.from_numpy(x)).numpy()


CONTINUOUS: dict[str, tuple[Any, tuple[float, ...], Callable[[np.ndarray], np.ndarray]]] = {
    "uniform": (draws.uniform, (-1.0, 3.0), lambda x: (x + 1) / 4),
    "normal": (draws.normal, (1.0, 2.0), lambda x: _phi((x - 1) / 2)),
    "log_normal": (draws.log_normal, (0.5, 0.7), lambda x: _phi((np.log(x) - 0.5) / 0.7)),
    "exponential": (draws.exponential, (2.0,), lambda x: 1 - np.exp(-2 * x)),
    "cauchy": (draws.cauchy, (1.0, 2.0), lambda x: np.arctan((x - 1) / 2) / np.pi + 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous(name: str, dtype: torch.dtype) -> None:
    """Against the distribution function, over samples and within a sample."""
    draw, parameters, cdf = CONTINUOUS[name]
    assert (
        _distance(draw(draws.Stream(COUNT // 5, 0, 11, 2), [5], dtype, DEVICE, *parameters), cdf)
        < 2.2
    )
    assert (
        _distance(draw(draws.Stream(1, 4, 11, 2), [COUNT], dtype, DEVICE, *parameters), cdf) < 2.2
    )


def test_normal_numbers_are_independent() -> None:
    """Box-Muller halves, neighbours, and real and imaginary parts are uncorrelated."""
    z = draws.normal(draws.Stream(COUNT, 0, 5, 1), [4], torch.float64, DEVICE, 0.0, 1.0)
    correlation = torch.corrcoef(z.T) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(COUNT)
    c = draws.normal(draws.Stream(COUNT, 0, 5, 1), [1], torch.complex128, DEVICE, 0.0, 1.0)
    assert abs(float(c.real.var()) - 0.5) < 0.02
    assert abs(float(c.imag.var()) - 0.5) < 0.02


def test_discrete() -> None:
    """Frequencies within five standard errors."""

    def near(frequency: torch.Tensor, p: float) -> bool:
        return abs(float(frequency) - p) < 5 * math.sqrt(p * (1 - p) / COUNT)

    for p in (0.0001, 0.25, 0.9999):
        assert near(
            draws.bernoulli(draws.Stream(COUNT, 0, 1, 1), [1], torch.float64, DEVICE, p).mean(), p
        )
    integers = draws.integers(draws.Stream(COUNT, 0, 2, 1), [1], torch.int64, DEVICE, -2, 3)
    assert all(near((integers == k).double().mean(), 0.2) for k in range(-2, 3))
    trials = draws.geometric(draws.Stream(COUNT, 0, 3, 1), [1], torch.float64, DEVICE, 0.3)
    assert all(near((trials == k).double().mean(), 0.3 * 0.7 ** (k - 1)) for k in (1, 2, 3))
    first = draws.permutation(draws.Stream(COUNT, 0, 4, 1), [5], torch.int64, DEVICE)
    assert torch.equal(first.sort(1).values, torch.arange(5).expand(COUNT, 5))
    assert all(near((first[:, i] == k).double().mean(), 0.2) for i in range(5) for k in range(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_uniform_numbers_stay_below_one(dtype: torch.dtype) -> None:
    """Rounding to a small type must not reach the open end."""
    values = draws.uniform(draws.Stream(COUNT, 0, 1, 1), [8], dtype, DEVICE, 0.0, 1.0)
    assert values.min() >= 0
    assert values.max() < 1
