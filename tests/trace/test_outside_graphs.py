"""Gradients inside by what mapped arguments were computed from, and tangents read inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import shardmap
from shardmap import errors
from tests.trace.ways import WAYS

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "each": {"trace": "each"},
    "once": {"trace": "once"},
    "chunks": {"chunk_size": 3},
    "lanes": {"devices": ["cpu", "cpu"]},
    "always": {"check": "always"},
}
Case = tuple[Callable[..., Any], tuple[Tensor, ...], Any]


def rows(seed: int, size: int, width: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, width, generator=generator, dtype=torch.float64)


def distance_to_the_mean(seed: int, size: int) -> Case:
    x = rows(seed, size).requires_grad_()
    return lambda r: torch.autograd.grad((r - x.mean(0)).square().sum(), x)[0], (x,), 0


def penalty_of_features(seed: int, size: int) -> Case:
    encoder = nn.Linear(2, 3).double()
    features = encoder(rows(seed, size))

    def function(z: Tensor) -> Tensor:
        loss = z.square().sum() + encoder.weight.square().sum()
        return torch.autograd.grad(loss, encoder.weight, retain_graph=True)[0]

    return function, (features,), 0


def batch_of_losses(seed: int, size: int) -> Case:
    model = nn.Linear(2, 3).double()
    losses = model(rows(seed, size)).square().sum(1)
    wanted = tuple(model.parameters())
    return lambda loss: torch.autograd.grad(loss, wanted, retain_graph=True), (losses,), 0


def unused_by_itself(seed: int, size: int) -> Case:
    encoder = nn.Linear(2, 3).double()
    features = encoder(rows(seed, size))

    def function(z: Tensor) -> Tensor:
        found = torch.autograd.grad(
            z.sin().sum(),
            encoder.weight,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return found[0]

    return function, (features,), 0


def another_dimension(seed: int, size: int) -> Case:
    x = rows(seed, size, 3).requires_grad_()

    def function(r: Tensor, y: Tensor) -> Tensor:
        return torch.autograd.grad((r * y - x.sum(0)).square().sum(), x)[0]

    return function, (x.t(), rows(seed + 1, size, 3)), (1, 0)


CASES = (
    distance_to_the_mean, penalty_of_features, batch_of_losses, unused_by_itself, another_dimension,
)  # fmt: skip


def loop(function: Callable[..., Any], args: tuple[Tensor, ...], dims: Any) -> Any:
    dims = dims if isinstance(dims, tuple) else (dims,)
    found = [
        function(*[t.select(d, k) for t, d in zip(args, dims, strict=True)])
        for k in range(args[0].shape[dims[0]])
    ]
    if isinstance(found[0], tuple):
        return tuple([torch.stack(column) for column in zip(*found, strict=True)])
    return torch.stack(found)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_a_gradient_goes_on_into_what_an_argument_was_computed_from(
    case: Callable[[int, int], Case], options: str
) -> None:
    for size in (1, 3, 7):
        function, args, dims = case(size, size)
        mapped = shardmap.vmap(function, in_dims=dims, **OPTIONS[options])
        for _ in range(3):
            torch.testing.assert_close(mapped(*args), loop(function, args, dims))


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
@pytest.mark.parametrize("unused", [False, True])
def test_a_batch_with_a_history_after_others(trace: str, unused: bool) -> None:
    """A map that is replayed for batches without a history that matters sees one that does."""
    encoder = nn.Linear(2, 3).double()

    def function(z: Tensor) -> Tensor:
        loss = z.square().sum() if unused else z.square().sum() + encoder.weight.square().sum()
        found = torch.autograd.grad(
            loss, encoder.weight, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return found[0]

    mapped = shardmap.vmap(function, trace=trace)
    for seed in range(9):
        other = nn.Linear(2, 3).double()
        features = (encoder if seed in (4, 7) else other)(rows(seed, 5))
        torch.testing.assert_close(mapped(features), loop(function, (features,), 0))


def test_inside_another_map() -> None:
    model = nn.Linear(2, 3).double()
    wanted = tuple(model.parameters())

    def function(x: Tensor) -> Any:
        losses = model(x).square().sum(1)
        each = shardmap.vmap(lambda loss: torch.autograd.grad(loss, wanted, retain_graph=True))
        return each(losses)

    def unrolled(x: Tensor) -> Any:
        losses = model(x).square().sum(1)
        found = [torch.autograd.grad(loss, wanted, retain_graph=True) for loss in losses]
        return tuple([torch.stack(column) for column in zip(*found, strict=True)])

    x = torch.stack([rows(seed, 4) for seed in range(5)])
    torch.testing.assert_close(shardmap.vmap(function)(x), loop(unrolled, (x,), 0))


def test_gradients_from_outside() -> None:
    x = rows(0, 5).requires_grad_()

    def function(r: Tensor) -> Tensor:
        loss = (r.sin() * x.mean(0)).sum() ** 2
        return torch.autograd.grad(loss, x, create_graph=True)[0]

    weights = torch.linspace(-1, 1, 50, dtype=torch.float64).view(5, 5, 2)
    (got,) = torch.autograd.grad((shardmap.vmap(function)(x) * weights).sum(), x)
    (want,) = torch.autograd.grad((loop(function, (x,), 0) * weights).sum(), x)
    torch.testing.assert_close(got, want)


def test_a_plan_refuses_it_and_its_remedy_is_right() -> None:
    function, (x,), _ = distance_to_the_mean(0, 5)
    with pytest.raises(errors.HistoryError, match="map over the samples' numbers"):
        shardmap.plan(function)(x)
    planned = shardmap.plan(lambda i: function(x[i]))(torch.arange(len(x)))
    torch.testing.assert_close(planned.run(), loop(function, (x,), 0))


@pytest.mark.parametrize("options", OPTIONS)
def test_backward_into_an_argument_is_refused(options: str) -> None:
    """The loop would leave it in the argument's `.grad`."""

    def function(r: Tensor) -> Tensor:
        r.square().sum().backward()
        return r.detach() * 2

    x = rows(0, 5).requires_grad_()
    with pytest.raises(errors.CapturedWriteError, match="detach the argument"):
        shardmap.vmap(function, **OPTIONS[options])(x)
    assert x.grad is None

    def remedy(r: Tensor) -> Tensor:
        return torch.autograd.grad(r.square().sum(), r)[0]

    torch.testing.assert_close(shardmap.vmap(remedy, **OPTIONS[options])(x), 2 * x.detach())


