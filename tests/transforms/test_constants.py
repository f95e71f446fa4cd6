"""Derivatives of what is a constant, for some samples or for all: zeros of the loop's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import shardmap

SIZE = 20


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(SIZE, 3, generator=g), torch.randint(2, (SIZE,), generator=g)


def constant_for_some(out: Tensor, y: Tensor) -> Tensor:
    """A loss that ignores samples that are right enough."""
    loss = F.cross_entropy(out, y)
    return loss if loss > 0.7 else torch.zeros(())


def constant_by_target(out: Tensor, y: Tensor) -> Tensor:
    return out.sum().square() if y > 0 else torch.ones(1)


def constant(out: Tensor, y: Tensor) -> Tensor:
    return torch.ones(())


def cut_off(out: Tensor, y: Tensor) -> Tensor:
    return out.detach().sum()


LOSSES = [constant_for_some, constant_by_target, constant, cut_off]


def flat_gradients(m: nn.Module, loss: Callable[..., Tensor]) -> Tensor:
    """The gradients of a loop of `torch.func.grad`: `[N, P]`."""
    parameters = dict(m.named_parameters())

    def of_parameters(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(m, p, (x,)), y).reshape(())

    rows = [torch.func.grad(of_parameters)(parameters, x, y) for x, y in zip(*data(), strict=True)]
    return torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows]).detach()


def flat(gradients: dict[str, Tensor], count: int = 1) -> Tensor:
    return torch.cat([g.flatten(count) for g in gradients.values()], -1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 3}, {"trace": "once"}, {"batch_of_one": True}], ids=str
)
def test_gradients_of_parameters(loss: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """Of a module and of a function, in each form."""
    m, (x, y) = model(), data()
    wanted = flat_gradients(m, loss)
    if options.get("batch_of_one"):
        found = shardmap.per_sample_grad(m, loss, **options)(x, y)
        torch.testing.assert_close(flat(found), wanted)
        return

    def call(p: dict[str, Tensor], row: Tensor) -> Any:
        return torch.func.functional_call(m, p, (row,))

    parameters = dict(m.named_parameters())
    torch.testing.assert_close(flat(shardmap.per_sample_grad(m, loss, **options)(x, y)), wanted)
    found = shardmap.per_sample_grad(call, loss, **options)(parameters, x, y)
    torch.testing.assert_close(flat(found), wanted)
    torch.testing.assert_close(
        shardmap.per_sample_grad(m, loss, flat=True, **options)(x, y), wanted
    )
    found, aux = shardmap.per_sample_grad(
        m, lambda out, y: (loss(out, y), out), has_aux=True, **options
    )(x, y)
    torch.testing.assert_close(flat(found), wanted)
    torch.testing.assert_close(aux, m(x).detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_of_gradients(loss: Callable[..., Tensor]) -> None:
    """Norms, clipped sums, Gram matrices and the others, which may not compute the gradients."""
    m, (x, y) = model(), data()
    wanted = flat_gradients(m, loss)
    norms = wanted.norm(dim=1)

    def reduced(reduce: Any) -> Any:
        return shardmap.per_sample_grad(m, loss, reduce=reduce)(x, y)

    torch.testing.assert_close(reduced("norm"), norms)
    torch.testing.assert_close(reduced("gram"), wanted @ wanted.T)
    torch.testing.assert_close(flat(reduced("sum"), 0), wanted.sum(0))
    torch.testing.assert_close(flat(reduced("mean"), 0), wanted.mean(0))
    torch.testing.assert_close(flat(reduced("second_moment"), 0), wanted.square().mean(0))
    clipped = wanted * (0.5 / norms).clamp(max=1)[:, None]
    torch.testing.assert_close(
        flat(reduced(shardmap.reduce.clipped_sum(0.5)), 0), clipped.nan_to_num().sum(0)
    )


def sine_or_constant(x: Tensor) -> Tensor:
    return x.sin().sum() if x.sum() > 0 else torch.ones(())


def cube_or_cut_off(x: Tensor) -> Tensor:
    return (x**3).sum() if x.sum() > 0 else x.detach().sum()


def nothing(x: Tensor) -> Tensor:
    return torch.ones(())


@pytest.mark.parametrize("func", [sine_or_constant, cube_or_cut_off, nothing])
def test_products(func: Callable[[Tensor], Tensor]) -> None:
    """Products with Jacobians and Hessians."""
    x = data()[0]
    v, c = x.cos(), torch.arange(1.0, SIZE + 1)
    gradients = torch.stack([torch.func.grad(func)(r) for r in x])
    torch.testing.assert_close(shardmap.vjp(func)(x, c)[1], gradients * c[:, None])
    torch.testing.assert_close(shardmap.jvp(func)(x, v)[1], (gradients * v).sum(1))
    hessians = torch.stack([torch.func.hessian(func)(r) for r in x])
    torch.testing.assert_close(shardmap.hvp(func)(x, v)[1], (hessians @ v[..., None])[..., 0])


Pair = Callable[[Tensor, Tensor], Any]
OF_PAIRS: dict[str, Pair] = {
    "wide constant": lambda a, b: torch.ones(2).double().sum(),
    "wide constants": lambda a, b: torch.ones(2).double(),
    "narrow constant": lambda a, b: torch.ones(2, dtype=torch.float16),
    "wide product": lambda a, b: (a.double() * b).sum(),
    "of the first": lambda a, b: (a**3).double(),
    "of the second": lambda a, b: b**2,
    "narrow": lambda a, b: (a * b.float()).sin(),
    "several": lambda a, b: (
        torch.ones(()).double(),
        {"a": a**2, "b": a.sum() * b, "c": b.float()},
    ),
    "nothing": lambda a, b: torch.ones(0).double(),
}


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("argnums", [0, 1, (0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian"])
def test_dtypes(name: str, argnums: int | tuple[int, ...], transform: str) -> None:
    """A derivative has the dtype that `torch.func` gives it, also where it is zero."""
    func, x = OF_PAIRS[name], data()[0][:3]
    second = x.double().cos()
    rows = [
        getattr(torch.func, transform)(func, argnums)(a, b) for a, b in zip(x, second, strict=True)
    ]
    stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *rows)
    found = getattr(shardmap, transform)(func, argnums)(x, second)
    torch.testing.assert_close(found, stacked)
