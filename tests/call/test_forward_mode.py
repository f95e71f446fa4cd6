"""Forward mode around a map (`torch.autograd.forward_ad`), in every option, against the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import shardmap
from shardmap import errors
from tests.same import assert_same

Tensor = torch.Tensor
DTYPE = torch.float64

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


class OwnJvp(torch.autograd.Function):
    """A Function with a `jvp` that is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return 7 * tangents[0]


def without_grad(r: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        a = r * w
    return a * r * w


def by_inner_autograd(r: Tensor, w: Tensor) -> Tensor:
    with torch.enable_grad():
        q = r.detach().requires_grad_()
        (g,) = torch.autograd.grad((q * w).sin().sum(), q, create_graph=True)
    return g * w


def in_a_buffer(r: Tensor, w: Tensor) -> Tensor:
    buffer = torch.zeros(3, dtype=DTYPE)
    buffer[:2] = (r * w)[:2]
    return buffer.cumsum(0)


def written_by_a_detached_alias(r: Tensor, w: Tensor) -> Tensor:
    a = r * w
    alias = a.detach()
    alias[1:] *= 2
    return a.sin() * alias


def no_element_written_by_a_detached_alias(r: Tensor, w: Tensor) -> Tensor:
    a = r * w
    alias = a.detach()
    alias[3:] *= 2
    return a.sin() * alias


def a_detached_view_is_written(r: Tensor, w: Tensor) -> Tensor:
    a = r * w
    part = a[:2].detach()
    part += r[0] * w[0]
    return a[:2] * part


def hooked(r: Tensor, w: Tensor) -> Tensor:
    t = r * w
    if t.requires_grad:
        t.register_hook(lambda g: g * 3)
    return t.sin()


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "net": lambda r, w: NET(r * w),
    "detached": lambda r, w: (r * w).detach() * r * w,
    "in_place": lambda r, w: (r * w).mul_(w).add_(r),
    "inner_transform": lambda r, w: torch.func.grad(lambda q: (q * w).sin().sum())(r),
    "norm": lambda r, w: nn.functional.layer_norm(r * w, (3,)).tanh(),
    "captured_alone": lambda r, w: r * w.sin(),
    "without_grad": without_grad,
    "by_inner_autograd": by_inner_autograd,
    "in_a_buffer": in_a_buffer,
    "hooked": hooked,
    "written_by_a_detached_alias": written_by_a_detached_alias,
    "no_element_written": no_element_written_by_a_detached_alias,
    "a_detached_view_is_written": a_detached_view_is_written,
}

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks_of_one": {"chunk_size": 1},
    "chunks_of_three": {"chunk_size": 3},
    "two_lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "remat": {"remat": True, "chunk_size": 2},
    "reduced": {"reduce": shardmap.reduce.sum()},
}


