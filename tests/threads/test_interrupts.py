"""Ctrl-C at any moment leaves no trace: a sender interrupts a process that maps in a loop."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

import shardmap
from shardmap.run import prepare
from shardmap.trace import generator, surroundings
from tests.threads import process
from tests.threads.interrupted import state

functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
x = torch.arange(12.0).view(3, 4)


def test_interrupts() -> None:
    assert process.run("interrupted", 30, 0, seconds=200) == "30 interrupts\n"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [2, 3])
def test_three_hundred_interrupts(seed: int) -> None:
    assert process.run("interrupted", 300, seed, seconds=1000) == "300 interrupts\n"


@contextlib.contextmanager
def entered_by_halves() -> Iterator[None]:
    """Put torch's own managers into all states that an interrupt can leave."""
    try:
        functorch._grad_increment_nesting()
        functorch._jvp_increment_nesting()
        eager_transforms.JVP_NESTING += 1
        forward_ad.enter_dual_level()
        torch.autocast_increment_nesting()
        torch.set_autocast_enabled("cpu", True)
        hooks: Any = torch._C._autograd  # type: ignore[attr-defined]
        hooks._saved_tensors_hooks_enable()  # torch.func.grad refuses them
        hooks._push_saved_tensors_default_hooks(id, id)
        torch._C._InferenceMode(True).__enter__()  # type: ignore[attr-defined]
        torch._C._set_grad_enabled(False)
        functorch.set_inplace_requires_grad_allowed(True)
        raise KeyboardInterrupt
        yield
    finally:
        pass


def watching() -> None:
    """Leave the watch for seeds as an interrupt at its start does."""
    generator.Watch().__enter__()


def broken(r: torch.Tensor) -> torch.Tensor:
    torch.overrides._pop_mode()
    watching()
    with entered_by_halves():
        return r


PLACES: dict[str, Any] = {
    "alone": lambda: shardmap.vmap(broken)(x),
    "once": lambda: shardmap.vmap(broken, trace="once")(x),
    "chunks": lambda: shardmap.vmap(broken, chunk_size=1)(x),
    "nested": lambda: shardmap.vmap(lambda r: shardmap.vmap(broken)(x * r.sum()))(x),
    "under grad": lambda: torch.func.grad(lambda y: shardmap.vmap(broken)(y).sum())(x),
    "under vmap": lambda: torch.func.vmap(shardmap.vmap(broken))(x[None]),
    "in a plan": lambda: shardmap.plan(broken)(x),
    "under no_grad": lambda: torch.no_grad()(shardmap.vmap(broken))(x),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_left_by_halves_is_restored(place: str) -> None:
    """The error is the interrupt, although the mode around it finds an empty stack to pop from."""
    before = state(), eager_transforms.JVP_NESTING
    with pytest.raises(KeyboardInterrupt):
        PLACES[place]()
    assert (state(), eager_transforms.JVP_NESTING) == before
    assert sys.getprofile() is None
    want = torch.stack([torch.func.jvp(torch.sin, (r,), (r,))[1] for r in x])
    found = shardmap.vmap(lambda r: torch.func.jvp(torch.sin, (r,), (r,))[1])(x)
    torch.testing.assert_close(found, want)


def test_an_error_about_an_interrupt_is_the_users_own() -> None:
    def function(r: torch.Tensor) -> torch.Tensor:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ValueError("mine") from error

    with pytest.raises(ValueError, match="mine"):
        shardmap.vmap(function)(x)


def test_an_error_while_an_older_interrupt_is_handled() -> None:
    """It is the function's: the interrupt came before the call."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(ValueError, match="either size"):
            shardmap.vmap(lambda r: torch.nn.functional.interpolate(r))(x)


def test_an_error_of_the_function_changes_nothing() -> None:
    """Modes that are on around the call stay on, the same objects in the same order."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(*args, **(kwargs or {}))

    def function(r: torch.Tensor) -> torch.Tensor:
        raise ValueError("mine")

    with Mode() as outer, Mode() as inner, torch.autocast("cpu"), torch.no_grad():
        before = state()
        with pytest.raises(ValueError, match="mine"):
            shardmap.vmap(function)(x)
        assert state() == before
        modes = torch.overrides._get_current_function_mode_stack()
        assert modes[0] is outer
        assert modes[1] is inner


@pytest.mark.parametrize("kind", ["recording", "trial"])
def test_an_interrupt_where_the_random_states_are_about_to_be_restored(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recording draws from torch's generator, to see seeds that a function sets."""
    # Idle threads of other tests' tools would keep the states from being read.
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    place = surroundings if kind == "recording" else prepare
    restored = place.restore_default_generators

    def interrupted(states: dict[str, torch.Tensor]) -> None:
        monkeypatch.setattr(place, "restore_default_generators", restored)
        torch.rand(3)  # as recording does
        raise KeyboardInterrupt

    batch = torch.arange(6.0).view(3, 2)
    shardmap.clear_caches()
    monkeypatch.setattr(place, "restore_default_generators", interrupted)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        shardmap.vmap(lambda r: r.sin())(batch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(shardmap.vmap(lambda r: r.sin())(batch), batch.sin())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    drawn = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):  # nothing is left that a later error would rewind to
        shardmap.vmap(lambda r: r / (1 // 0))(batch)
    assert torch.equal(torch.get_rng_state(), drawn)
