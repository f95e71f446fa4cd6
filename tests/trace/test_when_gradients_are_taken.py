"""What a backward or a hook meets when the gradient is taken, against the loop."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import enum
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from shardmap.program import python_state

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]
Case = tuple[Function, Callable[[], object]]
"""What is called with the gradient, and a change of what it reads."""

WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "chunks": {"chunk_size": 2},
    "lanes": {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
    "remat": {"remat": True, "chunk_size": 2},
}
each_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


def loop(function: Function, **_: object) -> Function:
    return lambda x: torch.stack([function(r) for r in x])


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(5, 3, dtype=dtype).requires_grad_()


def as_a_backward(called: Function) -> Function:
    class Called(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return called(grad)

    return lambda r: Called.apply(r)


def as_a_hook(called: Function) -> Function:
    def function(r: Tensor) -> Tensor:
        h = r * 2
        h.register_hook(called)
        return h * 1

    return function


class Mode(enum.Enum):
    ONE = 1
    TWO = 2


def an_enum_member() -> Case:
    o = SimpleNamespace(mode=Mode.ONE)
    return lambda g: g if o.mode is Mode.ONE else -g, lambda: setattr(o, "mode", Mode.TWO)


def a_function_of_torch() -> Case:
    o = SimpleNamespace(f=torch.sin)
    return lambda g: o.f(g), lambda: setattr(o, "f", torch.cos)


def a_set() -> Case:
    s = {1}
    return lambda g: g * 2 if 3 in s else g, lambda: s.add(3)


def an_array() -> Case:
    a = np.ones(3)
    return lambda g: g * float(a[1]), lambda: a.__setitem__(1, 7)


def a_deque() -> Case:
    d = collections.deque([1.0, 2.0], maxlen=2)
    return lambda g: g * d[0], lambda: d.append(3.0)


def an_attribute_that_is_computed() -> Case:
    class Holder:
        def __init__(self) -> None:
            self.d = {"k": 2.0}

        def __getattr__(self, name: str) -> float:
            return self.d[name]

    h = Holder()
    return lambda g: g * h.k, lambda: h.d.update(k=9.0)


def a_length() -> Case:
    class Sized:
        def __init__(self) -> None:
            self.items = [1.0]

        def __len__(self) -> int:
            return len(self.items)

    z = Sized()
    return lambda g: g * len(z), lambda: z.items.append(1.0)


def what_a_called_function_closes_over() -> Case:
    b = [2.0]

    def inner() -> float:
        return b[0]

    def outer(g: Tensor) -> Tensor:
        return g * inner()

    return outer, lambda: b.__setitem__(0, 9.0)


def an_attribute_by_getattr() -> Case:
    q = SimpleNamespace(k=2.0)
    return lambda g: g * getattr(q, "k"), lambda: setattr(q, "k", 9.0)  # noqa: B009


def an_attribute_by_a_computed_name() -> Case:
    q, names = SimpleNamespace(k1=2.0), SimpleNamespace(first="k")
    return lambda g: g * getattr(q, names.first + "1"), lambda: setattr(q, "k1", 9.0)


def an_attribute_that_is_not_there() -> Case:
    e = SimpleNamespace()
    return lambda g: g * 3 if hasattr(e, "k") else g, lambda: setattr(e, "k", 9.0)


def requires_grad() -> Case:
    w = torch.randn(4, requires_grad=True)
    return lambda g: g * 2 if w.requires_grad else g, lambda: w.requires_grad_(False)


def a_default() -> Case:
    def called(g: Tensor, k: float = 2.0) -> Tensor:
        return g * k

    return called, lambda: setattr(called, "__defaults__", (9.0,))


def the_order_of_a_dict() -> Case:
    d = {"a": 1.0, "b": 2.0}

    def called(g: Tensor) -> Tensor:
        for v in d.values():
            g = g * v + 1
        return g

    return called, lambda: d.update(a=d.pop("a"))


def a_variable_that_holds_an_object() -> Case:
    held = SimpleNamespace(k=2.0)

    def change() -> None:
        nonlocal held
        held = SimpleNamespace(k=9.0)

    return lambda g: g * held.k, change


def a_context_variable() -> Case:
    v = contextvars.ContextVar("v", default=2.0)
    return lambda g: g * v.get(), lambda: v.set(9.0)


def something_deep() -> Case:
    o = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=[{"k": SimpleNamespace(d=2.0)}])))
    return lambda g: g * o.a.b.c[0]["k"].d, lambda: setattr(o.a.b.c[0]["k"], "d", 9.0)


def a_variable_of_this_thread() -> Case:
    o = threading.local()
    o.k = 2.0
    return lambda g: g * o.k, lambda: setattr(o, "k", 9.0)


def the_end_of_a_long_list() -> Case:
    numbers = [2.0] * 1000
    return lambda g: g * numbers[-1], lambda: numbers.__setitem__(-1, 9.0)


def a_partial() -> Case:
    o = SimpleNamespace(f=functools.partial(torch.mul, other=2.0))
    return lambda g: o.f(g), lambda: setattr(o, "f", functools.partial(torch.mul, other=9.0))


def a_comparison() -> Case:
    @dataclasses.dataclass
    class Setting:
        level: int

    one, other = Setting(1), Setting(1)
    return lambda g: g * 3 if one == other else g, lambda: setattr(other, "level", 2)


def a_module_that_is_called() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strength = 2.0

        def forward(self, g: Tensor) -> Tensor:
            return g * self.strength

    net = nn.Sequential(Net())
    return lambda g: net(g), lambda: setattr(net[0], "strength", 9.0)


CASES = [
    an_enum_member, a_function_of_torch, a_set, an_array, a_deque, an_attribute_that_is_computed,
    a_length, what_a_called_function_closes_over, an_attribute_by_getattr,
    an_attribute_by_a_computed_name, an_attribute_that_is_not_there, requires_grad, a_default,
    the_order_of_a_dict, a_variable_that_holds_an_object, a_context_variable, something_deep,
    a_variable_of_this_thread, the_end_of_a_long_list, a_partial, a_comparison, a_module_that_is_called,
]  # fmt: skip


@each_way
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("reader", [as_a_backward, as_a_hook])
def test_a_change_before_the_gradient_is_refused(
    reader: Callable[[Function], Function],
    case: Callable[[], Case],
    options: dict[str, Any],
) -> None:
    called, change = case()
    function = reader(called)
    mapped = shardmap.vmap(function, **options)
    x = rows()
    for _ in range(4):
        (got,) = torch.autograd.grad(mapped(x).sum(), x)
        (want,) = torch.autograd.grad(loop(function)(x).sum(), x)
        torch.testing.assert_close(got, want)
    out = mapped(x).sum()
    change()
    with pytest.raises(errors.AutogradFunctionError, match="changed between the map and its"):
        torch.autograd.grad(out, x)
    (got,) = torch.autograd.grad(shardmap.vmap(function, **options)(x).sum(), x)
    (want,) = torch.autograd.grad(loop(function)(x).sum(), x)
    torch.testing.assert_close(got, want)


@each_way
def test_a_setting_of_torch(options: dict[str, Any]) -> None:
    def called(g: Tensor) -> Tensor:
        return g * 2 if torch.are_deterministic_algorithms_enabled() else g

    x = rows()
    out = shardmap.vmap(as_a_hook(called), **options)(x).sum()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(errors.AutogradFunctionError, match="are_deterministic"):
            torch.autograd.grad(out, x)
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_iterator_is_refused() -> None:
    numbers: Iterator[float] = iter([1.0, 2.0] * 50)
    x = rows()
    with pytest.raises(errors.ShardmapError):
        torch.autograd.grad(shardmap.vmap(as_a_hook(lambda g: g * next(numbers)))(x).sum(), x)


def test_methods_that_do_not_run_are_not_read() -> None:
    """The forward of a module that a hook reads a number of, a state that no gradient needs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.calls = 2.0, 0

        def forward(self, r: Tensor) -> Tensor:
            h = r * 2 if self.calls >= 0 else r
            h.register_hook(lambda g: g * self.scale)
            return h * 1

    net, x = Net(), rows()
    out = shardmap.vmap(net)(x).sum()
    net.calls += 1
    torch.testing.assert_close(torch.autograd.grad(out, x)[0], torch.full_like(x, 4))


