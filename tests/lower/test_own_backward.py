"""What the backward of a Function reads: no gradient reaches it, and second gradients do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import shardmap
from tests.loop import loop

Tensor = torch.Tensor
WAYS = [{}, {"chunk_size": 2}, {"trace": "once"}, {"trace": "each"}, {"remat": True}]


class Scaled(torch.autograd.Function):
    """Multiplies by a tensor that it is not given as an argument of its own."""

    @staticmethod
    def forward(x: Tensor, held: dict[str, Tensor]) -> Tensor:
        return x * held["weight"]

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, dict[str, Tensor]], output: Tensor) -> None:
        ctx.held = inputs[1]

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent * ctx.held["weight"].sin(), None


def without_grad(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return weight * 2


READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a Function": lambda r, w: Scaled.apply(r, {"weight": w}),
    "detach": lambda r, w: r * w.detach(),
    "item": lambda r, w: r * w[0].item(),
    "no_grad": lambda r, w: r * without_grad(w),
    "a branch": lambda r, w: r * (w if w.sum() < -100 else 2),
    "a hook": lambda r, w: hooked(r * 1, w),
    "a product": lambda r, w: Scaled.apply(r, {"weight": w}) * w,
}


def hooked(r: Tensor, weight: Tensor) -> Tensor:
    r.register_hook(lambda g: g * weight.detach())
    return r.sin()


def batch(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 4, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randn(4, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("reader", READERS)
def test_hooks_of_a_parameter_are_called_as_by_the_loop(
    reader: str, hook: str, way: dict[str, object]
) -> None:
    found = []
    for vmap in (loop, shardmap.vmap):
        x, values = batch(5)
        weight, seen = torch.nn.Parameter(values), []
        getattr(weight, hook)(lambda g, seen=seen: seen.append(type(g)))
        run = vmap(lambda r, w=weight: READERS[reader](r, w), **(way if vmap is not loop else {}))
        for _ in range(2):
            run(x).sum().backward()
        found.append((x.grad, weight.grad, set(seen)))
    torch.testing.assert_close(found[1][:2], found[0][:2])
    assert found[1][2] == found[0][2]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_graph_of_what_it_reads_is_left_alone(way: dict[str, object]) -> None:
    for vmap in (loop, shardmap.vmap):
        x, weight = batch(5)
        weight.requires_grad_()
        computed, seen = weight.exp(), []
        computed.register_hook(lambda g, seen=seen: seen.append(g))
        held = {"weight": computed}
        vmap(lambda r, held=held: Scaled.apply(r, held), **(way if vmap is not loop else {}))(
            x
        ).sum().backward()
        assert weight.grad is None
        assert not seen
        computed.sum().backward()  # what it saved is still there
        torch.testing.assert_close(weight.grad, weight.exp())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_second_gradients_reach_what_it_reads(way: dict[str, object]) -> None:
    found = []
    for vmap in (loop, shardmap.vmap):
        x, weight = batch(5)
        options = way if vmap is not loop else {}

        def total(x: Tensor, w: Tensor, vmap=vmap, options=options) -> Tensor:
            return vmap(lambda r: Scaled.apply(r, {"weight": w}), **options)(x).sin().sum()

        leaf = weight.clone().requires_grad_()
        (first,) = torch.autograd.grad(total(x, leaf), x, create_graph=True)
        gradient = torch.func.grad(total)
        found.append(
            [
                first.detach(),
                torch.autograd.grad(first.sum(), leaf)[0],
                torch.autograd.grad(gradient(x, leaf).sum(), leaf)[0],
                torch.func.grad(lambda w, g=gradient, x=x: g(x.detach(), w).sum())(weight),
            ]
        )
    torch.testing.assert_close(found[1], found[0])
