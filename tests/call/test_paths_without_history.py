"""Samples of some paths have results with a history, those of others have none, as in the loop."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap

SIDES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "both": lambda x, w: x * w,
    "detached": lambda x, w: (x * w).detach(),
    "of_the_weight": lambda x, w: x.detach() * w,
    "constant": lambda x, w: torch.zeros(3, dtype=torch.float64),
    "of_the_sample": lambda x, w: x**2,
    "no_grad": lambda x, w: _under_no_grad(x, w),
    "detached_in_place": lambda x, w: (x * w).sin().detach_(),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"chunk_size": 7},
    "lanes": {"chunk_size": 5, "devices": ["cpu", "cpu"]},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
    "remat": {"remat": True, "chunk_size": 16},
    "summed": {"reduce": "sum"},
    "mean": {"reduce": "mean", "chunk_size": 16},
}
SIZES = ((150, 40), (40, 150), (150, 5), (5, 150), (1, 2), (100, 100))
"""Samples on either side: of both a path is recorded, of one, or of none."""


def _under_no_grad(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        return (x * w).exp()


def rows(left: int, right: int) -> Tensor:
    found = torch.rand(left + right, 3, dtype=torch.float64) + 0.1
    found[torch.randperm(left + right)[:left]] *= -1
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("left", "right"), list(itertools.permutations(SIDES, 2)))
def test_gradients_are_the_loops(left: str, right: str, way: str) -> None:
    torch.manual_seed(0)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = SIDES[left] if x.sum() < 0 else SIDES[right]
        return chosen(x, weight), (x * 2).detach()

    options = WAYS[way]
    mapped = shardmap.vmap(function, **options)
    for of_left, of_right in SIZES:
        batch = rows(of_left, of_right).requires_grad_()
        wanted = [torch.stack(column) for column in zip(*map(function, batch), strict=True)]
        if "reduce" in options:
            wanted = [t.sum(0) if options["reduce"] == "sum" else t.mean(0) for t in wanted]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", shardmap.errors.SlowLoopWarning)
            found = mapped(batch)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
            assert a.requires_grad == b.requires_grad
        if wanted[0].requires_grad:
            factors = torch.rand_like(wanted[0])
            leaves = batch, weight
            got, expected = [
                torch.autograd.grad(
                    (result[0].square() * factors).sum(), leaves, allow_unused=True,
                    materialize_grads=True,
                )
                for result in (found, wanted)
            ]  # fmt: skip
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduce", [None, "sum"])
def test_a_hit_has_a_gradient_where_most_rays_miss(reduce: str | None) -> None:
    """The first call, and samples with a history that are too few for a path of their own."""
    torch.manual_seed(0)

    def hit(origin: Tensor, ray: Tensor) -> Tensor:
        ray = ray / ray.norm()
        b = origin @ ray
        disc = b * b - origin @ origin + 1
        if disc < 0:
            return torch.tensor(-1.0)
        t = -b - disc.sqrt()
        return t if t > 0 else -b + disc.sqrt()

    origins, rays = (torch.randn(150, 3) * 1.5).requires_grad_(), torch.randn(150, 3)
    wanted = torch.stack([hit(o, r) for o, r in zip(origins, rays, strict=True)])
    wanted = wanted if reduce is None else wanted.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.errors.SlowLoopWarning)
        found = shardmap.vmap(hit, reduce=reduce)(origins, rays)
    torch.testing.assert_close(found, wanted)
    got, expected = [torch.autograd.grad(t.sum(), origins)[0] for t in (found, wanted)]
    torch.testing.assert_close(got, expected)
    assert int((expected != 0).any(1).sum()) > 10
