"""Functions whose forward leaves torch are batched by their own `vmap` staticmethod."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap import errors
from shardmap.program.own_function import application, text_of
from tests.loop import loop
from tests.trace import numpy_functions as own

W = torch.linspace(-1.0, 2.0, 4)
S = torch.tensor([0.3, -0.2, 0.9, 0.1], requires_grad=True)


def ordered(row: Tensor, dim: int = -1) -> Tensor:
    return own.NumpySort.apply(row, dim)[0]


def total(row: Tensor) -> Tensor:
    return (ordered(row * 2) * W).sin().sum()


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "sorted": lambda r: ordered(r * W) + 1,
    "of_the_sample": ordered,
    "indices": lambda r: own.NumpySort.apply(r.outer(r), 0),
    "gradient": torch.func.grad(total),
    "second_gradient": torch.func.jacrev(torch.func.grad(total)),
    "taken_inside": lambda r: torch.autograd.grad(total(t := r.clone().requires_grad_()), t)[0],
    "one_argument_shared": lambda r: own.NumpyScale.apply(r, W),
    "default_argument": lambda r: own.NumpyScale.apply(W, r * 2).sin(),
    "with_a_number": lambda r: own.NumpyScale.apply(r, r.exp(), 0.5),
    "of_weights": lambda r: own.NumpyScale.apply(r, S, 3.0),
    "of_weights_alone": lambda r: own.NumpyScale.apply(S, S.exp(), 3.0) * r,
    "several": lambda r: ordered(own.NumpyScale.apply(ordered(r), W)) * r,
    "gradient_of_a_product": torch.func.grad(lambda r: own.NumpyScale.apply(r, r, 0.5).sum()),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 2},
    {"devices": ["cpu", "cpu"]},
    {"trace": "once"},
    {"trace": "each", "chunk_size": 2},
    {"remat": True},
]


@pytest.fixture(autouse=True)
def no_loop() -> Iterator[None]:
    """A loop over the samples fails a test that does not ask for it."""
    own.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.SlowLoopWarning)
        yield


def batch(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed + size))


def same(got: Any, want: Any) -> None:
    got, want = (v if isinstance(v, tuple | list) else (v,) for v in (got, want))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
        assert a.requires_grad == b.requires_grad


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str, options: dict[str, Any]) -> None:
    function = FUNCTIONS[name]
    mapped = shardmap.vmap(function, **options)
    for size, seed in ((5, 0), (5, 1), (3, 2), (1, 3)):
        x = batch(size, seed)
        same(mapped(x), loop(function)(x))
    if name != "of_weights_alone":
        assert own.calls, "its own `vmap` was called"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("indices", "taken_inside")])
def test_outer_gradients(name: str, options: dict[str, Any]) -> None:
    function = FUNCTIONS[name]
    mapped = shardmap.vmap(function, **options)
    for seed in (0, 1):
        x = batch(5, seed).requires_grad_()
        wrt = (x, S) if "weights" in name else (x,)
        weights = loop(function)(x).detach().cos()
        found = [
            torch.autograd.grad((way(x) * weights).sum(), wrt) for way in (mapped, loop(function))
        ]
        same(*found)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "vmap"])
def test_transforms_around_the_map(transform: str) -> None:
    x = batch(5)

    def around(way: Callable[..., Tensor]) -> Any:
        if transform == "grad":
            return torch.func.grad(lambda x: way(x).sin().sum())(x)
        if transform == "vjp":
            return torch.func.vjp(way, x)[1](x.cos())
        if transform == "jacrev":
            return torch.func.jacrev(way)(x)
        return torch.func.vmap(way)(torch.stack([x, x.cos(), -x]))

    if transform == "vmap":
        want = torch.stack([loop(FUNCTIONS["sorted"])(t) for t in (x, x.cos(), -x)])
    else:
        want = around(loop(FUNCTIONS["sorted"]))
    same(around(shardmap.vmap(FUNCTIONS["sorted"])), want)


def test_transforms_of_ours() -> None:
    x = batch(5)
    want = torch.stack([torch.func.jacrev(FUNCTIONS["several"])(r) for r in x])
    same(shardmap.jacrev(FUNCTIONS["several"])(x), want)
    same(
        shardmap.vmap(shardmap.vmap(ordered))(torch.stack([x, -x])),
        torch.stack([x, -x]).sort().values,
    )


def test_the_map_of_torch_gives_the_same() -> None:
    x = batch(7)
    for name in ("sorted", "gradient", "of_weights"):
        same(shardmap.vmap(FUNCTIONS[name])(x), torch.func.vmap(FUNCTIONS[name])(x))


def test_dimensions_stores_and_sums(tmp_path: Path) -> None:
    x, function = batch(5), FUNCTIONS["sorted"]
    want = loop(function)(x)
    same(shardmap.vmap(function, in_dims=1, out_dims=1)(x.T.contiguous()), want.T)
    same(shardmap.vmap(function, reduce="sum", chunk_size=2)(x), want.sum(0))
    sink = shardmap.MemmapSink(tmp_path / "store")
    store = shardmap.vmap(function, out=sink, chunk_size=2)(x)
    same(store.read(0, 0, 5), want)
    assert shardmap.vmap(function)(x[:0]).shape == (0, 4)


def test_each_call_of_the_batch_is_one_call_of_its_vmap() -> None:
    mapped = shardmap.vmap(lambda r: ordered(r) * 2, chunk_size=None)
    mapped(batch(7))
    own.calls.clear()
    mapped(batch(7, 1))
    assert own.calls == ["sort 7 error"]
    assert own.NumpySort.forward.__code__.co_filename == own.__file__


def test_a_wrong_vmap_is_found() -> None:
    """As for every rule: served by the loop, with a warning that names it."""
    x = batch(5)

    def function(r: Tensor) -> Tensor:
        return own.Wrong.apply(r, W)

    with pytest.warns(errors.SlowLoopWarning, match="own_function"):
        got = shardmap.vmap(function)(x)
    same(got, loop(function)(x))


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda r: own.Writes.apply(r.clone(), W), errors.AutogradFunctionError, "clone it first"),
        (lambda r: own.Draws.apply(r, W), errors.RandomnessError, "pass them as an argument"),
        (lambda r: own.Unmapped.apply(r), errors.EscapeError, "custom_op"),
        (lambda r: torch.tensor(own.to_numpy(r)), errors.EscapeError, "custom_op"),
    ],
)
def test_refusals(function: Callable[[Tensor], Tensor], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        shardmap.vmap(function)(batch(3))


def test_the_remedies() -> None:
    x = batch(5)
    same(shardmap.vmap(lambda r: own.NumpyScale.apply(r.clone(), W))(x), x * W * 2)
    drawn = torch.rand(5)
    found = shardmap.vmap(lambda r, u: own.NumpyScale.apply(r, u, 1.0))(x, drawn)
    same(found, x * drawn[:, None])


def test_another_process_does_not_know_the_function() -> None:
    """Its number or its name are others there; the error says what to do."""
    text = text_of(own.NumpyScale, (torch.ones(2), torch.ones(2), 1.0))
    assert text is not None
    for other in (text.replace("NumpyScale", "Another"), "[-1, " + text.partition(", ")[2]):
        with pytest.raises(errors.AutogradFunctionError, match="register_vmap"):
            application(other)
    assert application(text).function is own.NumpyScale
    assert text_of(own.NumpyScale, (torch.ones(2), object())) is None


sort = own.NumpySort.apply
"""As users name it: the method is taken before anything is recorded."""


def test_a_function_by_the_name_of_its_apply() -> None:
    x = batch(5)
    same(shardmap.vmap(lambda r: sort(r, 0)[0])(x), x.sort().values)
    same(shardmap.vmap(own.NumpyScale.apply, (0, None))(x, W), x * W * 2)


class Heir(own.NumpyScale):
    """It inherits its forward, and maps itself in its own way."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, int]:
        own.calls.append("heir")
        given = [t if d is None else t.movedim(d, 0) for t, d in zip((x, y), in_dims, strict=False)]
        return Heir.apply(*given, scale), 0


