"""Settings of `torch.backends`, objects of ctypes and dispatched functions, read and changed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch.backends import mkldnn as by_another_name
from torch.backends.cuda import flash_sdp_enabled as asked_by_another_name
from torch.backends.cuda import matmul

import shardmap
from shardmap import errors
from tests.same import assert_same
from tests.trace.gradient_readers import KINDS, by_function, gradient, loop

Tensor = torch.Tensor


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_double), ("b", ctypes.c_double))


class Kept:
    """What the functions read, made anew for each test."""

    number = ctypes.c_double(2.0)
    array = (ctypes.c_double * 2)(2.0, 3.0)
    pair = Pair(2.0, 3.0)
    pointer = ctypes.pointer(number)

    def reset(self) -> None:
        self.number.value, self.array[0], self.pair.a = 2.0, 2.0, 2.0


KEPT = Kept()


@functools.singledispatch
def scale(x: object) -> float:
    return 2.0


class Scaling:
    @functools.singledispatchmethod
    def of(self, x: object) -> float:
        return 2.0


SCALING = Scaling()


def registered(factor: float) -> Callable[[Any], float]:
    return lambda x: factor


def registered_method(factor: float) -> Callable[[Scaling, Any], float]:
    return lambda self, x: factor


class Case(NamedTuple):
    """A setting that a function or a backward reads."""

    read: Callable[[], float]
    change: Callable[[], object]


def flag(read: Callable[[], float], module: object, name: str, new: object) -> Case:
    return Case(read, lambda: setattr(module, name, new))


CASES = {
    "allow_tf32": flag(
        lambda: 2.0 + bool(torch.backends.cuda.matmul.allow_tf32), matmul, "allow_tf32", True
    ),
    "allow_tf32 by another name": flag(
        lambda: 2.0 + bool(matmul.allow_tf32), matmul, "allow_tf32", True
    ),
    "reduced precision": flag(
        lambda: 2.0 + bool(matmul.allow_fp16_reduced_precision_reduction),
        matmul, "allow_fp16_reduced_precision_reduction", False,
    ),
    "mkldnn": flag(
        lambda: 2.0 + bool(torch.backends.mkldnn.enabled), by_another_name, "enabled", False
    ),
    "mkldnn by another name": flag(
        lambda: 2.0 + bool(by_another_name.enabled), by_another_name, "enabled", False
    ),
    "fp32_precision": flag(
        lambda: 2.0 + (torch.backends.mkldnn.matmul.fp32_precision == "ieee"),  # pyright: ignore
        torch.backends.mkldnn.matmul, "fp32_precision", "ieee",  # pyright: ignore
    ),
    "cudnn.benchmark": flag(
        lambda: 2.0 + torch.backends.cudnn.benchmark, torch.backends.cudnn, "benchmark", True
    ),
    "cudnn.enabled": flag(
        lambda: 2.0 + torch.backends.cudnn.enabled, torch.backends.cudnn, "enabled", False
    ),
    "cudnn.deterministic": flag(
        lambda: 2.0 + torch.backends.cudnn.deterministic,
        torch.backends.cudnn, "deterministic", True,
    ),
    "flash": Case(
        lambda: 2.0 + torch.backends.cuda.flash_sdp_enabled(),
        lambda: torch.backends.cuda.enable_flash_sdp(False),
    ),
    "flash by another name": Case(
        lambda: 2.0 + asked_by_another_name(),
        lambda: torch.backends.cuda.enable_flash_sdp(False),
    ),
    "a number of C": flag(lambda: KEPT.number.value, KEPT.number, "value", 3.0),
    "an array of C": Case(lambda: KEPT.array[0], lambda: KEPT.array.__setitem__(0, 3.0)),
    "a structure of C": flag(lambda: KEPT.pair.a, KEPT.pair, "a", 3.0),
    "a pointer of C": flag(lambda: KEPT.pointer.contents.value, KEPT.number, "value", 3.0),
    "a dispatched function": Case(
        lambda: scale(torch.zeros(())), lambda: scale.register(Tensor, registered(3.0))
    ),
    "a dispatched method": Case(
        lambda: SCALING.of(torch.zeros(())),
        lambda: Scaling.of.register(Tensor, registered_method(3.0)),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_before(settable_backends: None) -> Iterator[None]:
    """Every setting is put back."""
    KEPT.reset()
    kept = [
        (m, n, getattr(m, n))
        for m, n in (
            (by_another_name, "enabled"), (torch.backends.cudnn, "benchmark"),
            (torch.backends.cudnn, "enabled"), (torch.backends.cudnn, "deterministic"),
            (matmul, "allow_tf32"), (matmul, "allow_fp16_reduced_precision_reduction"),
            (torch.backends.mkldnn.matmul, "fp32_precision"),  # pyright: ignore
        )
    ]  # fmt: skip
    scale.register(Tensor, registered(2.0))
    Scaling.of.register(Tensor, registered_method(2.0))  # pyright: ignore
    shardmap.clear_caches()
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    for module, name, value in kept:
        setattr(module, name, value)


@pytest.mark.parametrize("trace", ["auto", "once"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_a_backward_reads_it_as_the_loop_does(name: str, kind: str, trace: str) -> None:
    read, change = CASES[name]
    function = KINDS[kind](read)
    mapped = shardmap.vmap(function, trace=trace)
    for _ in range(3):
        assert_same(gradient(mapped), gradient(loop(function)), name)
    before = read()
    change()
    assert read() != before
    for _ in range(2):
        assert_same(gradient(mapped), gradient(loop(function)), f"{name}, changed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_a_change_before_the_gradient_is_refused(name: str, kind: str) -> None:
    read, change = CASES[name]
    mapped = shardmap.vmap(KINDS[kind](read))
    with pytest.raises(errors.AutogradFunctionError, match="has changed between the map and its"):
        gradient(mapped, between=change)

    def inside(r: Tensor) -> Tensor:  # the error's remedy
        (g,) = torch.autograd.grad((KINDS[kind](read)(r) * r.detach()).sum(), r)
        return g

    def call(x: Tensor) -> Tensor:
        return shardmap.vmap(inside)(x.requires_grad_())

    x = torch.arange(6.0).reshape(3, 2)
    assert_same(call(x), loop(lambda r: read() * r)(x), name)


@pytest.mark.parametrize("trace", ["auto", "once"])
@pytest.mark.parametrize("name", CASES)
def test_a_function_reads_it_as_the_loop_does(name: str, trace: str) -> None:
    read, change = CASES[name]

    def function(r: Tensor) -> Tensor:
        return r * read()

    mapped = shardmap.vmap(function, trace=trace)
    x = torch.arange(6.0).reshape(3, 2)
    for _ in range(4):
        assert_same(mapped(x), loop(function)(x), name)
    change()
    for _ in range(2):
        assert_same(mapped(x), loop(function)(x), f"{name}, changed")


def test_items_behind_a_pointer_are_refused() -> None:
    mapped = shardmap.vmap(by_function(lambda: KEPT.pointer[0]))
    with pytest.raises(errors.AutogradFunctionError, match="a pointer of ctypes"):
        gradient(mapped)
