"""Maps called while the same thread maps: `python -m tests.threads.reentered WHO`.

By a signal handler, by a finalizer, by a weak reference's callback, by a tensor's hook, by a custom
operator.
"""

from __future__ import annotations

import importlib
import signal
import sys
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

import shardmap
from tests.threads import process

x = torch.arange(12.0, dtype=torch.float64).view(3, 4) / 7
weight = torch.randn(4, 4, dtype=torch.float64)


def new_function(number: float) -> Callable[[Tensor], Tensor]:
    return lambda r: (r @ weight * number).sin()


class Inner:
    """The call that comes in between: a new program each time.

    Where it is a part of the function that is mapped, that must do the same for each sample.
    """

    def __init__(self, part: bool = False) -> None:
        self.part = part
        self.calls = 0
        self.faults: list[str] = []

    def __call__(self) -> None:
        self.calls += 1
        number = 1 if self.part else self.calls  # a handler may be interrupted by the next one
        f = new_function(number + 0.5)
        with torch.no_grad():
            found = shardmap.vmap(f, chunk_size=[None, 2][number % 2])(x)
            want = (x @ weight * (number + 0.5)).sin()
            if not torch.allclose(found, want):
                self.faults.append(f"inner call {number}")


def by_signal(inner: Inner) -> int:
    def handler(*_: object) -> None:
        inner()

    # what torch imports at first use cannot be imported by a handler meanwhile
    importlib.import_module("torch.fx.experimental.symbolic_shapes")
    for _ in range(2):
        inner()
        shardmap.vmap(new_function(0.5), chunk_size=2)(x)
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.0511)
    calls, until = 0, time.monotonic() + 6
    try:
        while time.monotonic() < until or inner.calls < 20:
            calls += 1
            f = new_function(-calls)
            found = shardmap.vmap(f, chunk_size=2 if calls % 2 else None)(x)
            torch.testing.assert_close(found, (x @ weight * -calls).sin())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return calls


class Cell:
    pass


def by_finalizer(inner: Inner) -> int:
    class Dying:
        def __del__(self) -> None:
            inner()

    def function(r: Tensor) -> Tensor:
        Dying()
        return r.sin() * 2

    for _ in range(10):
        torch.testing.assert_close(shardmap.vmap(function)(x), x.sin() * 2)
    return 10


def by_weak_reference(inner: Inner) -> int:
    def function(r: Tensor) -> Tensor:
        cell = Cell()
        reference = weakref.ref(cell, lambda _: inner())
        del cell
        assert reference() is None
        return r.sin() * 3

    for _ in range(10):
        torch.testing.assert_close(shardmap.vmap(function)(x), x.sin() * 3)
    return 10


def by_hook(inner: Inner) -> int:
    def function(r: Tensor) -> Tensor:
        y = r.detach().requires_grad_()
        z = y.sin()
        z.register_hook(lambda g: inner())
        return torch.autograd.grad(z.sum(), y)[0]

    for _ in range(10):
        torch.testing.assert_close(shardmap.vmap(function)(x), x.cos())
    return 10


def by_operator(inner: Inner) -> int:
    @torch.library.custom_op("tests_threads::mapping", mutates_args=())
    def mapping(t: Tensor) -> Tensor:
        inner()
        return t * 5

    for _ in range(5):
        torch.testing.assert_close(shardmap.vmap(lambda r: mapping(r).sin())(x), (x * 5).sin())
    return 5


WHO = {
    "signal": by_signal,
    "finalizer": by_finalizer,
    "weak reference": by_weak_reference,
    "hook": by_hook,
    "operator": by_operator,
}


def main(who: str) -> None:
    process.limit()
    torch.set_num_threads(1)
    inner = Inner(part=who in ("finalizer", "weak reference", "hook"))
    calls = WHO[who](inner)
    assert inner.calls >= min(calls, 5), f"{inner.calls} inner calls in {calls}"
    assert not inner.faults, inner.faults
    print(f"{calls} maps, {inner.calls} inside")


if __name__ == "__main__":
    main(sys.argv[1])
