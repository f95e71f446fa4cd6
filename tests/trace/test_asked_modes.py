"""Backwards and hooks that ask for autocast or the detection of anomalies, against the loop."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from tests.trace.gradient_readers import Function, Tensor, as_a_backward, as_a_hook, each_way, loop

ASK: dict[str, Callable[[], bool]] = {
    "enabled": lambda: torch.is_autocast_enabled("cpu"),
    "dtype": lambda: torch.get_autocast_dtype("cpu") == torch.float16,
    "cache": lambda: not torch.is_autocast_cache_enabled(),
    "anomaly": lambda: torch.is_anomaly_enabled(),
}
UNDER: dict[str, Callable[[], Any]] = {
    "enabled": lambda: torch.autocast("cpu"),
    "dtype": lambda: torch.autocast("cpu", dtype=torch.float16),
    "cache": lambda: torch.autocast("cpu", cache_enabled=False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "nothing": contextlib.nullcontext,
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anomaly detection says that it is slow
        yield


def gradient(mapped: Function, call: str, backward: str) -> Tensor:
    x = torch.linspace(0.5, 1.5, 15).view(5, 3).requires_grad_()
    with UNDER[call]():
        out = mapped(x)
    with UNDER[backward]():
        return torch.autograd.grad((out * torch.linspace(1, 2, 3)).sum(), x)[0]


@each_way
@pytest.mark.parametrize("kind", [as_a_backward, as_a_hook])
@pytest.mark.parametrize("name", ASK)
def test_the_gradient_is_the_loops_or_refused(
    name: str, kind: Callable[[Function], Function], options: dict[str, Any]
) -> None:
    ask = ASK[name]
    function = kind(lambda g: g * (2.0 if ask() else 1.0))
    mapped, want = shardmap.vmap(function, **options), loop(function)
    for call, backward in (("nothing", "nothing"), (name, "nothing"), ("nothing", name)) * 2:
        if backward == "nothing" and (name != "anomaly" or call == "nothing"):
            got = gradient(mapped, call, backward)  # as torch asks to take gradients
        else:
            try:
                got = gradient(mapped, call, backward)
            except errors.AutogradFunctionError:
                continue
        torch.testing.assert_close(got, gradient(want, call, backward))


@pytest.mark.parametrize("kind", [as_a_backward, as_a_hook])
@pytest.mark.parametrize("name", ASK)
def test_a_gradient_in_other_modes_is_refused(
    name: str, kind: Callable[[Function], Function]
) -> None:
    ask = ASK[name]
    function = kind(lambda g: g * (2.0 if ask() else 1.0))
    with pytest.raises(errors.AutogradFunctionError, match="asks for autocast or the detection"):
        gradient(shardmap.vmap(function), "nothing", name)


def test_anomaly_detection_around_both_is_served() -> None:
    function = as_a_backward(lambda g: g * (2.0 if torch.is_anomaly_enabled() else 1.0))
    mapped = shardmap.vmap(function)
    got, want = [gradient(each, "anomaly", "anomaly") for each in (mapped, loop(function))]
    torch.testing.assert_close(got, want)


@each_way
@pytest.mark.parametrize("kind", [as_a_backward, as_a_hook])
@pytest.mark.parametrize("backward", UNDER)
def test_an_answer_that_does_not_matter_is_not_refused(
    backward: str, kind: Callable[[Function], Function], options: dict[str, Any]
) -> None:
    def called(g: Tensor) -> Tensor:
        asked = torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled()
        return g * (3.0 if any(asked) else 3.0)

    function = kind(called)
    got = gradient(shardmap.vmap(function, **options), "nothing", backward)
    torch.testing.assert_close(got, gradient(loop(function), "nothing", backward))


class Asked(torch.autograd.Function):
    """The remedy: the forward asks, and keeps the answer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.scale = 2.0 if torch.is_autocast_enabled("cpu") else 1.0
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.scale


@each_way
def test_the_remedy(options: dict[str, Any]) -> None:
    function = lambda r: Asked.apply(r)
    mapped = shardmap.vmap(function, **options)
    for call in ("nothing", "enabled") * 2:
        for backward in ("nothing", "enabled"):
            got = gradient(mapped, call, backward)
            torch.testing.assert_close(got, gradient(loop(function), call, backward))
