"""A sample's draws do not depend on how it is served: by a replay, or by the function itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions
from torch.utils.checkpoint import checkpoint

import shardmap

Function = Callable[[Tensor], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")


def looped(f: Function) -> Function:
    """The same, with a number of each sample's own that python asks for: a path for each."""
    return lambda r: f(r) + 0.0 * r[0].item()


def filled(r: Tensor) -> Tensor:
    x = torch.empty_like(r).uniform_(-1, 2)
    x[:2].normal_(1, 2)
    return x * torch.empty(3, dtype=r.dtype).exponential_(2.0) * r


def several(r: Tensor) -> Tensor:
    y = r
    for _ in range(3):
        y = (y + 0.1 * torch.randn_like(y)) * F.dropout(r, 0.4)
    return y * torch.rand(3, dtype=r.dtype)[torch.randperm(3)]


def categories(r: Tensor) -> Tensor:
    p = r.softmax(0)
    return torch.multinomial(p, 2).sum() * r + distributions.Categorical(p).sample() * r


def attention(r: Tensor) -> Tensor:
    q = torch.outer(r, r)[None]
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)[0, 0]


FUNCTIONS: dict[str, Function] = {
    "rand": lambda r: r * torch.rand(3, dtype=r.dtype),
    "randn_like": lambda r: r * torch.randn_like(r),
    "randint": lambda r: r * torch.randint(0, 9, (3,)),
    "dropout": lambda r: F.dropout(r, 0.5) * r,
    "feature dropout": lambda r: F.dropout1d(torch.outer(r, r), 0.5).sum(0),
    "alpha dropout": lambda r: F.alpha_dropout(r, 0.5, training=True),
    "bernoulli": lambda r: torch.bernoulli(r.sigmoid()) * r,
    "normal": lambda r: torch.normal(r, r.exp()) * r,
    "poisson": lambda r: torch.poisson(r.exp()) * r,
    "gamma": lambda r: distributions.Gamma(r.exp(), 1.0).rsample() * r,
    "beta": lambda r: distributions.Beta(r.exp(), r.exp()).sample() * r,
    "student": lambda r: distributions.StudentT(r.exp() + 2).sample() * r,
    "gumbel": lambda r: F.gumbel_softmax(r, hard=False),
    "rrelu": lambda r: F.rrelu(r, training=True),
    "in place": filled, "several": several, "categories": categories, "attention": attention,
}  # fmt: skip


def batch(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_function_itself_draws_what_a_replay_draws(name: str, randomness: str) -> None:
    f = FUNCTIONS[name]
    replayed = shardmap.vmap(f, randomness=randomness)
    own = shardmap.vmap(looped(f), randomness=randomness, max_paths=1)
    parts = shardmap.vmap(looped(f), randomness=randomness, max_paths=1, chunk_size=3)
    for size in (7, 1, 3, 7):
        x = batch(size)
        found = []
        for run in (replayed, own, parts):
            torch.manual_seed(size)
            rows = x.clone().requires_grad_()
            out = run(rows)
            found.append((out.detach(), torch.autograd.grad(out.sum(), rows)[0], torch.rand(2)))
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-12)


def test_generators_of_the_user() -> None:
    generator = torch.Generator()

    def f(r: Tensor) -> Tensor:
        y = r * torch.rand(3, dtype=r.dtype, generator=generator) + torch.randn_like(r)
        return y * torch.empty_like(r).normal_(0, 1, generator=generator)

    x, found = batch(7), []
    for run in (f, looped(f)):
        mapped = shardmap.vmap(run, randomness="different", max_paths=1)
        torch.manual_seed(0)
        generator.manual_seed(5)
        found.append((mapped(x), torch.rand(2), torch.rand(2, generator=generator)))
    torch.testing.assert_close(found[1], found[0])


def stops_by_a_draw(r: Tensor) -> Tensor:
    y, factor = r.detach() + 3, 1.0
    for _ in range(3):
        factor = factor * (1 + 0.1 * torch.randn((), dtype=r.dtype))
        y = y - 0.004 * y**3 + 0.1 * torch.randn_like(y)
        if y[0] > 3.5:
            break
    return r * factor


def as_often_as_asked(r: Tensor) -> Tensor:
    factor = 1.0
    for _ in range(1 + int(r[0].abs() * 2)):
        factor = factor * (1 + 0.1 * torch.randn((), dtype=r.dtype))
    return r * factor


WAYS: list[dict[str, Any]] = [
    {}, {"chunk_size": 3}, {"trace": "once"}, {"trace": "each"}, {"max_paths": 2},
    {"devices": ["cpu", "cpu"], "chunk_size": 5}, {"remat": True, "chunk_size": 3},
]  # fmt: skip


@pytest.mark.parametrize("f", [stops_by_a_draw, as_often_as_asked])
def test_other_batches_options_and_earlier_calls_change_no_draw(f: Function) -> None:
    first: dict[int, Tensor] = {}
    for way in WAYS:
        shardmap.clear_caches()
        mapped = shardmap.vmap(f, randomness="different", **way)
        for size in (7, 7, 40, 1, 7, 202, 40, 7, 1, 202):
            torch.manual_seed(0)
            found = mapped(batch(size).requires_grad_(size == 40)).detach()
            assert torch.equal(found, first.setdefault(size, found)), (way, size)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("f", [stops_by_a_draw, as_often_as_asked])
def test_checkpoints_around_have_the_draws_of_the_call(
    f: Function, reentrant: bool, way: dict[str, Any]
) -> None:
    shardmap.clear_caches()
    mapped = shardmap.vmap(f, randomness="different", **way)
    torch.manual_seed(0)
    for _ in range(3):
        pairs = []
        for size in (7, 40, 202):
            x = batch(size, size).requires_grad_()
            pairs.append((x, checkpoint(mapped, x, use_reentrant=reentrant)))
        for x, out in reversed(pairs):
            (gradient,) = torch.autograd.grad(out.sum(), x) if not reentrant else (None,)
            if reentrant:
                out.sum().backward()
                gradient = x.grad
            torch.testing.assert_close(gradient * x, out)


def test_a_checkpoint_inside_draws_the_same_again() -> None:
    def part(r: Tensor) -> Tensor:
        return F.dropout(r, 0.5) * r.detach().sign()

    def f(r: Tensor) -> Tensor:
        out = checkpoint(part, r, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out + F.dropout(r, 0.5) if r[0].item() > 0.5 else out * (1 + 0 * r[1].item())

    x = batch(40).requires_grad_()
    mapped = shardmap.vmap(f, randomness="different", max_paths=1)
    for _ in range(3):
        out = mapped(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(gradient * x, out)


def test_seeds_that_one_path_sets_are_followed() -> None:
    def f(r: Tensor) -> Tensor:
        if r[0].item() > 0:
            torch.manual_seed(3)
            return r.new_tensor(2.0) * torch.rand(3, dtype=r.dtype)
        return torch.rand(3, dtype=r.dtype) - 2 + 0 * r[1].item()

    x = batch(20)
    x[0, 0] = -1  # the first sample sets none
    found = shardmap.vmap(f, randomness="different", max_paths=1)(x)
    torch.manual_seed(3)
    expected = 2 * torch.rand(3, dtype=x.dtype)
    seeded = x[:, 0] > 0
    torch.testing.assert_close(found[seeded], expected.expand(int(seeded.sum()), 3))
    assert len(found[~seeded].unique()) == 3 * int((~seeded).sum())
