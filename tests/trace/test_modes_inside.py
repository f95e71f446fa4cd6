"""Modes below autograd that a function enters, under gradients from outside, against the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import shardmap
from shardmap import errors
from tests.loop import loop
from tests.same import assert_same
from tests.trace.test_own_backwards import differentiated

Tensor = torch.Tensor
DTYPE = torch.float64
aten = torch.ops.aten

torch.manual_seed(0)
W = torch.randn(3, dtype=DTYPE, requires_grad=True)
M = torch.randn(3, 3, dtype=DTYPE, requires_grad=True)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
    "chunks": {"chunk_size": 2},
    "lanes": {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    "remat": {"chunk_size": 2, "remat": True},
    "always": {"check": "always"},
}


class Mode(TorchDispatchMode):
    """A mode that gives each operator's call to a function."""

    def __init__(self, answer: Callable[..., Any], *others: Any):
        super().__init__()
        self.answer, self.others = answer, others

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.answer(func, args, kwargs or {}, *self.others)


def doubles(func: Any, args: tuple, kwargs: dict[str, Any], *ops: Any) -> Any:
    out = func(*args, **kwargs)
    return out * 2 if func in (ops or (aten.sin.default,)) else out


def rounds(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    return out.mul(8).round().div(8) if func in (aten.mv.default, aten.exp.default) else out


def rounds_arguments(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if func is aten.mul.Tensor:
        args = tuple([a.mul(8).round().div(8) if isinstance(a, Tensor) else a for a in args])
    return func(*args, **kwargs)


def scaled(r: Tensor) -> Tensor:
    with Mode(doubles):
        return torch.sin(r * W)


def used_on(r: Tensor) -> Tensor:
    with Mode(doubles):
        y = torch.sin(r * W)
        z = y * y.sum() + torch.sin(y)
    return z.sin() * y


def quantised(r: Tensor) -> Tensor:
    with Mode(rounds):
        return (M @ r).exp() * W


def quantised_arguments(r: Tensor) -> Tensor:
    with Mode(rounds_arguments):
        return (r * W).sin() * W


def several_results(r: Tensor) -> Tensor:
    def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if func is aten.sort.default:
            return out[0] * 3, out[1]
        return tuple([t * 2 for t in out]) if func is aten.var_mean.correction else out

    with Mode(answer):
        var, mean = torch.var_mean(r * W)
        values, order = (r * W).sort()
    return values * var + mean * W[order]


def one_inside_another(r: Tensor) -> Tensor:
    with Mode(doubles), Mode(doubles, aten.cos.default):
        return torch.sin(r * W) * torch.cos(r)


def two_on_one_call(r: Tensor) -> Tensor:
    with Mode(doubles), Mode(lambda f, a, k: f(*a, **k) + (f is aten.sin.default)):
        return torch.sin(r * W)


def in_a_call_of_the_library(r: Tensor) -> Tensor:
    with Mode(doubles, aten.tanh.default, aten._softmax.default):
        y = nn.functional.softmax(r * W, 0)
        return torch.ops.aten.tanh(y) + torch.func.jvp(torch.tanh, (r,), (W,))[1]


def what_it_makes_beside(r: Tensor) -> Tensor:
    """What a mode computes below autograd is a constant to it."""
    seen: list[Tensor] = []

    def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if func is aten.sin.default:
            seen.append(out.abs().sum() * W[0])
        return out

    with Mode(answer):
        y = torch.sin(r * W)
    return y * seen[0] + seen[0] * W


def without_a_history(r: Tensor) -> Tensor:
    with Mode(lambda f, a, k: f(*a, **k) * W if f is aten.sin.default else f(*a, **k)):
        y = torch.sin(r.detach())
        with torch.no_grad():
            z = torch.sin(r)
    return y * W + z


def gradients_inside(r: Tensor) -> Tensor:
    leaf = (r * W).detach().requires_grad_()
    with Mode(doubles):
        y = torch.sin(leaf)
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    return grad * W + y.detach()


def gradients_of_gradients(r: Tensor) -> Tensor:
    u = r * W
    with Mode(doubles, aten.sin.default, aten.cos.default):
        (grad,) = torch.autograd.grad(torch.sin(u).sum(), u, create_graph=True)
    return grad.sin() * W


def in_a_function_mode(r: Tensor) -> Tensor:
    class Outer(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            with Mode(doubles):
                return func(*args, **(kwargs or {}))

    with Outer():
        return torch.sin(r * W)


def with_a_hook(r: Tensor) -> Tensor:
    with Mode(doubles):
        y = torch.sin(r * W)
    y.register_hook(lambda g: g * 3)
    return y * W


def written_after(r: Tensor) -> Tensor:
    with Mode(doubles):
        y = torch.sin(r * W)
    y.mul_(W)
    return y.cos()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin() * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


def a_function(r: Tensor) -> Tensor:
    with Mode(doubles):
        return Cube.apply(torch.sin(r * W)) * W


def counted(r: Tensor) -> Tensor:
    calls = []

    def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        calls.append(func)
        return func(*args, **kwargs)

    with Mode(answer), FlopCounterMode(display=False):
        y = (M @ torch.sin(r * W)).add_(1).relu_() + r
        y[0] = r.sum()
    return y * len(calls)


def looked_at(r: Tensor) -> Tensor:
    def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            assert out.abs().sum().shape == ()
        return out

    with Mode(answer):
        return torch.sin(r * W).mul_(W).exp()


CASES = {
    f.__name__: f
    for f in (
        scaled, used_on, quantised, quantised_arguments, several_results, one_inside_another, two_on_one_call, in_a_call_of_the_library, what_it_makes_beside,
        without_a_history, gradients_inside, gradients_of_gradients, in_a_function_mode,
        with_a_hook, written_after, a_function, counted, looked_at,
    )
}  # fmt: skip


def compared(function: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> None:
    ins = [W, M, *([x] if x.requires_grad else [])]
    want = differentiated(pytree.tree_leaves(loop(function)(x)), ins)
    mapped = shardmap.vmap(function, **options)
    for call in range(4):
        got = differentiated(pytree.tree_leaves(mapped(x)), ins)
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"call {call}, tensor {k}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_loop(name: str, way: str) -> None:
    for rows, grad in ((5, True), (5, False), (1, True)):
        x = torch.randn(rows, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(rows))
        compared(CASES[name], x.requires_grad_(grad), **WAYS[way])


NOT_IN_THE_LOOP = {"gradients_inside", "a_function"}
"""What torch.func itself does not transform."""


@pytest.mark.parametrize("name", sorted(CASES.keys() - NOT_IN_THE_LOOP - {"with_a_hook"}))
def test_transforms_around_the_map(name: str) -> None:
    x = torch.randn(5, 3, dtype=DTYPE)
    mapped = shardmap.vmap(CASES[name])
    got = torch.func.grad(lambda x: mapped(x).sin().sum())(x)
    want = torch.func.grad(lambda x: loop(CASES[name])(x).sin().sum())(x)
    assert_same(got, want, name)


def test_a_hook_and_a_weight_that_requires_grad_under_a_transform() -> None:
    """The weight is differentiated as well: by a second derivative around the call."""
    x, mapped = torch.randn(5, 3, dtype=DTYPE), shardmap.vmap(with_a_hook)
    with pytest.raises(errors.TransformError, match="several derivatives around the call"):
        torch.func.grad(lambda x: mapped(x).sin().sum())(x)


def test_forward_mode_around_the_map() -> None:
    x, t = torch.randn(5, 3, dtype=DTYPE), torch.randn(5, 3, dtype=DTYPE)

    def unchanged(r: Tensor) -> Tensor:
        with Mode(lambda func, args, kwargs: func(*args, **kwargs)):
            return torch.sin(r * W).exp()

    got = torch.func.jvp(shardmap.vmap(unchanged), (x,), (t,))
    for a, b in zip(got, torch.func.jvp(loop(unchanged), (x,), (t,)), strict=True):
        assert_same(a, b, "a mode that changes nothing")
    with pytest.raises(errors.AutogradFunctionError, match="TorchDispatchMode changes"):
        torch.func.jvp(shardmap.vmap(scaled), (x,), (t,))

    def inside(r: Tensor, t: Tensor) -> Tensor:
        return torch.func.jvp(scaled, (r,), (t,))[1]

    assert_same(shardmap.vmap(inside)(x, t), loop(inside)(x, t), "inside")


def writes(r: Tensor) -> Tensor:
    """A mode that writes, below autograd, to what the function has made."""

    def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is aten.sin.default:
            args[0].mul_(2)
        return func(*args, **kwargs)

    y = r * W
    with Mode(answer):
        z = torch.sin(y)
    return z + y


def writes_the_result_of_a_write(r: Tensor) -> Tensor:
    def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        return out.mul_(2) if func is aten.sin_.default else out

    y = r * W
    with Mode(answer):
        return torch.sin_(y) * 3


REFUSED = {f.__name__: f for f in (writes, writes_the_result_of_a_write)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name: str) -> None:
    x = torch.randn(5, 3, dtype=DTYPE)
    for options in WAYS.values():
        with pytest.raises(errors.AutogradFunctionError, match="TorchFunctionMode"):
            shardmap.vmap(REFUSED[name], **options)(x)
    with torch.no_grad():
        assert_same(shardmap.vmap(REFUSED[name])(x), loop(REFUSED[name])(x), name)


def test_the_remedies_of_a_refusal() -> None:
    def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return func(args[0] * 2) if func is aten.sin.default else func(*args, **kwargs)

    def new_tensor(r: Tensor) -> Tensor:
        with Mode(answer):
            return torch.sin(r * W)

    class Twice(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(args[0] * 2) if func is torch.sin else func(*args, **(kwargs or {}))

    def function_mode(r: Tensor) -> Tensor:
        with Twice():
            return torch.sin(r * W)

    def inside(r: Tensor) -> Tensor:
        leaf = r.detach().requires_grad_()
        return torch.autograd.grad(writes(leaf).sum(), leaf)[0] * W.detach()

    x = torch.randn(5, 3, dtype=DTYPE, requires_grad=True)
    compared(new_tensor, x)
    compared(function_mode, x)
    assert_same(shardmap.vmap(inside)(x), loop(inside)(x), "inside")


def test_a_mode_that_begins_to_change_results() -> None:
    """The recording of a function whose mode only counted is not taken for one that changes."""
    factor = [1.0]

    def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        return out * factor[0] if func is aten.sin.default and factor[0] != 1 else out

    def function(r: Tensor) -> Tensor:
        with Mode(answer):
            return torch.sin(r * W) * W

    x = torch.randn(5, 3, dtype=DTYPE, requires_grad=True)
    for options in WAYS.values():
        mapped = shardmap.vmap(function, **options)
        for factor[0] in (1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 3.0):
            want = differentiated([loop(function)(x)], [W, x])
            got = differentiated([mapped(x)], [W, x])
            for k, (a, b) in enumerate(zip(got, want, strict=True)):
                assert_same(a, b, f"{options}, factor {factor[0]}, tensor {k}")
