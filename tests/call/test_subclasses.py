"""Results of tensor subclasses come back in the class that the loop's stack gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import shardmap
from tests.call.ways import WAYS
from tests.same import assert_same

Tensor = torch.Tensor


class Marked(Tensor):
    """A subclass that torch's functions keep."""

    def doubled(self) -> Tensor:
        return self * 2


class Made(Tensor):
    """One with a constructor of its own."""

    @staticmethod
    def __new__(cls, t: Tensor) -> Made:
        return Tensor._make_subclass(cls, t)


class Forgotten(Tensor):
    """One whose operations return plain tensors."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def alone(r: Tensor) -> Tensor:
    return (r * 2).as_subclass(Marked)


def among_others(r: Tensor) -> dict[str, Any]:
    return {"a": (r.sin().as_subclass(Marked), r.cos()), "b": Made(r * 3), "c": None}


def used_before(r: Tensor) -> Tensor:
    return r.as_subclass(Marked).doubled() + 1


def by_a_branch(r: Tensor) -> Tensor:
    return r.as_subclass(Marked) * 2 if r.sum() > 0 else Marked.doubled(r.as_subclass(Marked)).cos()


def by_a_door(r: Tensor) -> Tensor:
    return alone(r) * float(repr(r[0])[7:-1])


def forgotten(r: Tensor) -> Tensor:
    return (r * 2).as_subclass(Forgotten)


def a_parameter(r: Tensor) -> Tensor:
    return nn.Parameter(r.detach() * 2)


FUNCTIONS: list[Callable[[Tensor], Any]] = [
    alone,
    among_others,
    used_before,
    by_a_branch,
    by_a_door,
    forgotten,
    a_parameter,
]


def loop(function: Callable[[Tensor], Any], batch: Tensor) -> Any:
    return pytree.tree_map(
        lambda *rows: rows[0] if rows[0] is None else torch.stack(rows),
        *[function(r) for r in batch],
    )


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3, 7, 150])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_class_and_values_are_the_loops(
    function: Callable[[Tensor], Any], size: int, way: str
) -> None:
    torch.manual_seed(size)
    batch = torch.randn(size, 3)
    batch[-1] = -batch[0] if size > 1 else batch[0]
    mapped = shardmap.vmap(function, **WAYS[way])
    for _ in range(2):
        got, of_map = pytree.tree_flatten(mapped(batch))
        wanted, of_loop = pytree.tree_flatten(loop(function, batch))
        assert of_map == of_loop
        for g, w in zip(got, wanted, strict=True):
            assert type(g) is type(w)
            if w is not None:
                assert_same(g.as_subclass(Tensor), w.as_subclass(Tensor), way)


def test_gradients_out_dims_and_reductions() -> None:
    batch = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    out = shardmap.vmap(alone, out_dims=(1,))(batch)
    assert type(out) is Marked
    assert_same(out.as_subclass(Tensor), loop(alone, batch).as_subclass(Tensor).t(), "out_dims")
    (g,) = torch.autograd.grad(out.as_subclass(Tensor).sin().sum(), batch)
    assert_same(g.as_subclass(Tensor), 2 * (2 * batch.detach()).cos(), "gradient")
    total = shardmap.vmap(among_others, reduce={"a": ("sum", None), "b": "mean", "c": None})
    found = total(batch.detach())
    assert type(found["a"][0]) is type(loop(alone, batch.detach()).sum(0)) is Marked
    assert_same(found["a"][0].as_subclass(Tensor), batch.detach().sin().sum(0), "sum")
    assert type(found["b"]) is Made


def test_samples_of_unequal_shapes() -> None:
    rows = [torch.randn(n) for n in (3, 2, 3, 5)]
    summed = shardmap.vmap(lambda r: r.sum().as_subclass(Marked))(shardmap.Ragged(rows))
    assert type(summed) is Marked
    assert_same(summed.as_subclass(Tensor), torch.stack([r.sum() for r in rows]), "sums")
    listed = shardmap.vmap(alone, ragged="list")(shardmap.Ragged(rows))
    for k, r in enumerate(rows):
        assert_same(listed[k].as_subclass(Tensor), r * 2, f"{k}")


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"]}])
def test_a_class_of_later_calls(options: dict[str, Any]) -> None:
    """A recording of plain tensors is not one of a subclass, nor the other way round."""

    class Named(Tensor):
        pass

    def function(row: Tensor) -> Tensor:
        return row * (2 if isinstance(row, Named) else 3)

    mapped = shardmap.vmap(function, **options)
    for call in range(12):
        batch = torch.randn(7, 3)
        batch = batch.as_subclass(Named) if call in (5, 6, 8, 11) else batch
        found = mapped(batch)
        assert type(found) is type(batch)
        assert torch.equal(found.as_subclass(Tensor), loop(function, batch).as_subclass(Tensor))


class Refined(Marked):
    """A subclass of a subclass."""


CAPTURED = torch.tensor([1.0, 2.0, 3.0])


def plain_with_a_captured_one(kind: type[Tensor]) -> Callable[[Tensor], Any]:
    held = CAPTURED.as_subclass(kind)
    return lambda r: (r.as_subclass(Tensor) * held).as_subclass(Tensor)


def of_another_class(kind: type[Tensor]) -> Callable[[Tensor], Any]:
    held = CAPTURED.as_subclass(kind)
    return lambda r: (r.as_subclass(Tensor) * held).as_subclass(Made)


def several_classes(kind: type[Tensor]) -> Callable[[Tensor], Any]:
    held = CAPTURED.as_subclass(kind)

    def function(r: Tensor) -> Any:
        product = r * held
        return {"own": product, "plain": product.as_subclass(Tensor).sin(), "held": held, "n": None}

    return function


def written_into(kind: type[Tensor]) -> Callable[[Tensor], Any]:
    held = CAPTURED.as_subclass(kind)

    def function(r: Tensor) -> Any:
        found = torch.empty(3)
        found.copy_((r * held).as_subclass(Tensor))
        return found

    return function


def unmapped(kind: type[Tensor]) -> Callable[[Tensor], Any]:
    held = CAPTURED.as_subclass(kind)
    return lambda r: (r * 2, held.as_subclass(Tensor) + 1)


def viewed(kind: type[Tensor]) -> Callable[[Tensor], Any]:
    del kind
    return lambda r: (r.as_subclass(Tensor), r[:2].as_subclass(Tensor))


def asked(kind: type[Tensor]) -> Callable[[Tensor], Any]:
    held = CAPTURED.as_subclass(kind)

    def function(r: Tensor) -> Any:
        found = r * held if r.sum() > 0 else r - held
        return found.as_subclass(Tensor)

    return function


MAKERS = (
    plain_with_a_captured_one, of_another_class, several_classes, written_into, unmapped, viewed,
    asked,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("of_batch", [Tensor, Marked], ids=["plain", "marked"])
@pytest.mark.parametrize("kind", [Tensor, Marked, Refined, Forgotten, nn.Parameter])
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_the_class_is_that_of_the_functions_result(
    make: Callable[..., Any], kind: type[Tensor], of_batch: type[Tensor], way: str
) -> None:
    """Not that which captured tensors or the batch hand on while a recording is replayed."""
    function = make(kind)
    mapped = shardmap.vmap(function, **WAYS[way])
    for size in (7, 7, 7, 7, 3, 1, 40):
        batch = torch.randn(size, 3).as_subclass(of_batch)
        got, of_map = pytree.tree_flatten(mapped(batch))
        wanted, of_loop = pytree.tree_flatten(loop(function, batch))
        assert of_map == of_loop
        for g, w in zip(got, wanted, strict=True):
            assert type(g) is type(w)
            if w is not None:
                assert_same(g.as_subclass(Tensor), w.as_subclass(Tensor), way)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"trace": "once"}])
def test_the_class_of_samples_of_unequal_shapes(options: dict[str, Any]) -> None:
    held = torch.tensor(2.0).as_subclass(Marked)
    rows = [torch.randn(n) for n in (3, 2, 3, 5, 3)]
    for _ in range(4):
        listed = shardmap.vmap(lambda r: (r * held).as_subclass(Tensor), ragged="list", **options)
        assert [type(t) for t in listed(shardmap.Ragged(rows))] == [Tensor] * 5
        kept = shardmap.vmap(lambda r: r * held, ragged="list", **options)
        assert [type(t) for t in kept(shardmap.Ragged(rows))] == [Marked] * 5
        summed = shardmap.vmap(lambda r: (r * held).sum().as_subclass(Tensor), **options)
        assert type(summed(shardmap.Ragged(rows))) is Tensor
