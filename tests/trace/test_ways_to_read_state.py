"""Ways by which a backward or a hook reads python state, which changes before the gradient."""

from __future__ import annotations

import abc
import builtins
import contextvars
import enum
import functools
import math
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import shardmap
from shardmap import errors
from tests.trace import imported
from tests.trace.gradient_readers import (
    Function,
    Tensor,
    as_a_backward,
    as_a_hook,
    each_way,
    loop,
    rows,
)

Read = Callable[[], Any]
Change = Callable[[], object]
Patch = pytest.MonkeyPatch


def decorated(function: Callable[..., Any], numbers: list[float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return function(*args) * numbers[0]

    return wrapped


def a_decorated_function_of_torch(_: Patch) -> tuple[Read, Change]:
    numbers = [1.0]
    ones = decorated(torch.ones, numbers)
    return lambda: ones(3).double(), lambda: numbers.__setitem__(0, 3.0)


def a_decorator_of_ones_own(_: Patch) -> tuple[Read, Change]:
    numbers = [1.0]
    one = decorated(lambda: 1.0, numbers)
    return lambda: one(), lambda: numbers.__setitem__(0, 3.0)


def single_dispatch(_: Patch) -> tuple[Read, Change]:
    @functools.singledispatch
    def dispatched(o: object) -> float:
        return 1.0

    return lambda: dispatched(1.0), lambda: dispatched.register(float, lambda o: 3.0)


def an_abstract_class(_: Patch) -> tuple[Read, Change]:
    abstract = abc.ABCMeta("Abstract", (), {})

    class Kind:
        pass

    made = Kind()
    read = lambda: 3.0 if isinstance(made, abstract) else 1.0
    return read, lambda: abstract.register(Kind)


def a_pattern(_: Patch) -> tuple[Read, Change]:
    class Point:
        __match_args__ = ("a",)
        a, b = 1.0, 3.0

    point = Point()

    def read() -> float:
        match point:
            case Point(value):
                return value
        return 0.0

    return read, lambda: setattr(Point, "__match_args__", ("b",))


def an_import(patch: Patch) -> tuple[Read, Change]:
    def read() -> float:
        import tests.trace.imported

        return tests.trace.imported.k

    return read, lambda: patch.setattr(imported, "k", 3.0)


def an_import_of_a_name(patch: Patch) -> tuple[Read, Change]:
    def read() -> float:
        from tests.trace.imported import k

        return k

    return read, lambda: patch.setattr(imported, "k", 3.0)


def a_relative_import(patch: Patch) -> tuple[Read, Change]:
    def read() -> float:
        from .imported import k

        return k

    return read, lambda: patch.setattr(imported, "k", 3.0)


def numpy_memory(_: Patch) -> tuple[Read, Change]:
    w = torch.ones(3)
    return lambda: float(w.numpy().sum()), lambda: w.fill_(3.0)


def a_version(_: Patch) -> tuple[Read, Change]:
    w = torch.ones(3)
    return lambda: 1.0 + w._version, lambda: w.fill_(3.0)


def annotations(_: Patch) -> tuple[Read, Change]:
    def annotated(a: Any) -> None: ...

    annotated.__annotations__["a"] = 1.0
    read = lambda: annotated.__annotations__["a"]
    return read, lambda: annotated.__annotations__.update(a=3.0)


def a_name_of_a_function(_: Patch) -> tuple[Read, Change]:
    def f() -> None: ...

    return lambda: float(len(f.__name__)), lambda: setattr(f, "__name__", "fff")


def a_name_of_a_class(_: Patch) -> tuple[Read, Change]:
    class K:
        pass

    return lambda: float(len(K.__name__)), lambda: setattr(K, "__name__", "KKK")


def a_hook_of_all_modules(patch: Patch) -> tuple[Read, Change]:
    module, one = nn.Identity(), torch.ones((), dtype=torch.float64)

    def change() -> None:
        handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: y * 3)
        patch.setattr(imported, "handle", handle, raising=False)

    return lambda: module(one), change


def a_patched_function_of_torch(patch: Patch) -> tuple[Read, Change]:
    one = torch.ones((), dtype=torch.float64)
    return (
        lambda: functional.softplus(one),
        lambda: patch.setattr(functional, "softplus", lambda z: z * 7),
    )


def a_patched_function_of_python(patch: Patch) -> tuple[Read, Change]:
    return lambda: float(math.floor(1.2)), lambda: patch.setattr(math, "floor", lambda z: 3)


def a_name_of_builtins(patch: Patch) -> tuple[Read, Change]:
    patch.setattr(builtins, "shardmap_k", 1.0, raising=False)
    read = eval("lambda: shardmap_k", {"__name__": "tests.made"})
    return lambda: read(), lambda: setattr(builtins, "shardmap_k", 3.0)


def a_patched_builtin(patch: Patch) -> tuple[Read, Change]:
    return lambda: float(round(1.2)), lambda: patch.setattr(builtins, "round", lambda z: 3)


def a_queue(_: Patch) -> tuple[Read, Change]:
    held: queue.Queue[int] = queue.Queue()
    held.put(1)
    return lambda: float(held.qsize()), lambda: held.put(1)


def a_context(_: Patch) -> tuple[Read, Change]:
    var = contextvars.ContextVar("var", default=1.0)
    context = contextvars.copy_context()
    return lambda: context.run(var.get), lambda: context.run(var.set, 3.0)


def a_seed(_: Patch) -> tuple[Read, Change]:
    generator = torch.Generator().manual_seed(1)
    return lambda: float(generator.initial_seed()), lambda: generator.manual_seed(3)


def a_member_of_an_enumeration(_: Patch) -> tuple[Read, Change]:
    class Color(enum.Enum):
        RED = 1.5

    return lambda: Color.RED._value_, lambda: setattr(Color.RED, "_value_", 2.5)


def a_setting_of_a_backend(patch: Patch) -> tuple[Read, Change]:
    read = lambda: 3.0 if torch.backends.cudnn.benchmark else 1.0
    patch.setattr(torch.backends.cudnn, "benchmark", False)
    return read, lambda: patch.setattr(torch.backends.cudnn, "benchmark", True)


pytestmark = pytest.mark.usefixtures("settable_backends")
WAYS = (
    a_decorated_function_of_torch, a_decorator_of_ones_own, single_dispatch, an_abstract_class,
    a_pattern, an_import, an_import_of_a_name, a_relative_import, numpy_memory, a_version,
    annotations, a_name_of_a_function, a_name_of_a_class, a_hook_of_all_modules,
    a_patched_function_of_torch, a_patched_function_of_python, a_name_of_builtins,
    a_patched_builtin, a_queue, a_context, a_seed, a_member_of_an_enumeration,
    a_setting_of_a_backend,
)  # fmt: skip


@each_way
@pytest.mark.parametrize("kind", [as_a_backward, as_a_hook])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_change_is_refused_and_without_one_it_is_the_loops(
    way: Callable[[Patch], tuple[Read, Change]],
    kind: Callable[[Function], Function],
    options: dict[str, Any],
    monkeypatch: Patch,
) -> None:
    read, change = way(monkeypatch)
    function, x = kind(lambda g: g * read()), rows()
    if options.get("trace") == "once" and way in (numpy_memory, a_version):
        options = {}  # captured values are not read by python there
    mapped = shardmap.vmap(function, **options)
    for _ in range(3):  # a remedy: the gradient before the change
        (want,) = torch.autograd.grad(loop(function)(x).sum(), x)
        torch.testing.assert_close(torch.autograd.grad(mapped(x).sum(), x)[0], want)
    out, want_out = mapped(x), loop(function)(x)
    try:
        change()
        (got,) = torch.autograd.grad(want_out.sum(), x)
        assert not torch.equal(got, want)  # the change matters
        with pytest.raises(errors.AutogradFunctionError, match="changed between the map and its"):
            torch.autograd.grad(out.sum(), x)
        if options.get("trace") != "once" or way is not a_seed:  # a seed is not watched there
            torch.testing.assert_close(torch.autograd.grad(mapped(x).sum(), x)[0], got)
    finally:
        if handle := getattr(imported, "handle", None):
            handle.remove()


class Wrapped(torch.autograd.Function):
    """A backward behind a decorator of the user's."""

    numbers = [1.0]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @functools.partial(decorated, numbers=numbers)
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@each_way
def test_a_decorator_around_a_backward(options: dict[str, Any]) -> None:
    function, x = lambda r: Wrapped.apply(r), rows()
    mapped = shardmap.vmap(function, **options)
    for number in (1.0, 2.0, 2.0):
        Wrapped.numbers[0] = number
        (want,) = torch.autograd.grad(loop(function)(x).sum(), x)
        torch.testing.assert_close(torch.autograd.grad(mapped(x).sum(), x)[0], want)
    out = mapped(x)
    Wrapped.numbers[0] = 5.0
    with pytest.raises(errors.AutogradFunctionError, match="changed between the map and its"):
        torch.autograd.grad(out.sum(), x)
