"""`remat=True` where one program does not serve all samples: shapes, paths and the loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import shardmap
from shardmap import errors

Tensor = torch.Tensor

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks_of_one": {"chunk_size": 1},
    "chunks_of_two": {"chunk_size": 2},
    "two_lanes": {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    "once": {"chunk_size": 3, "trace": "once"},
    "summed": {"chunk_size": 2, "reduce": "sum"},
}


def ragged() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(n, 3, dtype=torch.float64) for n in (5, 3, 5, 7, 3, 5, 2, 1, 5)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_over_sentences_of_unequal_lengths(
    layer: Callable[..., nn.Module], way: str
) -> None:
    net, rows = layer(3, 4, num_layers=2, bidirectional=True).double(), ragged()
    weights = list(net.parameters())

    def function(r: Tensor) -> Tensor:
        return net(r)[0].sum(0)

    options = WAYS[way]
    mapped = shardmap.vmap(function, remat=True, **options)
    for _ in range(2):
        found = mapped(shardmap.Ragged(rows))
        wanted = torch.stack([function(r) for r in rows])
        wanted = wanted.sum(0) if "reduce" in options else wanted
        torch.testing.assert_close(found, wanted)
        got = torch.autograd.grad(found.sin().sum(), weights)
        torch.testing.assert_close(got, torch.autograd.grad(wanted.sin().sum(), weights))


class Branches(nn.Module):
    """Two weights, of which a sample reads one; what is made of them is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.linspace(-1, 1, 3, dtype=torch.float64))
        self.second = nn.Parameter(torch.linspace(0, 1, 3, dtype=torch.float64))

    def chosen(self, r: Tensor) -> bool:
        return bool(r.sum() > 0)

    def forward(self, r: Tensor) -> Tensor:
        weight = self.first if self.chosen(r) else self.second
        return (r * weight.exp() * weight).sin().sum(0)


class ByLength(Branches):
    """The same, chosen by the length."""

    def chosen(self, r: Tensor) -> bool:
        return r.shape[0] % 2 == 0


class BySampleAlone(Branches):
    """The same, chosen by a number that is formatted: no recording serves other samples."""

    def forward(self, r: Tensor) -> Tensor:
        return super().forward(r) * float(f"{r[0, 0]:.3f}")


def many(size: int) -> Tensor:
    torch.manual_seed(4)
    return torch.randn(size, 5, 3, dtype=torch.float64)


KINDS: dict[str, tuple[Callable[[], Branches], Callable[[], Any]]] = {
    "shapes": (ByLength, lambda: shardmap.Ragged(ragged())),
    "paths": (Branches, lambda: many(150)),
    "rare_paths": (Branches, lambda: many(7)),
    "loop": (BySampleAlone, lambda: many(7)),
}


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_loop(kind: str, way: str) -> None:
    net, batch = KINDS[kind][0](), KINDS[kind][1]()
    weights, options = list(net.parameters()), WAYS[way]
    found = shardmap.vmap(net, remat=True, **options)(batch)
    wanted = torch.stack([net(r) for r in batch])
    wanted = wanted.sum(0) if "reduce" in options else wanted
    torch.testing.assert_close(found, wanted)
    got = torch.autograd.grad(found.cos().sum(), weights)
    torch.testing.assert_close(got, torch.autograd.grad(wanted.cos().sum(), weights))


def other_memory(weight: Tensor) -> None:
    """What older optimizers and `load` functions write."""
    weight.data = weight.data + 1


WRITES: list[Callable[[Tensor], object]] = [lambda weight: weight.add_(1), other_memory]


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_before_the_gradient_is_refused_and_the_remedies_work(
    kind: str, name: str, write: Callable[[Tensor], object]
) -> None:
    net, batch = KINDS[kind][0](), KINDS[kind][1]()
    weights = list(net.parameters())
    written = getattr(net, name)
    wanted = torch.autograd.grad(torch.stack([net(r) for r in batch]).cos().sum(), weights)
    mapped = shardmap.vmap(net, remat=True, chunk_size=2)
    out = mapped(batch).cos().sum()
    (got, other) = torch.autograd.grad(out, weights, retain_graph=True)  # before the write
    torch.testing.assert_close((got, other), wanted)
    with torch.no_grad():
        write(written)
    with pytest.raises(errors.CapturedWriteError, match="take the gradients before, or pass remat"):
        torch.autograd.grad(out, weights)
    wanted = torch.autograd.grad(torch.stack([net(r) for r in batch]).cos().sum(), weights)
    found = shardmap.vmap(net, chunk_size=2)(batch).cos().sum()
    torch.testing.assert_close(torch.autograd.grad(found, weights), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_draws_that_the_samples_of_a_path_share(way: str) -> None:
    net, batch = Branches(), many(150)
    weights = list(net.parameters())

    def function(r: Tensor) -> Tensor:
        drawn = torch.rand(3, dtype=torch.float64)
        return net(r) * (net.first * drawn).sin()

    found = []
    for remat in (False, True):
        torch.manual_seed(0)
        mapped = shardmap.vmap(function, remat=remat, randomness="same", **WAYS[way])
        out = mapped(batch)
        found.append((out, *torch.autograd.grad(out.cos().sum(), weights)))
    torch.testing.assert_close(found[0], found[1])


class Doubles(TorchDispatchMode):
    """A mode of the caller's that changes what a sine is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.sin.default else result


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forward", [True, False])
def test_modes_around_the_call_or_the_gradient_alone_are_refused(kind: str, forward: bool) -> None:
    net, batch = KINDS[kind][0](), KINDS[kind][1]()
    weights, mode = list(net.parameters()), Doubles()

    def gradient(around: bool, of: bool, mapped: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        with mode if around else nullcontext():
            out = mapped(batch)
        with mode if of else nullcontext():
            return torch.autograd.grad(out.cos().sum(), weights)

    def loop(rows: Any) -> Tensor:
        return torch.stack([net(r) for r in rows])

    mapped = shardmap.vmap(net, remat=True, chunk_size=2)
    with pytest.raises(errors.TransformError, match="within the same modes, or pass remat=False"):
        gradient(forward, not forward, mapped)
    wanted = gradient(True, True, loop)
    torch.testing.assert_close(gradient(True, True, mapped), wanted)
    wanted = gradient(forward, not forward, loop)
    plain = shardmap.vmap(net, chunk_size=2)
    torch.testing.assert_close(gradient(forward, not forward, plain), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_samples_of_inference_mode(way: str) -> None:
    with torch.inference_mode():
        batch = torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3)
    weight = torch.linspace(0, 1, 3, dtype=torch.float64, requires_grad=True)
    mixed = torch.linspace(1, 2, 21, dtype=torch.float64).view(7, 3).requires_grad_()

    def function(r: Tensor, q: Tensor) -> Tensor:
        return (r.clone() * weight).sin() * q

    options = WAYS[way]
    found = shardmap.vmap(function, remat=True, **options)(batch, mixed)
    wanted = torch.stack([function(r, q) for r, q in zip(batch, mixed, strict=True)])
    wanted = wanted.sum(0) if "reduce" in options else wanted
    torch.testing.assert_close(found, wanted)
    wrt = [weight, mixed]
    got = torch.autograd.grad(found.cos().sum(), wrt)
    torch.testing.assert_close(got, torch.autograd.grad(wanted.cos().sum(), wrt))