def tangents(
    mapped: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]],
    function: Callable[[Tensor, Tensor], Tensor],
    dual: str,
    grad: bool,
) -> list[Tensor]:
    """The value, its tangent, and the gradients of both."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, dtype=DTYPE, generator=generator).requires_grad_(grad)
    w = torch.randn(3, dtype=DTYPE, generator=generator).requires_grad_(grad)
    with forward_ad.dual_level():
        dx = forward_ad.make_dual(x, x.detach().cos()) if "x" in dual else x
        dw = forward_ad.make_dual(w, w.detach().cos()) if "w" in dual else w
        out = mapped(lambda r: function(r, dw))(dx)
        value, tangent = forward_ad.unpack_dual(out)
        tangent = torch.zeros_like(value) if tangent is None else tangent
        found = [value, tangent]
        for t in (value, tangent):
            if grad and t.requires_grad:
                found += torch.autograd.grad(
                    t.sum(), [x, w], retain_graph=True, materialize_grads=True
                )
        return [t.detach() for t in found]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_are_those_of_the_loop(name: str, way: str) -> None:
    function, options = FUNCTIONS[name], WAYS[way]

    def by_loop(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        rows = lambda x: torch.stack([f(r) for r in x])
        return (lambda x: rows(x).sum(0)) if "reduce" in options else rows

    for dual in ("x", "w", "xw"):
        for grad in (False, True):
            want = tangents(by_loop, function, dual, grad)
            got = tangents(lambda f: shardmap.vmap(f, **options), function, dual, grad)
            for k, (a, b) in enumerate(zip(got, want, strict=True)):
                assert_same(a, b, f"{name}, duals {dual}, grad {grad}, tensor {k}")


@pytest.mark.parametrize("dual", ["x", "w"])
def test_the_jvp_of_a_function_is_refused_in_words(dual: str) -> None:
    def function(r: Tensor, w: Tensor) -> Tensor:
        return OwnJvp.apply(r * w)

    for options in WAYS.values():
        with pytest.raises(errors.AutogradFunctionError, match="forward-mode"):
            tangents(lambda f, o=options: shardmap.vmap(f, **o), function, dual, False)


def test_a_kept_recording_is_not_taken_for_one_under_forward_mode() -> None:
    mapped = shardmap.vmap(lambda r: OwnJvp.apply(r * 2), trace="once")
    x = torch.randn(5, 3, dtype=DTYPE)
    assert_same(mapped(x), (x * 2).sin(), "without duals")
    with forward_ad.dual_level():
        with pytest.raises(errors.AutogradFunctionError, match="forward-mode"):
            mapped(forward_ad.make_dual(x, x.cos()))
    assert_same(mapped(x), (x * 2).sin(), "without duals again")


def test_tangents_have_the_dtype_of_their_values() -> None:
    """Those of `torch.func.jvp` are float64 where a number multiplied a 0-dimensional float32."""
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    for function in (lambda r: r * 0.5, lambda r: torch.addcmul(r, r + 1.5, r + 1.5, value=0.5)):
        for options in ({}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}, {"trace": "once"}):
            mapped = shardmap.vmap(function, **options)
            value, tangent = torch.func.jvp(mapped, (x,), (x.cos(),))
            assert value.dtype == tangent.dtype == torch.float32
            loops = [torch.func.jvp(function, (r,), (r.cos(),))[1] for r in x]
            torch.testing.assert_close(tangent, torch.stack(loops).float())


def cubes(t: Tensor) -> Tensor:
    return (t**3).sum() + t[0] * t[1:].sum()


INNER: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": torch.func.grad(cubes),
    "jacrev": torch.func.jacrev(lambda t: t**3 * t[0]),
    "jacfwd": torch.func.jacfwd(lambda t: t**3 * t[0]),
    "jvp": lambda t: torch.func.jvp(cubes, (t,), (t.cos(),))[1],
    "vjp": lambda t: torch.func.vjp(cubes, t)[1](t.sum())[0],
    "hessian": torch.func.hessian(cubes),
    "a view of everything": lambda t: t[...] * t.sin()[:],
    "a view of everything, written": lambda t: t.clone()[...].mul_(t),
}
OUTER: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).sin().sum())(x),
    "jvp of grad": lambda f, x: torch.func.jvp(
        torch.func.grad(lambda t: f(t).sin().sum()), (x,), (x.cos(),)
    )[1],
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("without", ["nothing", "the argument", "the transform", "both"])
@pytest.mark.parametrize("inner", INNER)
def test_tangents_pass_where_gradients_are_off(inner: str, without: str, outer: str) -> None:
    """`no_grad` stops gradients, not tangents; also those of transforms inside."""

    def function(r: Tensor) -> Tensor:
        with torch.set_grad_enabled(without not in ("the argument", "both")):
            a = r * r.exp()
        with torch.set_grad_enabled(without not in ("the transform", "both")):
            return INNER[inner](a)

    x = torch.randn(3, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(2))
    want = OUTER[outer](lambda t: torch.stack([function(r) for r in t]), x)
    for way in ("whole", "chunks_of_one", "once"):
        mapped = shardmap.vmap(function, **WAYS[way])
        for _ in range(3):
            assert_same(OUTER[outer](mapped, x), want, way)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"trace": "once"}, {"trace": "each"}])
def test_torch_func_jvp_inside_a_vmap_around_the_map(options: dict[str, Any]) -> None:
    x, v = torch.randn(2, 5, 3, dtype=DTYPE), torch.randn(2, 5, 3, dtype=DTYPE)
    w = torch.randn(3, dtype=DTYPE)
    mapped = shardmap.vmap(lambda r: (r * w).sin(), **options)
    for _ in range(4):
        found = torch.func.vmap(lambda a, b: torch.func.jvp(mapped, (a,), (b,)))(x, v)
        assert_same(found[0], (x * w).sin(), "value")
        assert_same(found[1], (x * w).cos() * w * v, "tangent")


@pytest.mark.parametrize("options", [{}, {"trace": "once"}, {"trace": "each"}, {"chunk_size": 2}])
def test_vectorised_derivatives_of_torch_around_a_map(options: dict[str, Any]) -> None:
    """`torch.autograd.functional` forbids draws in the thread, those of a recording too."""
    x, w = torch.randn(5, 3, dtype=DTYPE), torch.randn(3, dtype=DTYPE)
    mapped = shardmap.vmap(lambda r, w: (r * w).sin().sum(), in_dims=(0, None), **options)

    def of_map(w: Tensor) -> Tensor:
        return mapped(x, w).prod()

    def of_loop(w: Tensor) -> Tensor:
        return torch.stack([(r * w).sin().sum() for r in x]).prod()

    functional = torch.autograd.functional
    forward = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
    for _ in range(4):
        got = functional.hessian(of_map, w, **forward)
        assert_same(got, functional.hessian(of_loop, w, **forward), "hessian")
        got = functional.jacobian(of_map, w, vectorize=True, strategy="forward-mode")
        want = functional.jacobian(of_loop, w, vectorize=True, strategy="forward-mode")
        assert_same(got, want, "jacobian")
