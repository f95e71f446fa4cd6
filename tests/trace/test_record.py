"""Recording leaves no trace: whatever the function raises, from however many threads."""

from __future__ import annotations

import concurrent.futures
import gc
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardmap
from tests import oracle

x = torch.arange(12.0).view(3, 4) + 1


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's random states are put back where no other thread draws; tests may leave threads."""
    for place in ("_threads", "trace.record", "trace.surroundings", "trace.thread_state"):
        monkeypatch.setattr(f"shardmap.{place}.alone", lambda: True)


class OwnError(Exception):
    """A placeholder for any exception of the user's."""


def state() -> dict[str, Any]:
    """Everything global that recording touches for a while."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    numpy: Any = np.random.get_state()
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "garbage collection": gc.isenabled(),
        "fast paths": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "cudnn": torch._C._get_cudnn_enabled(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "transforms": functorch.peek_interpreter_stack() is None,
        "requires_grad_ allowed": functorch.get_inplace_requires_grad_allowed(),
        "torch random": torch.random.get_rng_state().tolist(),
        "python random": random.getstate(),
        "numpy random": (numpy[1].tolist(), numpy[2]),
    }


def raising(error: BaseException) -> Callable[[torch.Tensor], torch.Tensor]:
    def function(r: torch.Tensor) -> torch.Tensor:
        random.random()
        np.random.rand()
        with torch.no_grad():
            torch.rand(2)
            raise error

    return function


PLACES: dict[str, Callable[[Any, Any], Any]] = {
    "alone": lambda v, f: v(f)(x),
    "under grad": lambda v, f: torch.func.grad(lambda y: v(f)(y).sum())(x),
    "under vmap": lambda v, f: torch.func.vmap(v(f), randomness="same")(x[None]),
    "nested": lambda v, f: v(lambda r: v(f)(x * r.sum()))(x),
    "inside grad": lambda v, f: v(torch.func.grad(f))(x),
    "inside vmap": lambda v, f: v(lambda r: torch.func.vmap(f, randomness="same")(x * r.sum()))(x),
    "chunks": lambda v, f: v(f, chunk_size=1)(x),
    "once": lambda v, f: v(f, trace="once")(x),
}


@pytest.mark.parametrize(
    "error", [OwnError("mine"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_left_behind(place: str, error: BaseException) -> None:
    """The exception is the function's own, and every mode, switch and random state is as before."""

    def mapped(function: Any, **options: Any) -> Any:
        return shardmap.vmap(function, randomness="same", **options)

    before = state()
    with pytest.raises(type(error)) as caught:
        PLACES[place](mapped, raising(error))
    assert caught.value is error
    assert state() == before


def test_garbage_collection_is_left_alone() -> None:
    """It belongs to the whole process: on or off, the function finds it as it was."""
    seen = []

    def function(r: torch.Tensor) -> torch.Tensor:
        seen.append(gc.isenabled())
        return r.sin()

    shardmap.vmap(function)(x)
    gc.disable()
    try:
        shardmap.vmap(function)(x)
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert set(seen[:1]) == {True}
    assert not seen[-1]


def test_threads() -> None:
    """Maps in several threads at once do not see each other, and put the global switches back."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    recurrent = nn.LSTM(4, 3)
    weight = torch.randn(4, 4, requires_grad=True)
    batch = torch.randn(3, 2, 4)
    shared = shardmap.vmap(lambda r: r * 2, trace="once")
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda r: layer(r),
        lambda r: recurrent(r)[0],
        lambda r: torch.autograd.grad((r @ weight).square().sum(), weight)[0],
        lambda r: (r @ weight).sin(),
    ]
    wanted = [oracle.loop(f)(batch) for f in functions]
    before = state()

    def work(number: int) -> None:
        function, want = functions[number % 4], wanted[number % 4]
        for turn in range(6):
            mapped = shardmap.vmap(
                function, trace="once" if turn % 2 else "each", chunk_size=None if turn % 3 else 2
            )
            oracle.assert_same(mapped(batch), want, f"function {number % 4}")
            oracle.assert_same(shared(batch), batch * 2, "shared map")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert state() == before