def test_a_tangent_that_is_read_inside_is_refused() -> None:
    def tangent(r: Tensor) -> Tensor:
        found = forward_ad.unpack_dual(r.sin()).tangent
        return torch.zeros_like(r) if found is None else found

    x, t = rows(0, 5), rows(1, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        with pytest.raises(errors.TransformError, match="use torch.func.jvp inside"):
            shardmap.vmap(tangent)(dual)
        outside = forward_ad.unpack_dual(shardmap.vmap(torch.sin)(dual)).tangent
        captured = forward_ad.make_dual(x[0], t[0])
        want = torch.stack([tangent(r * captured) for r in x])
        torch.testing.assert_close(shardmap.vmap(lambda r: tangent(r * captured))(x), want)
    inside = shardmap.vmap(lambda r, s: torch.func.jvp(torch.sin, (r,), (s,))[1])(x, t)
    torch.testing.assert_close(outside, x.cos() * t)
    torch.testing.assert_close(inside, x.cos() * t)


def test_a_gradient_that_can_be_differentiated_stays_inside() -> None:
    """Into a graph from outside it would be cut off where that graph has saved tensors."""
    weight = rows(0, 1)[0].requires_grad_()
    scale = weight.exp()
    x = rows(1, 5)

    def function(r: Tensor) -> Tensor:
        return torch.autograd.grad((r * scale).sum() ** 2, weight, create_graph=True)[0]

    with pytest.raises(errors.HistoryError, match="compute the captured tensor inside"):
        shardmap.vmap(function)(x)
    losses = (x * scale).sum(1).exp()
    with pytest.raises(errors.HistoryError, match="leave out create_graph=True"):
        shardmap.vmap(lambda s: torch.autograd.grad(s, weight, create_graph=True)[0])(losses)

    def inside(r: Tensor) -> Tensor:
        return torch.autograd.grad((r * weight.exp()).sum() ** 2, weight, create_graph=True)[0]

    (got,) = torch.autograd.grad(shardmap.vmap(inside)(x).square().sum(), weight)
    (want,) = torch.autograd.grad(loop(inside, (x,), 0).square().sum(), weight)
    torch.testing.assert_close(got, want)

    def plain(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, weight, retain_graph=True)[0]

    torch.testing.assert_close(shardmap.vmap(plain)(losses), loop(plain, (losses,), 0))


@pytest.mark.parametrize("parts", [False, True])
def test_gradients_by_weights_that_were_computed_outside(parts: bool) -> None:
    """Of MAML: what is differentiated by has a history, into which the gradient does not go."""
    slow = rows(0, 2, 3).requires_grad_()
    fast = slow.sin().unbind() if parts else (slow.sin(),)
    x = rows(1, 5, 3)

    def function(r: Tensor) -> Tensor:
        loss = sum([(r * w).tanh().sum() for w in fast])
        (slope,) = torch.autograd.grad(loss, fast[:1], create_graph=True)
        return slope.square().sum()

    (got,) = torch.autograd.grad(shardmap.vmap(function)(x).sum(), slow, retain_graph=True)
    (want,) = torch.autograd.grad(loop(function, (x,), 0).sum(), slow)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("way", ["method", "attribute"])
def test_weights_that_are_frozen_for_a_while(way: str, size: int) -> None:
    frozen, free = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()

    def freeze(flag: bool) -> None:
        for parameter in frozen.parameters():
            if way == "method":
                parameter.requires_grad_(flag)
            else:
                parameter.requires_grad = flag

    def function(r: Tensor) -> Tensor:
        freeze(False)
        found = frozen(free(r))
        freeze(True)
        return found.square().sum()

    x = rows(0, size)
    with pytest.raises(errors.CapturedWriteError, match="functional_call"):
        shardmap.vmap(function)(x)
    with torch.no_grad():
        torch.testing.assert_close(shardmap.vmap(function)(x), loop(function, (x,), 0))

    def remedy(r: Tensor) -> Tensor:
        weights = {name: p.detach() for name, p in frozen.named_parameters()}
        return torch.func.functional_call(frozen, weights, (free(r),)).square().sum()

    everything = [*free.parameters(), *frozen.parameters()]
    mapped = shardmap.vmap(remedy)(x).sum()
    got = torch.autograd.grad(mapped, everything, allow_unused=True)
    want = torch.autograd.grad(loop(function, (x,), 0).sum(), everything, allow_unused=True)
    torch.testing.assert_close(got[:2], want[:2])
    assert got[2:] == want[2:] == (None, None)


@pytest.mark.parametrize("inner", [{}, {"chunk_size": 2}])
@pytest.mark.parametrize("way", WAYS)
def test_a_map_inside_a_map_of_results_of_an_outside_graph(
    way: dict[str, Any], inner: dict[str, Any]
) -> None:
    """The rows of a tangent kernel, by outputs of a model that was called outside."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3).double()

    def row(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]

    def plain(out: Tensor) -> Tensor:
        return shardmap.vmap(row, **inner)(out)

    def scaled(out: Tensor) -> Tensor:
        return shardmap.vmap(lambda loss: row(loss * out.sum()), **inner)(out)

    for size in (1, 3, 7):
        outputs = layer(torch.randn(size, 4, dtype=torch.float64)).tanh()
        for function, of in ((plain, lambda o: o), (scaled, lambda o: o * o.sum())):
            mapped = shardmap.vmap(function, **way)
            wanted = torch.stack([torch.stack([row(loss) for loss in of(o)]) for o in outputs])
            for _ in range(3):
                torch.testing.assert_close(mapped(outputs), wanted)
