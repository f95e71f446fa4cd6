"""Checkpoints and `saved_tensors_hooks` inside a function, and changes before the gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import shardmap
from shardmap import errors
from tests.trace.gradient_readers import Function, Tensor, each_way, loop, rows

again = functools.partial(checkpoint, use_reentrant=False)


class Case(NamedTuple):
    """A function, a change of what it computes again, and captured tensors."""

    function: Function
    change: Callable[[], object]
    tensors: tuple[Tensor, ...] = ()


class Block(nn.Module):
    """A module with state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.scale = 1.0

    def scaled(self, z: Tensor) -> Tensor:
        return z * self.scale

    def forward(self, z: Tensor) -> Tensor:
        return self.scaled(self.linear(z)).tanh()


@torch.no_grad()
def shift(t: Tensor) -> None:
    t += 0.5


def an_entry() -> Case:
    table = {"scale": 1.0}
    function = lambda r: again(lambda z: (z * table["scale"]).sin(), r)
    return Case(function, lambda: table.update(scale=3.0))


def a_closure() -> Case:
    scale = 1.0

    def change() -> None:
        nonlocal scale
        scale = 3.0

    return Case(lambda r: again(lambda z: (z * scale).sin(), r), change)


def an_array() -> Case:
    array = np.ones(3)
    function = lambda r: again(lambda z: (z * float(array[1])).sin(), r)
    return Case(function, lambda: array.__setitem__(1, 3.0))


def the_default_dtype() -> Case:
    function = lambda r: again(lambda z: (z * torch.full((3,), 0.1).double()).sin(), r)
    return Case(function, lambda: torch.set_default_dtype(torch.float64))


def a_bias() -> Case:
    m = Block()
    return Case(lambda r: again(lambda z: m.linear(z).tanh(), r), lambda: shift(m.linear.bias),
                tuple(m.parameters()))  # fmt: skip


def another_parameter() -> Case:
    m = Block()

    def change() -> None:
        m.linear.bias = nn.Parameter(m.linear.bias.detach() + 0.5)

    return Case(lambda r: again(m, r), change, tuple(m.parameters()))


def a_module() -> Case:
    m = Block()
    return Case(lambda r: again(m, r), lambda: setattr(m, "scale", 3.0), tuple(m.parameters()))


def an_item_of_a_tensor() -> Case:
    t = torch.ones(4, 3, dtype=torch.float64)

    def function(r: Tensor) -> Tensor:
        part = t[2]
        return again(lambda z: (z + part).sin(), r)

    return Case(function, lambda: shift(t))


def an_argument() -> Case:
    table = {"scale": 1.0}
    return Case(lambda r: again(lambda z, o: (z * o["scale"]).sin(), r, table),
                lambda: table.update(scale=3.0))  # fmt: skip


def a_keyword() -> Case:
    table = {"scale": 1.0}
    return Case(lambda r: again(lambda z, o: (z * o["scale"]).sin(), r, o=table),
                lambda: table.update(scale=3.0))  # fmt: skip


def a_partial() -> Case:
    table = {"scale": 1.0}
    part = functools.partial(lambda o, z: (z * o["scale"]).sin(), table)
    return Case(lambda r: again(part, r), lambda: table.update(scale=3.0))


def one_of_many() -> Case:
    layers = nn.ModuleList(Block() for _ in range(20))

    def function(r: Tensor) -> Tensor:
        for layer in layers:
            r = again(layer, r)
        return r

    return Case(function, lambda: setattr(layers[1], "scale", 3.0), tuple(layers.parameters()))


def a_sequence() -> Case:
    layers = nn.Sequential(*[Block() for _ in range(4)])
    function = lambda r: checkpoint_sequential(layers, 2, r, use_reentrant=False)
    return Case(function, lambda: setattr(layers[1], "scale", 3.0), tuple(layers.parameters()))


def one_inside_another() -> Case:
    table = {"scale": 1.0}

    def inner(z: Tensor) -> Tensor:
        return (z * table["scale"]).sin()

    function = lambda r: again(lambda z: again(inner, z * 2).exp(), r) * 2
    return Case(function, lambda: table.update(scale=3.0))


def a_function_of_ones_own() -> Case:
    table = {"scale": 1.0}

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x * table["scale"]
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0]

    return Case(lambda r: again(Scaled.apply, r), lambda: table.update(scale=3.0))


