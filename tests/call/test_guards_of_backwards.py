"""What code reads that gradients from outside call is compared at the next call of the map."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardmap

OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "chunks": {"chunk_size": 2},
    "lanes": {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
}
SCALE = 2.0
Case = tuple[Callable[[Tensor], Tensor], Callable[[], object]]


def helper(grad: Tensor) -> Tensor:
    return grad * SCALE


def reading(scale: Callable[[], float]) -> Any:
    """A Function whose backward calls a function for its scale."""

    class Scaled(torch.autograd.Function):
        slope = 2.0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * x * scale()

    return Scaled


def a_global() -> Case:
    class Function(reading(lambda: 1.0)):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return helper(grad)

    def change() -> None:
        global SCALE
        SCALE += 3.0

    return lambda x: Function.apply(x).sum(), change


def an_attribute_of_the_class() -> Case:
    function = reading(lambda: function.slope)
    return lambda x: function.apply(x).sum(), lambda: setattr(function, "slope", 7.0)


def a_variable_closed_over() -> Case:
    scale = 2.0

    def change() -> None:
        nonlocal scale
        scale = 7.0

    function = reading(lambda: scale)
    return lambda x: function.apply(x).sum(), change


def an_entry_of_a_dict() -> Case:
    config = {"scale": 2.0}
    function = reading(lambda: config["scale"])
    return lambda x: function.apply(x).sum(), lambda: config.update(scale=7.0)


def an_object_on_ctx() -> Case:
    held = SimpleNamespace(scale=2.0)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.held = held
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.held.scale

    return lambda x: Function.apply(x).sum(), lambda: setattr(held, "scale", 7.0)


def the_backward_itself() -> Case:
    function = reading(lambda: 2.0)

    def change() -> None:
        function.backward = staticmethod(lambda ctx, grad: grad * 5)

    return lambda x: function.apply(x).sum(), change


def the_code_of_the_backward() -> Case:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 3

    def change() -> None:
        Function.backward.__code__ = (lambda ctx, grad: grad * 5).__code__

    return lambda x: Function.apply(x).sum(), change


def a_function_that_the_backward_calls() -> Case:
    def scale() -> float:
        return 2.0

    def change() -> None:
        scale.__code__ = (lambda: 7.0).__code__

    function = reading(scale)
    return lambda x: function.apply(x).sum(), change


class Hooked(nn.Module):
    """Registers one of its methods as a hook."""

    scale = 2.0

    def hook(self, grad: Tensor) -> Tensor:
        return grad * self.scale

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(self.hook)
        return y.sum()


def an_object_whose_method_is_a_hook() -> Case:
    made = Hooked()
    return made, lambda: setattr(made, "scale", 7.0)


def what_a_hook_closes_over() -> Case:
    held = [2.0]

    def f(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda grad: grad * held[0])
        return y.sum()

    return f, lambda: held.__setitem__(0, 7.0)


def the_function_that_a_hook_calls() -> Case:
    held = [lambda grad: grad * 2]

    def f(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda grad: held[0](grad))
        return y.sum()

    return f, lambda: held.__setitem__(0, lambda grad: grad - 1)


def a_module_of_torch_that_is_a_hook() -> Case:
    layer = nn.Hardtanh(-0.5, 0.5)

    def f(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(layer)
        return y.sum()

    return f, lambda: setattr(layer, "max_val", 0.75)


CASES = (
    a_global, an_attribute_of_the_class, a_variable_closed_over, an_entry_of_a_dict,
    an_object_on_ctx, the_backward_itself, the_code_of_the_backward,
    a_function_that_the_backward_calls, an_object_whose_method_is_a_hook, what_a_hook_closes_over,
    the_function_that_a_hook_calls, a_module_of_torch_that_is_a_hook,
)  # fmt: skip


def gradients(mapped: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    rows = rows.clone().requires_grad_()
    return torch.autograd.grad(mapped(rows).sum(), rows)[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_a_change_of_what_a_backward_reads(case, options):
    gc.collect()  # the classes of other cases, whose Functions have the same name
    f, change = case()
    mapped = shardmap.vmap(f, **options)
    for call in range(7):
        if call == 4:
            change()
        rows = torch.rand(5, 3, dtype=torch.float64) + 0.5
        wanted = torch.stack([gradients(f, row) for row in rows])
        torch.testing.assert_close(gradients(mapped, rows), wanted)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_change_of_what_a_second_backward_reads(options):
    held = {"scale": 2.0}

    class Second(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(grad, x)
            return grad * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            first, x = ctx.saved_tensors
            return grad * x * held["scale"], grad * first * held["scale"]

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x / 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return Second.apply(grad, ctx.saved_tensors[0])

    def twice(mapped: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        rows = rows.clone().requires_grad_()
        (grad,) = torch.autograd.grad(mapped(rows).sum(), rows, create_graph=True)
        return torch.autograd.grad(grad.sum(), rows)[0]

    def f(x: Tensor) -> Tensor:
        return First.apply(x).sum()

    mapped = shardmap.vmap(f, **options)
    for call in range(7):
        if call == 4:
            held["scale"] = 5.0
        rows = torch.rand(5, 3, dtype=torch.float64)
        torch.testing.assert_close(twice(mapped, rows), torch.stack([twice(f, r) for r in rows]))


def test_what_is_unchanged_is_replayed():
    function = reading(lambda: 2.0)
    rows = torch.rand(5, 3, requires_grad=True)
    text = shardmap.plan(lambda x: function.apply(x).sum())(rows).explain()
    assert "then replayed while what it reads is unchanged" in text