def test_a_function_that_inherits_its_forward() -> None:
    x = batch(5)
    for _ in range(3):
        same(shardmap.vmap(lambda r: Heir.apply(r, W, 3.0))(x), x * W * 3)
        same(shardmap.vmap(lambda r: own.NumpyScale.apply(r, W, 3.0))(x), x * W * 3)
    assert "heir" in own.calls
    assert "forward" not in vars(Heir)


def test_it_is_replayed_while_nothing_changes() -> None:
    mapped = shardmap.vmap(lambda r: ordered(r * 2))
    for seed in range(8):
        x = batch(5, seed)
        same(mapped(x), (x * 2).sort().values)
    text = shardmap.plan(lambda r: ordered(r * 2))(batch(5)).explain()
    assert "then replayed while what it reads is unchanged" in text


def test_many_threads() -> None:
    """A thread records while another replaces and restores the forward."""
    wrong: list[str] = []

    def run(number: int) -> None:
        for k in range(10):
            x = batch(3 + k % 3, number)
            for found, want in (
                (shardmap.vmap(lambda r: own.NumpyScale.apply(r, W))(x), x * W * 2),
                (shardmap.vmap(lambda r: ordered(r) + number)(x), x.sort().values + number),
            ):
                if not torch.equal(found, want):
                    wrong.append(f"thread {number}, call {k}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert own.NumpySort.forward.__code__.co_filename == own.__file__
