"""`bincount`, `histc`, `histogram` and `histogramdd`, compared with the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from tests.rules.against_loop import below, real
from tests.rules.everywhere import everywhere


def flat(*results: Any) -> tuple[torch.Tensor, ...]:
    """Nested results as one tuple."""
    return tuple(torch.utils._pytree.tree_leaves(results))


COUNTS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "values": (lambda x: torch.bincount(x, minlength=7), [below(6, 9)]),
    "int32": (lambda x: torch.bincount(x.to(torch.int32), minlength=7), [below(6, 9)]),
    "largest": (lambda x: torch.bincount(torch.cat([x, torch.tensor([5])])), [below(6, 9)]),
    "weights": (lambda x, w: torch.bincount(x, w, minlength=7), [below(6, 9), real(9)]),
    "float32 weights": (
        lambda x, w: torch.bincount(x, w.float(), minlength=7),
        [below(6, 9), real(9)],
    ),
    "integer weights": (
        lambda x, w: torch.bincount(x, w, minlength=7),
        [below(6, 9), below(4, 9)],
    ),
    "histc": (lambda x: torch.histc(x, 10, -2, 2), [real(30)]),
    "histc of matrices": (lambda x: torch.histc(x, 4), [real(5, 3)]),
    "histc of one value": (lambda x: torch.histc(x * 0 + 2, 4), [real(3)]),
    "histogram": (lambda x: flat(torch.histogram(x, 6, range=(-2.0, 2.0))), [real(30)]),
    "histogram of matrices": (lambda x: flat(torch.histogram(x, 6)), [real(5, 3)]),
    "density": (
        lambda x, w: flat(torch.histogram(x, 6, weight=w.abs(), density=True)),
        [real(30), real(30)],
    ),
    "numbers": (
        lambda x, w: flat(torch.histogram(x, 1, weight=w.abs() + 1, density=True)),
        [real(), real()],
    ),
    "edges": (lambda x, e: flat(torch.histogram(x, e.sort().values)), [real(30), real(6)]),
    "two dimensions": (
        lambda x: flat(torch.histogramdd(x, [3, 4], range=[-2.0, 2.0, -1.0, 1.0])),
        [real(30, 2)],
    ),
    "extremes in two dimensions": (
        lambda x, w: flat(torch.histogramdd(x, [3, 4], weight=w.abs(), density=True)),
        [real(30, 2), real(30)],
    ),
    "edges in two dimensions": (
        lambda x, e, f: flat(torch.histogramdd(x, [e.sort().values, f.sort().values])),
        [real(30, 2), real(4), real(5)],
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    func, makers = COUNTS[name]
    everywhere(func, *makers, gradient=False)


def test_samples_of_different_lengths_are_counted_in_groups() -> None:
    rows = torch.tensor([[0, 1, 2, 2], [0, 5, 5, 5], [2, 1, 0, 0], [5, 0, 0, 1]])
    mine = shardmap.vmap(lambda x: torch.bincount(x).square().sum(), strict=True)(rows)
    assert torch.equal(mine, torch.stack([torch.bincount(r).square().sum() for r in rows]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_elements_on_edges_fall_into_the_bins_of_the_kernel(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 40, (), generator=generator))
    low, high = sorted(torch.randn(2, generator=generator).tolist())
    edges = torch.linspace(low, high, count + 1, dtype=dtype)
    near = [edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1)]
    x = torch.stack([torch.cat(near)[torch.randperm(3 * (count + 1))] for _ in range(4)])
    x[:, :3] += torch.arange(4).unsqueeze(1)
    for func in (
        lambda r: torch.histc(r, count, low, high),
        lambda r: torch.histc(r, count),
        lambda r: torch.histogram(r, count, range=(low, high))[0],
        lambda r: torch.histogram(r, count)[0],
        lambda r: torch.histogram(r, edges)[0],
    ):
        mine = shardmap.vmap(func, strict=True)(x)
        assert torch.equal(mine, torch.stack([func(r) for r in x]))


def test_what_the_kernel_refuses_is_refused() -> None:
    x = torch.randn(3, 4)
    x[1, 2] = torch.nan
    with pytest.raises(RuntimeError, match="is not finite"):
        shardmap.vmap(lambda r: torch.histc(r, 5))(x)
    with pytest.raises(RuntimeError, match="is not finite"):
        shardmap.vmap(lambda r: torch.histogram(r, 5)[0])(x)
    with pytest.raises(RuntimeError, match="non-negative"):
        shardmap.vmap(lambda r: torch.bincount(r, minlength=4))(torch.tensor([[0, 1], [2, -1]]))