def test_layers_with_one_hook_are_read_once_each() -> None:
    class Scale:
        k = 1.0

    def function(r: Tensor) -> Tensor:
        scale = Scale()
        for _ in range(30):
            r = r * 1
            r.register_hook(lambda g: g * scale.k)
        return r

    x, mapped = rows(), shardmap.vmap(function)
    for _ in range(4):
        out = mapped(x)
        (got,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(got, torch.ones_like(x))
    (name,) = [name for name in python_state._readers if "read_once_each" in name]
    assert len(python_state.readers_named(name)) <= 2


def test_what_does_not_matter_may_change() -> None:
    """Other attributes, equal numbers, objects that are made anew with equal contents."""
    o = SimpleNamespace(k=2.0, steps=0, settings={"a": 1.0}, sizes=[1, 2])
    x = rows()
    out = shardmap.vmap(as_a_hook(lambda g: g * o.k * o.settings["a"] + o.sizes[1]))(x).sum()
    o.steps, o.k, o.settings, o.sizes = 5, float("2"), {"a": 1.0}, [1, 2]
    (got,) = torch.autograd.grad(out, x)
    torch.testing.assert_close(got, torch.full_like(x, 2 * (2.0 + 2)))


@each_way
def test_a_logger_and_a_lock(options: dict[str, Any]) -> None:
    logger, lock = logging.getLogger("of a hook"), threading.Lock()

    def called(g: Tensor) -> Tensor:
        with lock:
            logger.debug("a gradient of shape %s", g.shape)
        return g * 2

    x = rows()
    out = shardmap.vmap(as_a_hook(called), **options)(x).sum()
    logger.setLevel(logging.INFO)
    logger.info("between")
    torch.testing.assert_close(torch.autograd.grad(out, x)[0], torch.full_like(x, 4))


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
    function: Function = lambda r: Half.apply(r)  # noqa: E731
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
