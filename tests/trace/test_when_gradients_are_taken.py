"""What a backward or a hook meets when the gradient is taken, against the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from tests.trace.gradient_readers import (
    Function,
    Tensor,
    as_a_hook,
    each_way,
    loop,
    rows,
)

# -- handles


def handled(handles: list[Any]) -> Function:
    def function(r: Tensor) -> Tensor:
        h = r * 2
        handles.append(h.register_hook(lambda g: g * 5))
        return h.sin()

    return function


@each_way
def test_a_hook_that_is_removed_after_the_gradient(options: dict[str, Any]) -> None:
    handles: list[Any] = []
    function = handled(handles)
    mapped = shardmap.vmap(function, **options)
    for _ in range(4):
        x = rows()
        (got,) = torch.autograd.grad(mapped(x).sum(), x)
        (want,) = torch.autograd.grad(loop(function)(x).sum(), x)
        torch.testing.assert_close(got, want)
        for handle in handles:
            handle.remove()
            handle.remove()
        handles.clear()


@each_way
def test_a_hook_that_is_removed_before_the_gradient_is_refused(options: dict[str, Any]) -> None:
    handles: list[Any] = []
    x, mapped = rows(), shardmap.vmap(handled(handles), **options)
    out = mapped(x).sum()
    for handle in handles:
        handle.remove()
    with pytest.raises(errors.AutogradFunctionError, match="removed between the map and its"):
        torch.autograd.grad(out, x)
    (got,) = torch.autograd.grad(mapped(x).sum(), x)
    torch.testing.assert_close(got, 10 * (2 * x.detach()).cos())


@each_way
def test_the_remedies_of_a_removed_hook(options: dict[str, Any]) -> None:
    def inside(r: Tensor) -> Tensor:
        h = r * 2
        with h.register_hook(lambda g: g * 5):
            return h.sin()

    x = rows()
    for _ in range(4):
        (got,) = torch.autograd.grad(shardmap.vmap(inside, **options)(x).sum(), x)
        torch.testing.assert_close(got, 2 * (2 * x.detach()).cos())
        out = shardmap.vmap(lambda r: (r * 2).sin(), **options)(x)
        handle = out.register_hook(lambda g: g * 5)
        handle.remove()
        (got,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(got, 2 * (2 * x.detach()).cos())


# -- a state that backwards change themselves


class Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.n = 0
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.n += 1
        return grad * ctx.n


def only_once(r: Tensor) -> Tensor:
    h, done = r * 2, []

    def hook(g: Tensor) -> Tensor:
        if done:
            return g
        done.append(1)
        return g * 5

    h.register_hook(hook)
    return h.sin()


def removes_itself(r: Tensor) -> Tensor:
    h, handles = r * 2, []

    def hook(g: Tensor) -> Tensor:
        handles[0].remove()
        return g * 5

    handles.append(h.register_hook(hook))
    return h.sin()


@each_way
@pytest.mark.parametrize(
    "function", [lambda r: Counting.apply(r), only_once, removes_itself],
    ids=["counter", "flag", "removed"],
)  # fmt: skip
def test_a_backward_that_changes_its_own_state(function: Function, options: dict[str, Any]) -> None:
    mapped = shardmap.vmap(function, **options)
    for _ in range(4):  # a remedy: call the map again
        x = rows()
        out = mapped(x).sum()
        (got,) = torch.autograd.grad(out, x, retain_graph=True)
        (want,) = torch.autograd.grad(loop(function)(x).sum(), x)
        torch.testing.assert_close(got, want)
        with pytest.raises(errors.AutogradFunctionError, match="a second gradient"):
            torch.autograd.grad(out, x)


@each_way
def test_both_gradients_inside(options: dict[str, Any]) -> None:
    def function(r: Tensor) -> Tensor:
        x = r.detach().requires_grad_()
        y = Counting.apply(x).sum()
        first = torch.autograd.grad(y, x, retain_graph=True)[0]
        return torch.stack([first, torch.autograd.grad(y, x)[0]])

    x = rows().detach()
    torch.testing.assert_close(shardmap.vmap(function, **options)(x), loop(function)(x))


@each_way
def test_a_state_that_does_not_matter(options: dict[str, Any]) -> None:
    """Notes of shapes, a cache and a tensor on `ctx` change no gradient."""
    seen: list[Any] = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.calls = 0
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            ctx.calls += 1
            ctx.last = grad * 3
            return ctx.last

    def function(r: Tensor) -> Tensor:
        h, k = Noting.apply(r), r * 3
        h.register_hook(lambda g: seen.append(g.shape))
        k.register_hook(lambda g: seen.append(g.shape))
        return h * k

    mapped = shardmap.vmap(function, **options)
    for _ in range(4):
        x = rows()
        out = mapped(x).sum()
        got = [torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2)]
        out = loop(function)(x).sum()
        want = [torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2)]
        torch.testing.assert_close(got, want)


def test_a_state_that_another_backward_changes_is_refused() -> None:
    def function(r: Tensor) -> Tensor:
        h, k, n = r * 2, r * 3, [0.0]

        def first(g: Tensor) -> Tensor:
            n[0] += 1
            return g * n[0]

        def second(g: Tensor) -> Tensor:
            n[0] += 1
            return g * n[0]

        h.register_hook(first)
        k.register_hook(second)
        return h * k

    with pytest.raises(errors.AutogradFunctionError, match="another backward changes"):
        shardmap.vmap(function)(rows())


# -- modes


class Asking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos() * 2 if torch.is_grad_enabled() else grad * x.cos() * 3


class AskingInVain(Asking):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad * x.cos()
        return grad * x.cos()


@each_way
def test_a_backward_that_asks_if_it_is_differentiated(options: dict[str, Any]) -> None:
    mapped, wanted = [m(lambda r: Asking.apply(r), **options) for m in (shardmap.vmap, loop)]
    for _ in range(4):
        x = rows()
        (got,) = torch.autograd.grad(mapped(x).sum(), x)
        (want,) = torch.autograd.grad(wanted(x).sum(), x)
        torch.testing.assert_close(got, want)
        with pytest.raises(errors.AutogradFunctionError, match=r"is_grad_enabled\(\)"):
            torch.autograd.grad(mapped(x).sum(), x, create_graph=True)


@each_way
def test_the_remedies_of_such_a_backward(options: dict[str, Any]) -> None:
    def inside(r: Tensor) -> Tensor:
        x = r.detach().requires_grad_()
        return torch.autograd.grad(Asking.apply(x).sum(), x, create_graph=True)[0].detach()

    x = rows()
    got, want = shardmap.vmap(inside, **options)(x), loop(inside)(x)
    torch.testing.assert_close(got, want)
    mapped, wanted = [m(lambda r: AskingInVain.apply(r), **options) for m in (shardmap.vmap, loop)]
    for _ in range(4):
        found = []
        for m in (mapped, wanted):
            (first,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
            (plain,) = torch.autograd.grad(m(x).sum(), x)
            found.append((first, plain, torch.autograd.grad(first.sum(), x)[0]))
        torch.testing.assert_close(*found)


@each_way
def test_a_backward_of_a_backward_that_asks(options: dict[str, Any]) -> None:
    class Outer(AskingInVain):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return Asking.apply(grad * ctx.saved_tensors[0])

    mapped, wanted = [m(lambda r: Outer.apply(r), **options) for m in (shardmap.vmap, loop)]
    for _ in range(4):
        x, found = rows(), []
        for m in (mapped, wanted):
            (first,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
            found.append((first, torch.autograd.grad(first.sum(), x)[0]))
        torch.testing.assert_close(*found)


def test_a_backward_that_asks_and_counts_is_refused() -> None:
    class Both(Counting):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            ctx.n += 1
            return grad * ctx.n if torch.is_grad_enabled() else grad

    with pytest.raises(errors.AutogradFunctionError, match="changes what it reads"):
        shardmap.vmap(lambda r: Both.apply(r))(rows())


torch.manual_seed(0)
A = torch.randn(3, 3)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (A @ x).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (A.T @ grad).float()


class Decorated(Linear):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (A @ x).float()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (A.T @ grad).float()


class Pointwise(Linear):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.sin() * 2


def hooked(r: Tensor) -> Tensor:
    h = r * 2
    h.register_hook(lambda g: (A @ g).float())
    return h.sin()


class Half(torch.autograd.Function):
    """Its backward computes under autocast only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return A @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (A.T @ grad).float()


