"""Derivatives and gradients of functions that draw: a sample's draws are those of all directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from tests.call.ways import WAYS

WAYS_OF_DIRECTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "two_lanes": WAYS["two_lanes"],
    "once": WAYS["once"],
    "each": {"trace": "each"},
    "one_direction": {"seed_chunk_size": 1},
    "three_directions": {"seed_chunk_size": 3, "chunk_size": 2},
}
W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
RANDOMNESS = pytest.mark.parametrize("randomness", ["different", "same"])


def computed(r: dict[str, Tensor], s: Tensor, mask: Tensor) -> dict[str, Tensor]:
    inner = torch.tanh(W @ r["a"] * s.square().sum() + W[:, :2] @ r["b"].sin())
    return {"whole": inner * mask, "sum": (inner.square() * mask).sum()}


def drawing(r: dict[str, Tensor], s: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    mask = torch.bernoulli(torch.full((6,), 0.5, dtype=s.dtype)) + 0.5 * torch.rand(
        6, dtype=s.dtype
    )
    return computed(r, s, mask), mask


def samples(count: int) -> tuple[dict[str, Tensor], Tensor]:
    draw = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    made = {"a": torch.randn(count, 4, **draw), "b": torch.randn(count, 2, **draw)}
    return made, torch.randn(count, 3, **draw)


def looped(transform: Any, batch: Any, masks: Tensor) -> Any:
    """What the loop gives with the draws of the map."""
    made, s = batch
    rows = [
        transform({k: v[i] for k, v in made.items()}, s[i], masks[i]) for i in range(len(masks))
    ]
    return pytree.tree_map(lambda *parts: torch.stack(parts), *rows)


def assert_close(found: Any, wanted: Any) -> None:
    found, of_found = pytree.tree_flatten(found)
    wanted, of_wanted = pytree.tree_flatten(wanted)
    assert of_found == of_wanted
    torch.testing.assert_close(found, wanted)


def assert_drawn_as(randomness: str, masks: Tensor) -> None:
    assert len(masks.round(decimals=9).unique(dim=0)) == (1 if randomness == "same" else len(masks))


@RANDOMNESS
@pytest.mark.parametrize("way", WAYS_OF_DIRECTIONS)
@pytest.mark.parametrize("argnums", [0, (0, 1)])
@pytest.mark.parametrize("transform", [shardmap.jacfwd, shardmap.jacrev, shardmap.jacobian])
def test_all_directions_are_of_the_same_draws(
    transform: Any, argnums: Any, way: str, randomness: str
) -> None:
    batch = samples(5)
    options = {"randomness": randomness, **WAYS_OF_DIRECTIONS[way]}
    mapped = transform(drawing, argnums=argnums, has_aux=True, **options)
    wanted = torch.func.jacrev(computed, argnums=argnums)
    drawn = []
    for _ in range(4):
        found, masks = mapped(*batch)
        assert_drawn_as(randomness, masks)
        assert_close(found, looped(wanted, batch, masks))
        drawn.append(masks)
    assert not torch.equal(drawn[0], drawn[3])


@RANDOMNESS
@pytest.mark.parametrize("way", WAYS_OF_DIRECTIONS)
@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_second_derivatives_are_of_the_same_draws(argnums: Any, way: str, randomness: str) -> None:
    """The draws are found from the derivatives, for `hessian` has no aux."""

    def scaled(r: Tensor, s: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        each = (r * s[:1]).sum().pow(2) + r.pow(2).sum() + s.pow(3).sum()
        return each * mask, torch.stack([each, each.sin()]) * mask

    def drawing(r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return scaled(r, s, torch.rand((), dtype=r.dtype) + 1)

    made, s = samples(5)
    r = made["a"]
    mapped = shardmap.hessian(
        drawing, argnums=argnums, randomness=randomness, **WAYS_OF_DIRECTIONS[way]
    )
    one = torch.ones((), dtype=r.dtype)
    rows = [
        torch.func.hessian(scaled, argnums=argnums)(a, b, one) for a, b in zip(r, s, strict=True)
    ]
    unscaled = pytree.tree_map(lambda *parts: torch.stack(parts), *rows)
    for _ in range(4):
        found = mapped(r, s)
        first, whole = pytree.tree_leaves(found)[0], pytree.tree_leaves(unscaled)[0]
        masks = first.flatten(1)[:, 0] / whole.flatten(1)[:, 0]
        assert_drawn_as(randomness, masks)
        assert bool(((masks > 1) & (masks < 2)).all())
        wanted = pytree.tree_map(lambda t, m=masks: t * m.view(-1, *[1] * (t.dim() - 1)), unscaled)
        assert_close(found, wanted)


@RANDOMNESS
def test_the_same_seed_gives_the_same_draws_however_computed(randomness: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    rows = samples(7)[0]["a"]
    found = []
    for options in ({}, {"chunk_size": 3, "seed_chunk_size": 2, "devices": ["cpu", "cpu"]}):
        torch.manual_seed(3)
        found.append(shardmap.jacfwd(model, randomness=randomness, **options)(rows))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("transform", [shardmap.jacfwd, shardmap.jacobian, shardmap.hessian])
def test_the_remedy_of_a_function_that_draws(transform: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).double()
    rows = samples(3)[0]["a"]
    with pytest.raises(errors.RandomnessError, match="pass randomness='different'"):
        transform(model)(rows)
    assert transform(model, randomness="different")(rows).shape[0] == 3
    assert transform(model.eval())(rows).shape[0] == 3


def a_model(normed: bool) -> nn.Module:
    torch.manual_seed(0)
    norm = [nn.LayerNorm(8)] if normed else []
    return nn.Sequential(
        nn.Linear(4, 8), nn.Dropout(0.5), *norm, nn.ReLU(), nn.Linear(8, 2)
    ).double()


@RANDOMNESS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("normed", [False, True])
def test_inner_products_of_gradients_are_of_the_draws_of_the_map(
    normed: bool, way: str, randomness: str
) -> None:
    """The gradients that are stacked under the same seed have the same draws."""
    rows = samples(13)[0]["a"]
    labels = torch.arange(13) % 2
    model, options = a_model(normed), {"randomness": randomness, **WAYS[way]}
    stacking = shardmap.per_sample_grad(model, F.cross_entropy, flat=True, **options)
    comparing = shardmap.per_sample_grad(model, F.cross_entropy, reduce="gram", **options)
    together = shardmap.reduce.together(g="gram", n="norm")
    both = shardmap.per_sample_grad(model, F.cross_entropy, reduce=together, **options)
    for seed in (5, 6, 6, 7):
        torch.manual_seed(seed)
        flat = stacking(rows, labels)
        torch.manual_seed(seed)
        torch.testing.assert_close(comparing(rows, labels), flat @ flat.T)
        torch.manual_seed(seed)
        found = both(rows, labels)
        torch.testing.assert_close(found["g"], flat @ flat.T)
        torch.testing.assert_close(found["n"], flat.norm(dim=1))


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@RANDOMNESS
def test_inner_products_of_what_is_run_by_sample(randomness: str) -> None:
    def drawing(r: Tensor) -> Tensor:
        noisy = r + torch.rand(4, dtype=r.dtype)
        return noisy * 2 if float(noisy.sum()) > 2 else noisy.sin()

    rows = samples(9)[0]["a"]
    found, n = shardmap.vmap(
        lambda r: (t := drawing(r), t.norm()), reduce=("gram", None), randomness=randomness
    )(rows)
    torch.testing.assert_close(found.diagonal().sqrt(), n)


@RANDOMNESS
def test_inner_products_of_a_plan(randomness: str) -> None:
    rows, labels, model = samples(13)[0]["a"], torch.arange(13) % 2, a_model(False)
    options = {"randomness": randomness, "chunk_size": 4}
    planned = shardmap.per_sample_grad(model, F.cross_entropy, reduce="gram", **options)
    torch.manual_seed(5)
    found = planned.plan(rows, labels).run()
    torch.manual_seed(5)
    flat = shardmap.per_sample_grad(model, F.cross_entropy, flat=True, **options)(rows, labels)
    torch.testing.assert_close(found, flat @ flat.T)


@RANDOMNESS
@pytest.mark.parametrize("way", WAYS_OF_DIRECTIONS)
def test_all_derivatives_have_the_draws_of_the_map(way: str, randomness: str) -> None:
    """At a seed: of a quadratic form in what is drawn, the Hessian gives the value again."""
    options: dict[str, Any] = {"randomness": randomness, **WAYS_OF_DIRECTIONS[way]}
    x = samples(5)[0]["a"]

    def form(r: Tensor) -> Tensor:
        return (torch.randn(4, dtype=r.dtype) * r).square().sum()

    plain = {k: v for k, v in options.items() if k != "seed_chunk_size"}
    mapped, jacobians = shardmap.vmap(form, **plain), shardmap.jacobian(form, **options)
    hessians = shardmap.hessian(form, **options)
    for seed in range(4):
        torch.manual_seed(seed)
        value = mapped(x)
        torch.manual_seed(seed)
        torch.testing.assert_close((jacobians(x) * x).sum(1) / 2, value)
        torch.manual_seed(seed)
        torch.testing.assert_close(torch.einsum("ni,nij,nj->n", x, hessians(x), x) / 2, value)
