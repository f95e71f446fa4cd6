"""Random operators on generators of their own: they leave torch's default generator alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap.program.private_generators import PrivateGenerators, takes_generator

aten = torch.ops.aten
x = torch.full((3, 5), 0.3)

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda r: torch.rand(5),
    "randn": lambda r: torch.randn(5),
    "randint": lambda r: torch.randint(9, (5,)),
    "randint from": lambda r: torch.randint(2, 9, (5,)),
    "randperm": lambda r: torch.randperm(5),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda r: torch.randint_like(r, 9),
    "randint_like from": lambda r: torch.randint_like(r, 2, 9),
    "normal": lambda r: torch.normal(r, 2.0),
    "bernoulli": torch.bernoulli,
    "dropout": lambda r: torch.nn.functional.dropout(r),
    "rrelu": lambda r: torch.nn.functional.rrelu(-r, training=True),
    "uniform_": lambda r: r.clone().uniform_(),
    "exponential_": lambda r: r.clone().exponential_(),
    "poisson": lambda r: torch.poisson(r * 9),
    "multinomial": lambda r: torch.multinomial(r, 3),
    "dirichlet": lambda r: torch.distributions.Dirichlet(r, validate_args=False).sample(),
    "gamma": lambda r: torch.distributions.Gamma(r, r, validate_args=False).sample(),
    "binomial": lambda r: torch.binomial(r * 0 + 9, r),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_recording_draws_nothing_from_the_default_generator(name: str) -> None:
    """But the seed of the map: one number, whatever the function draws."""
    torch.manual_seed(5)
    torch.randint(0, 2**62, ())
    want = torch.rand(())
    torch.manual_seed(5)
    found = shardmap.vmap(CALLS[name], randomness="different")(x)
    assert torch.equal(torch.rand(()), want)
    assert len(found) == 3
    torch.manual_seed(5)
    again = shardmap.vmap(CALLS[name], randomness="different", chunk_size=1)(x)
    assert torch.equal(found, again), "the draws depend on the chunk"


def test_dropout_is_torchs() -> None:
    """Kept elements are scaled, the given share is zero; strides are the operator's."""
    rows = torch.ones(64, 64).t()
    out, mask = PrivateGenerators(3).run(aten.native_dropout.default, (rows, 0.25, True), {})
    wanted, torchs = torch.native_dropout(rows, 0.25, True)
    assert (out.dtype, out.stride(), mask.dtype) == (wanted.dtype, wanted.stride(), torchs.dtype)
    assert torch.equal(out, mask / 0.75)
    assert abs(mask.double().mean() - 0.75) < 0.03
    everything, _ = PrivateGenerators(3).run(aten.native_dropout.default, (rows, 1.0, True), {})
    assert not everything.any()


def test_one_seed_gives_one_stream() -> None:
    def draw(seed: int) -> Tensor:
        return PrivateGenerators(seed).run(aten.rand.default, ([7],), {})

    assert torch.equal(draw(4), draw(4))
    assert torch.equal(draw(4), torch.rand(7, generator=torch.Generator().manual_seed(4)))
    assert not torch.equal(draw(4), draw(5))


def test_what_takes_no_generator() -> None:
    assert takes_generator(aten.randint_like.low_dtype)
    assert not takes_generator(aten._scaled_dot_product_flash_attention.default)