def autocast(on: bool) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)


def cast(mapper: Any, function: Function, forward: bool, backward: bool, **options: Any) -> Tensor:
    x = torch.linspace(0.5, 1.5, 15).view(5, 3).requires_grad_()
    with autocast(forward):
        y = mapper(function, **options)(x)
    with autocast(backward):
        return torch.autograd.grad((y * torch.linspace(1, 2, 3)).sum(), x)[0]


FUNCTIONS = {
    "function": lambda r: Linear.apply(r), "decorated": lambda r: Decorated.apply(r),
    "pointwise": lambda r: Pointwise.apply(r), "hook": hooked,
}  # fmt: skip


@each_way
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_autocast(forward: bool, backward: bool, name: str, options: dict[str, Any]) -> None:
    """Gradients are taken outside of autocast, as torch asks to; those inside only if all agree."""
    function = FUNCTIONS[name]
    if backward and name in ("function", "hook"):
        with pytest.raises(errors.AutogradFunctionError, match=r"under torch.autocast.*custom_bwd"):
            cast(shardmap.vmap, function, forward, backward, **options)
        return
    want = cast(loop, function, forward, backward)
    for _ in range(2):
        got = cast(shardmap.vmap, function, forward, backward, **options)
        tight = 1e-5 if not forward or name != "decorated" else 2e-2  # bfloat16 sums in an order
        torch.testing.assert_close(got, want, rtol=tight, atol=tight)