def hooks(unpack: Function) -> Function:
    def function(r: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            return r.sin() * r

    return function


def unpacked_by_an_entry() -> Case:
    table = {"scale": 1.0}
    return Case(hooks(lambda t: t * table["scale"]), lambda: table.update(scale=3.0))


def unpacked_by_a_tensor() -> Case:
    t = torch.ones(3, dtype=torch.float64)
    return Case(hooks(lambda s: s * t), lambda: shift(t))


CHECKPOINTS = (
    an_entry, a_closure, an_array, the_default_dtype, a_bias, another_parameter, a_module,
    an_item_of_a_tensor, an_argument, a_keyword, a_partial, one_of_many, a_sequence,
    one_inside_another, a_function_of_ones_own,
)  # fmt: skip
SAVED = unpacked_by_an_entry, unpacked_by_a_tensor
cases = pytest.mark.parametrize("case", [*CHECKPOINTS, *SAVED], ids=lambda case: case.__name__)


@contextmanager
def a_default_dtype() -> Iterator[None]:
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def gradients(out: Tensor, x: Tensor, case: Case, **options: Any) -> list[Tensor]:
    weight = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)
    tensors = [t for t in case.tensors if t.requires_grad]
    return list(torch.autograd.grad((out * weight).sum(), [x, *tensors], **options))


@each_way
@cases
def test_a_change_before_the_gradient_is_refused_and_one_before_the_call_is_not(
    case: Callable[[], Case], options: dict[str, Any]
) -> None:
    made, x = case(), rows()
    mapped, want = shardmap.vmap(made.function, **options), loop(made.function)
    with a_default_dtype():
        for _ in range(3):  # a remedy: the gradient before the change
            torch.testing.assert_close(mapped(x), want(x))
            torch.testing.assert_close(gradients(mapped(x), x, made), gradients(want(x), x, made))
        got, rows_ = mapped(x), want(x)
        before = gradients(rows_, x, made, retain_graph=True)
        made.change()
        after = gradients(rows_, x, made)
        differ = not all(map(torch.equal, after, before))
        assert differ or case in (another_parameter, unpacked_by_a_tensor, an_item_of_a_tensor)
        with pytest.raises(errors.ShardmapError, match=r"inside the function .*changed|remat="):
            gradients(got, x, made)
        if case in SAVED or case is another_parameter:
            return  # hooks that change what they unpack; a new parameter is another tensor
        torch.testing.assert_close(mapped(x), want(x))
        torch.testing.assert_close(gradients(mapped(x), x, made), gradients(want(x), x, made))


@each_way
def test_without_a_checkpoint_the_gradient_is_that_of_the_call(options: dict[str, Any]) -> None:
    x, scale = rows(), {"scale": 1.0}
    function = lambda r: (r * scale["scale"]).sin()
    got, want = shardmap.vmap(function, **options)(x), loop(function)(x)
    scale["scale"] = 3.0
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x)
    )


@each_way
def test_second_derivatives_and_a_second_gradient(options: dict[str, Any]) -> None:
    m, x = Block(), rows()
    function = lambda r: again(m, r)
    results = []
    for mapped in (shardmap.vmap(function, **options), loop(function)):
        out = mapped(x)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(first.sin().sum(), [x, *m.parameters()], retain_graph=True)
        results.append([first, *second, *torch.autograd.grad(first.cos().sum(), x)])
    torch.testing.assert_close(*results)


@each_way
def test_a_gradient_inside(options: dict[str, Any]) -> None:
    m, x = Block(), rows()

    def function(r: Tensor) -> Tensor:
        y = again(m, r)
        return torch.autograd.grad(y.sin().sum(), r, create_graph=True)[0] + y

    results = []
    for mapped in (shardmap.vmap(function, **options), loop(function)):
        results.append(torch.autograd.grad(mapped(x).cos().sum(), [x, *m.parameters()]))
    torch.testing.assert_close(*results)
    out = shardmap.vmap(function, **options)(x)
    m.scale = 3.0
    with pytest.raises(errors.AutogradFunctionError, match="checkpoint inside the function"):
        torch.autograd.grad(out.sum(), x)


