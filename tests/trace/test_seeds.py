"""Seeds that a function sets: refused, alone and beside other threads; draws without seeds are
followed."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import shardmap
from shardmap import errors
from tests import oracle
from tests.trace.test_doors import Door, x


def seeded(r: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    return r + torch.randn(3)


def seeded_afterwards(r: torch.Tensor) -> torch.Tensor:
    out = r + torch.randn(3)
    torch.manual_seed(3)
    return out


def seeded_between(r: torch.Tensor) -> torch.Tensor:
    first = torch.rand(3)
    torch.manual_seed(3)
    return r + first + torch.rand(3)


def forked(r: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        return r + torch.randn(3)


def state_put_back(r: torch.Tensor) -> torch.Tensor:
    state = torch.get_rng_state()
    first = torch.randn(3)
    torch.set_rng_state(state)
    return r + first * torch.randn(3)


def seeded_as_before(r: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(torch.initial_seed())
    return r + torch.randn(3)


def reseeded(r: torch.Tensor) -> torch.Tensor:
    torch.seed()
    return r + torch.randn(3)


def default_generator(r: torch.Tensor) -> torch.Tensor:
    torch.default_generator.manual_seed(1)
    return F.dropout(r, 0.5, training=True)


def checkpointed_dropout(r: torch.Tensor) -> torch.Tensor:
    q = r.detach().requires_grad_()
    y = checkpoint(lambda t: F.dropout(t, 0.5, training=True).sin(), q, use_reentrant=False)
    assert isinstance(y, torch.Tensor)
    return torch.autograd.grad(y.sum(), q)[0]


SEEDS = [
    seeded,
    seeded_afterwards,
    seeded_between,
    forked,
    state_put_back,
    reseeded,
    seeded_as_before,
    default_generator,
    checkpointed_dropout,
]


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other thread draws, whatever threads other tests have left."""
    for place in ("_threads", "trace.generator", "trace.record", "trace.surroundings"):
        monkeypatch.setattr(f"shardmap.{place}.alone", lambda: True)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("function", SEEDS, ids=lambda f: f.__name__)
def test_seeds_set_inside_are_refused(function: Door, randomness: Any) -> None:
    for seed in (0, 3):  # the seed from outside may be the one set inside
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with pytest.raises(errors.RandomnessError, match="set the seed before the call"):
            shardmap.vmap(function, randomness=randomness)(x)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("function", SEEDS, ids=lambda f: f.__name__)
def test_seeds_set_inside_are_refused_beside_other_threads(function: Door, randomness: Any) -> None:
    """In a notebook, for example, other threads never end."""
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        for rows in (x[:1], x):  # what is found does not depend on a second sample
            with pytest.raises(errors.RandomnessError, match="set the seed before the call"):
                shardmap.vmap(function, randomness=randomness, check="off")(rows)
        assert sys.getprofile() is None
        noisy = shardmap.vmap(lambda r: r * 0 + torch.randn(3), randomness=randomness)(x)
        assert bool((noisy == noisy[0]).all()) == (randomness == "same")
    finally:
        done.set()
        other.join()


def test_a_seed_that_is_set_later_on_beside_other_threads() -> None:
    """The calls are those of the program that was looked at; the seed is none of them."""
    sets = False

    def function(r: torch.Tensor) -> torch.Tensor:
        if sets:
            torch.manual_seed(0)
        return r * torch.rand(3)

    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        mapped = shardmap.vmap(function, randomness="different")
        assert len(mapped(x).unique(dim=0)) == len(x)
        sets = True
        with pytest.raises(errors.RandomnessError, match="set the seed before the call"):
            mapped(x)
    finally:
        done.set()
        other.join()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_the_seed_as_a_number(randomness: Any) -> None:
    """A function that reads it reads the user's."""
    torch.manual_seed(12)
    found = shardmap.vmap(lambda r: r * float(torch.initial_seed() % 7), randomness=randomness)(x)
    oracle.assert_same(found, x * 5, "times the seed")
    assert torch.initial_seed() == 12


def state_by_numpy(r: torch.Tensor) -> torch.Tensor:
    return r * float(torch.get_rng_state().numpy().astype("float64").sum())


def state_before_a_draw(r: torch.Tensor) -> torch.Tensor:
    state = torch.get_rng_state()
    return r * state.double().mean() + torch.rand(3) * 0


def state_after_a_draw(r: torch.Tensor) -> torch.Tensor:
    return r + torch.rand(3) * 0 + torch.get_rng_state().double().mean()