def test_a_backward_that_computes_under_autocast_only() -> None:
    def function(r: Tensor) -> Tensor:
        return Half.apply(r)

    want = cast(loop, function, True, True)
    got = cast(shardmap.vmap, function, True, True)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    with pytest.raises(errors.AutogradFunctionError, match="take it under the map's autocast"):
        cast(shardmap.vmap, function, True, False)


# -- tensors that are written


@each_way
def test_a_tensor_that_is_written_before_the_gradient(options: dict[str, Any]) -> None:
    w = torch.ones(3, dtype=torch.float64)

    def cloned(r: Tensor) -> Tensor:
        h, own = r * 2, w.clone()
        h.register_hook(lambda g: g * own)
        return h.sin()

    x, mapped = rows(), shardmap.vmap(as_a_hook(lambda g: g * w), **options)
    for value in (1.0, 2.0, 3.0, 4.0):  # a remedy: the gradient before the write
        w.fill_(value)
        (got,) = torch.autograd.grad(mapped(x).sum(), x)
        torch.testing.assert_close(got, torch.full_like(x, 2 * value))
    out = mapped(x).sum()
    w.fill_(5.0)
    refused = errors.CapturedWriteError if options.get("remat") else errors.AutogradFunctionError
    with pytest.raises(refused, match="written"):
        torch.autograd.grad(out, x)
    if options.get("remat"):  # computes again what it clones
        return
    results = []
    for mapper in (shardmap.vmap, loop):  # another: a clone
        w.fill_(2.0)
        out = mapper(cloned, **options)(x).sum()
        w.fill_(3.0)
        results.append(torch.autograd.grad(out, x)[0])
    torch.testing.assert_close(*results)


# -- batches of gradients


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.5 * grad * ctx.saved_tensors[0]


def multiplied(r: Tensor) -> Tensor:
    h = r.sin()
    h.register_hook(lambda g: A.double() @ g)
    return (h * h).sum()


@each_way
@pytest.mark.parametrize("function", [lambda r: Square.apply(r).sum(), multiplied])
def test_batches_of_gradients(function: Function, options: dict[str, Any]) -> None:
    mapped, eye = shardmap.vmap(function, **options), torch.eye(5, dtype=torch.float64)
    for _ in range(4):
        x = rows()
        found = [
            torch.autograd.grad(m(x), x, eye, is_grads_batched=True)[0]
            for m in (mapped, loop(function))
        ]
        torch.testing.assert_close(*found)


def test_a_vectorised_jacobian() -> None:
    x = rows().detach()
    found = [
        torch.autograd.functional.jacobian(m(lambda r: Square.apply(r)), x, vectorize=True)
        for m in (shardmap.vmap, loop)
    ]
    torch.testing.assert_close(*found)