@each_way
def test_an_output_beside_a_checkpoint_is_not_refused(options: dict[str, Any]) -> None:
    m, x = Block(), rows()

    def function(r: Tensor) -> tuple[Tensor, Tensor]:
        return again(m, r), r.exp() * 2

    mapped = shardmap.vmap(function, **options)
    for _ in range(3):
        computed, beside = mapped(x)
        m.scale += 1.0
        (got,) = torch.autograd.grad(beside.sum(), x, retain_graph=True)
        torch.testing.assert_close(got, 2 * x.detach().exp())
        with pytest.raises(errors.AutogradFunctionError, match="m.scale|scale"):
            torch.autograd.grad(computed.sum(), x)


@each_way
def test_training_steps(options: dict[str, Any]) -> None:
    """The common case: the gradient is taken before the optimizer's step."""
    trained = []
    for each in (functools.partial(shardmap.vmap, **options), loop):
        torch.manual_seed(0)
        layers = nn.ModuleList(Block() for _ in range(3))
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1, momentum=0.9)

        def function(r: Tensor, layers: nn.ModuleList = layers) -> Tensor:
            for layer in layers:
                r = again(layer, r)
            return r.square().sum()

        mapped = each(function)
        for step in range(6):
            optimizer.zero_grad()
            x = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            for part in (x, x + 1):  # gradients are accumulated
                mapped(part).mean().backward()
            optimizer.step()
        trained.append([p.detach() for p in layers.parameters()])
    torch.testing.assert_close(*trained)


def nodes_behind(out: Tensor) -> set[str]:
    found, pending = set[str](), [out.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None:
            found.add(node.name())
            pending += [before for before, _ in node.next_functions]
    return found


def test_a_hook_that_reads_nothing_costs_nothing() -> None:
    def function(r: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return r.sin() * r

    assert "_GivenBackward" not in nodes_behind(shardmap.vmap(function)(rows()))
    read = unpacked_by_an_entry().function
    assert "_GivenBackward" in nodes_behind(shardmap.vmap(read)(rows()))


@pytest.mark.parametrize("case", SAVED, ids=lambda case: case.__name__)
def test_hooks_around_the_call_are_a_remedy(case: Callable[[], Case]) -> None:
    table, x = {"scale": 1.0}, rows()
    results = []
    for mapped in (shardmap.vmap(lambda r: r.sin() * r), loop(lambda r: r.sin() * r)):
        table["scale"] = 1.0
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * table["scale"]):
            out = mapped(x)
        table["scale"] = 3.0
        results.append(torch.autograd.grad(out.sum(), x))
    torch.testing.assert_close(*results)


class Called(torch.autograd.Function):
    """Keeps a function on `ctx` that only the call holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.scale = scale
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.scale(grad), None


table = {"scale": 1.0}


def scaled(by: float, z: Tensor) -> Tensor:
    return z * by * table["scale"]


def reentrant(r: Tensor) -> Tensor:
    return checkpoint(lambda z: (z * table["scale"]).sin(), r, use_reentrant=True)


HELD: dict[str, Function] = {
    "a reentrant checkpoint": reentrant,
    "a function": lambda r: Called.apply(r, lambda z: z * table["scale"]),
    "a partial one": lambda r: Called.apply(r, functools.partial(scaled, 2.0)),
    "a partial one of it": lambda r: Called.apply(
        r, functools.partial(lambda by, z: z * by * table["scale"], 2.0)
    ),
    "one that closes over another": lambda r: (
        lambda inner: Called.apply(r, lambda z: inner(z) * 2)
    )(lambda z: z * table["scale"]),
}


@each_way
@pytest.mark.parametrize("name", HELD)
def test_what_only_the_call_has_held_is_read_after_it(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = HELD[name]
    mapped, x = shardmap.vmap(function, **options), rows()
    for number in (1.0, 1.0, 2.0, 2.0):
        monkeypatch.setitem(table, "scale", number)
        got = x.detach().clone().requires_grad_()
        want = x.detach().clone().requires_grad_()
        mapped(got).sum().backward()
        loop(function)(want).sum().backward()
        torch.testing.assert_close(got.grad, want.grad)
    out = mapped(x).sum()
    monkeypatch.setitem(table, "scale", 5.0)
    with pytest.raises(errors.AutogradFunctionError, match=r"table\['scale'\]"):
        out.backward()
