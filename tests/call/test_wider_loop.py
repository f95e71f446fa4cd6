"""Looped samples whose outputs are of wider dtypes than the first one's: as `torch.stack` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.call import execute
from shardmap.call.memo import Prepared
from tests import oracle
from tests.call.paths import batch

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The loop is what is tested; nothing is known from other tests."""
    shardmap.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
        yield


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 3": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "off": {"check": "off"},
    "one by one": {"max_paths": 1},
    "drawing": {"randomness": "different"},
}

FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "zeros": lambda r: torch.zeros(3) if r[0] > 0 else r,
    "float": lambda r: r.float() if r[0] > 0 else r,
    "number": lambda r: 0 if r[0] > 0 else r.sum(),
    "pair": lambda r: (r, False) if r[0] > 0 else (r, r.sum()),
    "int32": lambda r: (5 * r).int() if r[0] > 0 else (5 * r).int().cumsum(0),
    "in steps": lambda r: (r > 0) if r[0] > 0 else r.half() if r[1] > 0 else r.long() + r,
    "crossing": lambda r: (r.half(), r) if r[0] > 0 else (r, r.half()),
}


GRADIENTS: dict[str, Callable[[Tensor], Any]] = {
    "none for one": lambda r: torch.zeros(3, dtype=torch.float64) if r[0] > 0 else r.sin(),
    "detached": lambda r: (r.detach(), r) if r[0] > 0 else (2 * r, r.detach()),
    "none": lambda r: r.detach() if r[0] > 0 else 2 * r.detach(),
}
"""Functions that give gradients for some samples only; all of one dtype."""


def samples(size: int) -> Tensor:
    """Samples of which the first answers yes, and others either."""
    x = batch(size).double()
    if size:
        x[0, 0] = 1.0
    return x


def stacked(function: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """The results of the loop, output by output."""
    rows = [function(r) for r in x]
    columns = zip(*rows, strict=True) if isinstance(rows[0], tuple) else [rows]
    return [torch.stack([torch.as_tensor(v) for v in column]) for column in columns]


def flat(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_torch_stack_promotes(name: str, way: str) -> None:
    function, mapped = FUNCTIONS[name], shardmap.vmap(FUNCTIONS[name], **WAYS[way])
    for size in (1, 3, 13, 61):
        want = stacked(function, samples(size))
        for _ in range(2):
            found = flat(mapped(samples(size)))
            for got, expected in zip(found, want, strict=True):
                oracle.assert_same(got, expected, f"{name}, {size}")


@pytest.mark.parametrize("name", ["zeros", "float", "number", "in steps"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"max_paths": 1}])
def test_reduced(name: str, options: dict[str, Any]) -> None:
    (want,) = stacked(FUNCTIONS[name], samples(13))
    found = shardmap.vmap(FUNCTIONS[name], reduce="sum", **options)(samples(13))
    torch.testing.assert_close(found, want.sum(0))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*GRADIENTS, "zeros", "float", "number", "pair", "crossing"])
def test_gradients(name: str, way: str) -> None:
    """Also where the first sample's results have none, and where no sample's have."""
    function: Callable[[Tensor], Any] = (FUNCTIONS | GRADIENTS)[name]
    mapped, found, flags = shardmap.vmap(function, **WAYS[way]), [], []
    for run in (lambda t: flat(mapped(t)), lambda t: stacked(function, t)):
        x = samples(13).requires_grad_()
        outputs = run(x)
        flags.append([t.requires_grad for t in outputs])
        total = x.sum() + sum(t.double().sin().sum() for t in outputs)
        found.append(torch.autograd.grad(total, x)[0])
    assert flags[0] == flags[1]
    oracle.assert_same(found[0], found[1], "gradient")


def test_a_dtype_that_does_not_widen_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is not repeated for what has been asked for already."""

    def forgetful(prepared: Prepared, wider: object) -> Prepared:
        return prepared

    monkeypatch.setattr(execute, "widened", forgetful)
    with pytest.raises(AssertionError, match="already"):
        shardmap.vmap(FUNCTIONS["float"])(
            batch(13).double().abs() * torch.tensor([1, -1] * 7)[:13, None]
        )


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"max_paths": 1}])
@pytest.mark.parametrize("name", ["none for one", "zeros", "float"])
def test_gradients_of_a_sum(name: str, options: dict[str, Any]) -> None:
    function: Callable[[Tensor], Any] = (FUNCTIONS | GRADIENTS)[name]
    mapped, found = shardmap.vmap(function, reduce="sum", **options), []
    for run in (mapped, lambda t: stacked(function, t)[0].sum(0)):
        x = samples(13).requires_grad_()
        found.append(torch.autograd.grad(run(x).sin().sum(), x)[0])
    oracle.assert_same(found[0], found[1], "gradient")


def test_a_store_is_not_made_anew(tmp_path: Any) -> None:
    """It is refused in words, and the remedy works."""
    function, x = FUNCTIONS["zeros"], samples(13)
    with pytest.raises(errors.VariesError, match="return one dtype for all samples"):
        shardmap.vmap(function, out=shardmap.MemmapSink(tmp_path / "a"))(x)
    same = lambda r: function(r).double()
    store = shardmap.vmap(same, out=shardmap.MemmapSink(tmp_path / "b"))(x)
    oracle.assert_same(store.read("result", 0, 13), stacked(same, x)[0], "stored")