READS_OF_STATES = {
    "a part": lambda r: r * float(torch.get_rng_state()[:64].sum()),
    "a tensor": lambda r: r * torch.get_rng_state().double().mean(),
    "an element": lambda r: r * int(torch.get_rng_state()[100]),
    "a list": lambda r: r * sum(torch.get_rng_state().tolist()),
    "bytes": lambda r: r * sum(bytes(torch.default_generator.get_state())),
    "a comparison": lambda r: r * torch.equal(torch.get_rng_state(), torch.zeros(5056).byte()),
    "numpy": state_by_numpy,
    "before a draw": state_before_a_draw,
    "after a draw": state_after_a_draw,
}


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", READS_OF_STATES)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("trace", ["auto", "each", "once"])
def test_the_state_as_a_number_is_refused(name: str, size: int, trace: Any) -> None:
    """While a function is recorded it is not the user's, and one sample shows nothing."""
    torch.manual_seed(12)  # as fresh as the loop's own seed would leave it
    before = torch.get_rng_state()
    mapped = shardmap.vmap(READS_OF_STATES[name], randomness="different", trace=trace)
    with pytest.raises(errors.EscapeError, match="read it outside of the function and pass it"):
        mapped(x[:size])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("_alone")
def test_the_remedy_for_reads_of_states() -> None:
    """The state of before the call is the same for all samples."""
    state = torch.get_rng_state()
    found = shardmap.vmap(lambda r, s: r * s.double().mean(), (0, None))(x, state)
    oracle.assert_same(found, x * state.double().mean(), "passed in")
    found = shardmap.vmap(lambda r: r * state.double().mean())(x)
    oracle.assert_same(found, x * state.double().mean(), "captured")


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_the_seed_after_a_draw(randomness: Any) -> None:
    """It is the user's still, though draws leave their mark."""
    torch.manual_seed(12)

    def function(r: torch.Tensor) -> torch.Tensor:
        return (r + torch.rand(3) * 0) * float(torch.initial_seed() % 7) + torch.rand(3) * 0

    oracle.assert_same(shardmap.vmap(function, randomness=randomness)(x), x * 5, "times the seed")
    assert torch.initial_seed() == 12

    def seeded(r: torch.Tensor) -> torch.Tensor:
        first = torch.rand(3)
        torch.manual_seed(torch.initial_seed())
        return r + first + torch.rand(3)

    with pytest.raises(errors.RandomnessError, match="set the seed before the call"):
        shardmap.vmap(seeded, randomness=randomness)(x)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_the_state_of_a_given_generator(randomness: Any) -> None:
    """It is the user's as long as nothing is drawn from it; then it is refused."""
    g = torch.Generator().manual_seed(3)
    want = x * g.get_state().double().mean()
    found = shardmap.vmap(lambda r: r * g.get_state().double().mean(), randomness=randomness)(x)
    oracle.assert_same(found, want, "nothing drawn")

    def function(r: torch.Tensor) -> torch.Tensor:
        return r + torch.rand(3, generator=g) * 0 + g.get_state().double().mean()

    for size in (1, 4):
        with pytest.raises(errors.EscapeError, match="the state of a torch.Generator"):
            shardmap.vmap(function, randomness=randomness)(x[:size])


def test_the_remedy_for_seeds() -> None:
    def noisy(r: torch.Tensor) -> torch.Tensor:
        return r + torch.randn(3)

    torch.manual_seed(3)
    same = shardmap.vmap(noisy, randomness="same")(x) - x
    torch.testing.assert_close(same, same[:1].expand(4, 3))
    torch.manual_seed(3)
    torch.testing.assert_close(shardmap.vmap(noisy, randomness="same")(x) - x, same)


def test_draws_without_seeds_are_followed() -> None:
    """Draws of many kinds, some of which draw nothing, and a map inside that draws."""

    def function(r: torch.Tensor) -> torch.Tensor:
        h = F.dropout(r, 0.0, training=True) + torch.rand(3)
        h = F.dropout(h, 0.5, training=False) + torch.randperm(3)
        inner = shardmap.vmap(lambda v: v + 1)(h)
        return inner + torch.bernoulli(torch.full((3,), 0.5))

    assert shardmap.vmap(function, randomness="same")(x).shape == (4, 3)


def test_a_seed_without_draws_is_harmless() -> None:
    def function(r: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return r * 2

    oracle.assert_same(shardmap.vmap(function)(x), x * 2, "no draws")


def test_attention_without_dropout_after_a_seed() -> None:
    """Its operator may draw and does not: no draw depends on the seed."""
    x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))

    def function(r: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return F.scaled_dot_product_attention(r[None], r[None] * 2, r[None], dropout_p=0.0)

    state = torch.get_rng_state()
    found = shardmap.vmap(function)(x)
    want = torch.stack([function(r) for r in x])
    torch.set_rng_state(state)
    torch.testing.assert_close(found, want)
