"""The cheaper mode is chosen before anything is recorded: samples that take different paths."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import functional

import shardmap
from shardmap.transforms.first_order import FirstOrder

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Samples may be looped, which is no matter here."""
    shardmap.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
        yield


def factor(a: Tensor) -> Tensor:
    """The Cholesky factor of a symmetric matrix, with as much on its diagonal as that takes."""
    s, jitter = a + a.T, 0.0
    lower = s
    for _ in range(12):
        lower, info = torch.linalg.cholesky_ex(s + jitter * torch.eye(3, dtype=s.dtype))
        if info == 0:
            break
        jitter = max(2 * jitter, 0.5)
    return lower


def halved(a: Tensor) -> Tensor:
    """A matrix, halved until it is small."""
    while a.abs().sum() > 2:
        a = a.sin() / 2
    return a @ a


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 3": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "off": {"check": "off"},
    "always": {"check": "always"},
    "one by one": {"max_paths": 1},
}


def matrices(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 3, generator=generator, dtype=torch.float64)


def looped(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found = [functional.jacobian(function, r) for r in x]
    tensors = [t for t in found if isinstance(t, Tensor)]
    assert len(tensors) == len(x)
    return torch.stack(tensors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", [factor, halved], ids=lambda f: f.__name__)
def test_auto(function: Callable[[Tensor], Tensor], way: str) -> None:
    mapped = shardmap.jacobian(function, **WAYS[way])
    for size in (1, 3, 13):
        x = matrices(size)
        for _ in range(2):
            torch.testing.assert_close(mapped(x), looped(function, x), rtol=1e-9, atol=1e-9)
    assert mapped.method in ("reverse", "forward")


def test_plans_and_comparisons() -> None:
    x = matrices(13)
    planned = shardmap.jacobian(factor).plan(x)
    torch.testing.assert_close(planned.run(), looped(factor, x), rtol=1e-9, atol=1e-9)
    assert shardmap.jacobian(factor).compare(x, samples=13).agrees


def test_chosen_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each sample has a shape of its own, and where there is no sample."""
    found: list[str] = []
    cheaper = FirstOrder.cheaper

    def counted(self: FirstOrder) -> str:
        found.append(cheaper(self))
        return found[-1]

    monkeypatch.setattr(FirstOrder, "cheaper", counted)
    rows = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in (2, 5, 2, 3)]
    mapped = shardmap.jacobian(lambda r: r.sin().cumsum(0), ragged="list")
    for _ in range(2):
        got = mapped(shardmap.Ragged(rows))
        for t, r in zip(got, rows, strict=True):
            want = functional.jacobian(lambda v: v.sin().cumsum(0), r)
            torch.testing.assert_close(t, want)
    assert len(found) == 3
    assert shardmap.jacobian(halved)(matrices(0)).shape == (0, 3, 3, 3, 3)


class Counting:
    """An argument that looks different each time."""

    seen = 0

    def __repr__(self) -> str:
        Counting.seen += 1
        return f"Counting({Counting.seen})"


def test_an_argument_that_never_looks_the_same() -> None:
    """The choice ends."""
    x = matrices(13)
    mapped = shardmap.jacobian(lambda a, count: halved(a), in_dims=(0, None))
    for _ in range(2):
        got = mapped(x, Counting())
        torch.testing.assert_close(got, looped(halved, x), rtol=1e-9, atol=1e-9)
