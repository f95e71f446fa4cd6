"""Generators of the user's: captured by a mapped function, or passed to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributions import Normal

import shardmap
from shardmap import MemmapSink, errors

Generator = torch.Generator
Draw = Callable[[torch.Tensor, Generator], torch.Tensor]

DRAWS: dict[str, Draw] = {
    "randn": lambda r, g: r + torch.randn(3, generator=g),
    "rand": lambda r, g: r + torch.rand((2, 3), generator=g),
    "randint": lambda r, g: torch.randint(2, 1000, (4,), generator=g),
    "randint_from_zero": lambda r, g: torch.randint(1000, (4,), generator=g),
    "randperm": lambda r, g: torch.randperm(11, generator=g),
    "normal": lambda r, g: torch.normal(r, 2.0, generator=g),
    "normal_of_numbers": lambda r, g: torch.normal(1.0, 2.0, (3,), generator=g),
    "bernoulli": lambda r, g: torch.bernoulli((0 * r + 0.5).expand(9, 3), generator=g),
    "uniform_": lambda r, g: (r * 1).uniform_(-1, 1, generator=g),
    "normal_": lambda r, g: torch.empty(3).normal_(1, 2, generator=g),
    "exponential_": lambda r, g: torch.empty(3).exponential_(2.0, generator=g),
    "cauchy_": lambda r, g: torch.empty(3).cauchy_(generator=g),
    "log_normal_": lambda r, g: torch.empty(3).log_normal_(generator=g),
    "geometric_": lambda r, g: torch.empty(30).geometric_(0.1, generator=g),
    "random_": lambda r, g: torch.empty(3).random_(generator=g),
    "multinomial": lambda r, g: torch.multinomial((0 * r).exp(), 30, True, generator=g),
    "poisson": lambda r, g: torch.poisson((0 * r + 5).exp(), generator=g),
    "binomial": lambda r, g: torch.binomial(0 * r + 1000, 0 * r + 0.5, generator=g),
    "init": lambda r, g: torch.nn.init.kaiming_uniform_(torch.empty(2, 3), generator=g) + r,
    "several": lambda r, g: torch.rand(3, generator=g) * torch.randn(3, generator=g) + r,
}

WAYS: list[dict[str, Any]] = [
    {"chunk_size": 1},
    {"chunk_size": 3},
    {"chunk_size": 7},
    {"devices": ["cpu"] * 2},
    {"devices": ["cpu"] * 2, "chunk_size": 2},
    {"trace": "once"},
    {"trace": "once", "chunk_size": 2},
    {"check": "always"},
    {"check": "off"},
]

x = torch.arange(33.0).view(11, 3)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.SlowLoopWarning)
        yield


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_follow_from_the_state_and_the_sample_alone(name: str, randomness: Any) -> None:
    """Captured and passed, in every way of running; a call advances the state, once."""
    draw, g = DRAWS[name], Generator()

    def run(passed: bool = False, rows: torch.Tensor = x, **way: Any) -> list[torch.Tensor]:
        f = draw if passed else lambda r: draw(r, g)
        mapped = shardmap.vmap(f, (0, None) if passed else 0, randomness=randomness, **way)
        g.manual_seed(3)
        out = [mapped(rows, g) if passed else mapped(rows) for _ in range(2)]
        return [*out, g.get_state()]

    default = torch.get_rng_state()
    first, second, state = run()
    own = draw(x[0], Generator())
    assert first.shape == (11, *own.shape)
    assert first.dtype == own.dtype
    assert not torch.equal(first, second)
    g.manual_seed(3)
    assert not torch.equal(g.get_state(), state)
    for passed in (False, True):
        for way in [{}, *WAYS]:
            for ours, theirs in zip(run(passed, **way), (first, second, state), strict=True):
                assert torch.equal(ours, theirs), (passed, way)
        assert torch.equal(run(passed, x[:5])[0], first[:5])
    rows = run(rows=x[:1].expand(11, 3).contiguous())[0]
    assert all(torch.equal(row, rows[0]) for row in rows) == (randomness == "same")
    if randomness == "different":
        assert len(rows.unique(dim=0)) > 8
    run_before = run()[0]
    torch.manual_seed(7)
    assert torch.equal(run()[0], run_before), "the seed of torch's own generator has no part in it"
    torch.set_rng_state(default)


def test_a_call_draws_nothing_from_torchs_generator() -> None:
    """The function draws from the user's generator alone."""
    g, before = Generator(), torch.get_rng_state()
    shardmap.vmap(lambda r: r + torch.randn(3, generator=g), randomness="different")(x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("passed", [True, False])
def test_refused_unless_asked_for(passed: bool) -> None:
    """`randomness="error"` refuses, and leaves the generator's state alone."""
    g = Generator().manual_seed(1)
    before = g.get_state()
    f = lambda r, g: r + torch.randn(3, generator=g)
    mapped = shardmap.vmap(f, (0, None)) if passed else shardmap.vmap(lambda r, g=g: f(r, g))
    with pytest.raises(errors.RandomnessError, match="randomness='different'"):
        mapped(*((x, g) if passed else (x,)))
    assert torch.equal(g.get_state(), before)


def test_a_generator_that_is_not_drawn_from_stays_as_it_is() -> None:
    g = Generator().manual_seed(1)
    before = g.get_state()
    shardmap.vmap(lambda r, g: r * 2, (0, None), randomness="different")(x, g)
    assert torch.equal(g.get_state(), before)


def test_a_function_that_raises_leaves_the_state() -> None:
    """The recording advances the generator while the function runs."""
    g = Generator().manual_seed(1)
    before = g.get_state()

    def fails(r: torch.Tensor, g: Generator) -> torch.Tensor:
        torch.rand(3, generator=g)
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        shardmap.vmap(fails, (0, None), randomness="different")(x, g)
    assert torch.equal(g.get_state(), before)


def test_torchs_own_generator_passed_by_name() -> None:
    """It is the generator that is used without one."""
    torch.manual_seed(4)
    want = shardmap.vmap(lambda r: r + torch.randn(3), randomness="different")(x)
    torch.manual_seed(4)
    f = lambda r: r + torch.randn(3, generator=torch.default_generator)
    assert torch.equal(shardmap.vmap(f, randomness="different")(x), want)


def test_two_generators_with_one_seed_draw_the_same() -> None:
    """As in the loop, common random numbers cancel, whatever else the function draws."""
    a, b = Generator().manual_seed(5), Generator().manual_seed(5)

    def f(r: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(3, generator=a), torch.rand(3, generator=a)
        other = torch.randn(3).sin() * r
        again = torch.randn(3, generator=b), torch.rand(3, generator=b)
        return torch.stack([0 * other, noise[0] - again[0], noise[1] - again[1]])

    for way in ({}, {"chunk_size": 2}):
        assert not shardmap.vmap(f, randomness="different", **way)(x).any()


def test_one_generator_in_two_maps() -> None:
    """The second call continues the stream of the first."""
    g = Generator().manual_seed(5)
    one = shardmap.vmap(lambda r: torch.rand(3, generator=g), randomness="different")
    two = shardmap.vmap(lambda r: torch.rand(3, generator=g) * 1, randomness="different")
    a, b, c = one(x), two(x), one(x)
    assert len(torch.cat([a, b, c]).unique(dim=0)) == 33


def test_another_generator_under_trace_once() -> None:
    """The recording is of one generator; a call with another draws from that one."""
    holder = {"g": Generator().manual_seed(1)}
    f = lambda r: r * 0 + torch.randn(3, generator=holder["g"])
    mapped = shardmap.vmap(f, randomness="different", trace="once")
    first = mapped(x)
    old = holder["g"].get_state()
    holder["g"] = Generator().manual_seed(1)
    assert torch.equal(mapped(x), first)
    assert torch.equal(holder["g"].get_state(), old)
    assert not torch.equal(mapped(x), first)
    passed = shardmap.vmap(
        lambda r, g: r * 0 + torch.randn(3, generator=g), (0, None), randomness="different",
        trace="once",
    )  # fmt: skip
    a, b = Generator().manual_seed(1), Generator().manual_seed(1)
    assert torch.equal(passed(x, a), passed(x, b))
    assert torch.equal(passed(x, a), passed(x, b))
    assert torch.equal(a.get_state(), b.get_state())


def test_gradients_go_through_the_draws() -> None:
    """Reparameterised: the derivative by the scale is the draw, inside and outside."""
    g, w = Generator(), torch.tensor(2.0, requires_grad=True)

    def f(r: torch.Tensor) -> torch.Tensor:
        return (r * 0 + w * torch.randn(3, generator=g)).sum()

    for way in ({}, {"chunk_size": 2}, {"chunk_size": 2, "remat": True}):
        g.manual_seed(0)
        out = shardmap.vmap(f, randomness="different", **way)(x)
        (grad,) = torch.autograd.grad(out.sum(), w)
        torch.testing.assert_close(grad * 2, out.sum())
    g.manual_seed(0)
    inner = shardmap.vmap(
        lambda r: torch.autograd.grad(f(r), w)[0], randomness="different", chunk_size=3
    )(x)
    torch.testing.assert_close(inner.sum() * 2, out.sum())


def test_stored_and_reduced() -> None:
    """The numbers are those of the stacked result."""
    g = Generator()
    f = lambda r: r + torch.randn(3, generator=g)
    g.manual_seed(9)
    want = shardmap.vmap(f, randomness="different")(x)
    g.manual_seed(9)
    total = shardmap.vmap(f, randomness="different", reduce="sum", chunk_size=4)(x)
    torch.testing.assert_close(total, want.sum(0))


def test_written_to_a_store(tmp_path: Any) -> None:
    """A run that is resumed with the same state finds its units."""
    g = Generator()
    f = lambda r: r + torch.randn(3, generator=g)
    g.manual_seed(9)
    want = shardmap.vmap(f, randomness="different")(x)
    for _ in range(2):
        g.manual_seed(9)
        with torch.no_grad():
            store = shardmap.vmap(
                f, randomness="different", out=MemmapSink(str(tmp_path / "s")), chunk_size=4,
                resume=True,
            )(x)  # fmt: skip
        assert torch.equal(store.read(store.header.outputs[0].name, 0, 11), want)


def test_served_sample_by_sample() -> None:
    """A function that must be run itself draws by the sample's number too, and leaves the state."""
    g = Generator()

    def f(r: torch.Tensor) -> torch.Tensor:
        offset = float(f"{r[0]:.4f}")
        return r * 0 + torch.randn(3, generator=g) + 0 * offset

    found = []
    for way in ({}, {"chunk_size": 2}):
        g.manual_seed(2)
        found += [shardmap.vmap(f, randomness="different", **way)(x) for _ in range(2)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert len(torch.cat(found[:2]).unique(dim=0)) == 22


# -- states that the function sets itself: the loop's numbers are the same for all samples ---------


def seeded_before(r: torch.Tensor, g: Generator) -> torch.Tensor:
    g.manual_seed(3)
    return r + torch.randn(3, generator=g)


def seeded_after(r: torch.Tensor, g: Generator) -> torch.Tensor:
    out = r + torch.randn(3, generator=g)
    g.manual_seed(3)
    return out


def seeded_between(r: torch.Tensor, g: Generator) -> torch.Tensor:
    first = torch.rand(3, generator=g)
    g.manual_seed(3)
    return r + first + torch.rand(3, generator=g)


def seeded_as_before(r: torch.Tensor, g: Generator) -> torch.Tensor:
    g.manual_seed(g.initial_seed())
    return r + torch.rand(3, generator=g)


def put_back(r: torch.Tensor, g: Generator) -> torch.Tensor:
    state = g.get_state()
    first = torch.rand(3, generator=g)
    g.set_state(state)
    return r + first * torch.rand(3, generator=g)


def made_inside(r: torch.Tensor, g: Generator) -> torch.Tensor:
    own = torch.Generator().manual_seed(0)
    return r + torch.rand(3, generator=own)


SEEDS = [seeded_before, seeded_after, seeded_between, seeded_as_before, put_back, made_inside]


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("function", SEEDS, ids=lambda f: f.__name__)
def test_states_set_inside_are_refused(function: Draw, passed: bool, randomness: Any) -> None:
    """And the generator is as it was; the remedy works."""
    for seed in (3, 0):
        g = Generator().manual_seed(seed)
        before = g.get_state()
        f = function if passed else lambda r, g=g: function(r, g)
        mapped = shardmap.vmap(f, (0, None) if passed else 0, randomness=randomness)
        with pytest.raises(errors.RandomnessError, match="before the call"):
            mapped(*((x, g) if passed else (x,)))
        if passed or function is not seeded_before:  # it was unknown before it was seeded
            assert torch.equal(g.get_state(), before)
    outside = Generator().manual_seed(3)
    out = shardmap.vmap(lambda r: torch.randn(3, generator=outside), randomness="same")(x)
    assert (out == out[0]).all()


# -- as others use generators ----------------------------------------------------------------------


def test_probe_vectors() -> None:
    """Rademacher vectors for Hutchinson's estimate of a trace, drawn as in curvlinops."""
    a = torch.diag(torch.arange(1.0, 5.0))
    g = Generator().manual_seed(0)

    def probe(_: torch.Tensor) -> torch.Tensor:
        v = torch.empty(4).bernoulli_(0.5, generator=g).mul_(2).sub_(1)
        return v @ a @ v

    out = shardmap.vmap(probe, randomness="different", chunk_size=7)(torch.zeros(50))
    torch.testing.assert_close(out, torch.full((50,), 10.0))

    def projection(_: torch.Tensor) -> torch.Tensor:
        return torch.randn(4, generator=g, dtype=torch.float64)

    vectors = shardmap.vmap(projection, randomness="different")(torch.zeros(4000))
    torch.testing.assert_close(vectors.T.cov(), torch.eye(4).double(), atol=0.12, rtol=0)


def test_searches_side_by_side() -> None:
    """Populations drawn as in evotorch: one generator, a batch of centres, antithetic pairs."""
    g = Generator().manual_seed(0)

    def population(center: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(5, 3).normal_(generator=g) * sigma
        return torch.cat([center + noise, center - noise])

    centers, sigmas = torch.randn(6, 3), torch.rand(6, 1) + 0.1
    out = shardmap.vmap(population, randomness="different", chunk_size=4)(centers, sigmas)
    torch.testing.assert_close(out.mean(1), centers, atol=1e-5, rtol=0)
    g.manual_seed(0)
    shared = shardmap.vmap(population, randomness="same")(centers, sigmas)
    unit = (shared - centers[:, None]) / sigmas[:, None]
    torch.testing.assert_close(unit, unit[:1].expand_as(unit), atol=1e-4, rtol=1e-4)


def test_beside_draws_without_a_generator() -> None:
    """Distributions draw from torch's own generator, the rest from the user's."""
    g = Generator()

    def f(r: torch.Tensor) -> torch.Tensor:
        return Normal(r, 1.0, validate_args=False).rsample() + torch.rand(3, generator=g)

    def run(own: int, given: int) -> torch.Tensor:
        torch.manual_seed(own)
        g.manual_seed(given)
        return shardmap.vmap(f, randomness="different")(x)

    assert torch.equal(run(0, 0), run(0, 0))
    assert not torch.equal(run(0, 0), run(0, 1))
    assert not torch.equal(run(0, 0), run(1, 0))
