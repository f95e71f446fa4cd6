"""Cases of transforms and contexts around and inside, and of dtypes.

Importing this module adds them to `tests.cases`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests import oracle
from tests.cases import Kit, Run, case

# -- transforms around -----------------------------------------------------------------------------


def _around(
    name: str, transform: Callable[[Callable[..., Any], torch.Tensor, torch.Tensor], Any]
) -> None:
    def build(k: Kit) -> Run:
        x, w = k.x(3), k.w(3, grad=False)

        def run(vmap: oracle.Subject) -> Any:
            def total(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                return vmap(lambda row: (row * b).sin() * b.sum())(a)

            return transform(total, x, w)

        return run

    build.__name__ = name
    case(gradient=False)(build)


_around(
    "under_func_grad", lambda f, x, w: torch.func.grad(lambda a, b: f(a, b).sum(), (0, 1))(x, w)
)
_around("under_func_grad_of_captured", lambda f, x, w: torch.func.grad(lambda b: f(x, b).sum())(w))
_around("under_func_vjp", lambda f, x, w: torch.func.vjp(f, x, w)[1](x))
_around("under_func_jvp", lambda f, x, w: torch.func.jvp(f, (x, w), (x.cos(), w.cos())))
_around("under_func_jacrev", lambda f, x, w: torch.func.jacrev(f, (0, 1))(x, w))
_around("under_func_jacfwd", lambda f, x, w: torch.func.jacfwd(f, (0, 1))(x, w))
_around("under_func_hessian", lambda f, x, w: torch.func.hessian(lambda b: f(x, b).sum())(w))
_around(
    "under_func_vmap", lambda f, x, w: torch.func.vmap(f, (None, 0))(x, torch.stack([w, w + 1]))
)
_around(
    "under_func_vmap_of_grad",
    lambda f, x, w: torch.func.vmap(torch.func.grad(lambda b: f(x, b).sum()))(
        torch.stack([w, w + 1])
    ),
)
_around("under_functional_jacobian", lambda f, x, w: torch.autograd.functional.jacobian(f, (x, w)))


@case(gradient=False)
def under_func_vmap_without_gradients(k: Kit) -> Run:
    x = k.x(5, 4)
    return lambda vmap: torch.func.vmap(
        lambda rows: vmap(lambda a: (a.argmax(-1), a.detach() > 0))(rows)
    )(x)


# -- contexts --------------------------------------------------------------------------------------


def _within(
    name: str,
    context: Callable[[], Any],
    inside: bool,
    dtype: torch.dtype = torch.float32,
    **checks: Any,
) -> None:
    def build(k: Kit) -> Run:
        x, w = k.x(3, 4, grad=True, dtype=dtype), k.w(4, 4, dtype=dtype)

        def function(a: torch.Tensor) -> Any:
            with context() if inside else contextlib.nullcontext():
                q = (a @ w)[None]
                return (
                    F.scaled_dot_product_attention(q, q, q)[0],
                    F.linear(a, w),
                    torch.zeros(2) + a.sum(),
                    torch.tensor(0.5) * a.float(),
                )

        def run(vmap: oracle.Subject) -> Any:
            with contextlib.nullcontext() if inside else context():
                return vmap(function)(x)

        return run

    build.__name__ = f"{name}_{'inside' if inside else 'around'}"
    case(**checks)(build)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


for _inside in (False, True):
    _within("no_grad", torch.no_grad, _inside)
    _within(
        "inference_mode", torch.inference_mode, _inside, gradient=False, requires_grad=not _inside
    )
    _within(
        "autocast",
        lambda: torch.autocast("cpu", torch.bfloat16),
        _inside,
        precision=torch.bfloat16,
        second_order=False,
    )
    _within("default_float64", lambda: _default_dtype(torch.float64), _inside)
    _within(
        "math_attention", lambda: nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH), _inside
    )
    _within("default_device", lambda: torch.device("cpu"), _inside)


# -- promotion and dtypes --------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool)


@case(second_order=False)
def promotion_of_zero_dimensional_operands(k: Kit) -> Run:
    scalars = [k.x(dtype=d) for d in DTYPES]
    vectors = [k.x(3, dtype=d) for d in DTYPES]
    literals = [k.w(dtype=d, grad=False) for d in DTYPES]

    def function(ss: Any, vs: Any, ls: Any) -> Any:
        out = []
        for s in (*ss, *ls):
            for v in vs:
                out += [
                    s + v,
                    v * s,
                    torch.where(v > 0, s, v),
                    s < v,
                    torch.maximum(s, v),
                    v + 1.5,
                    s * 2,
                    torch.true_divide(v, 2),
                    s == v.sum(),
                ]
        return out

    return lambda vmap: vmap(function, (0, 0, None))(scalars, vectors, literals)


@case(second_order=False)
def casts(k: Kit) -> Run:
    x = k.x(3, dtype=torch.float32, grad=True)
    return lambda vmap: vmap(
        lambda a: (
            [(a * 3).to(d) for d in DTYPES] + [a.to(torch.bfloat16).float(), a.double().float()]
        )
    )(x)


@case(gradient=False)
def questions_about_shape_and_dtype(k: Kit) -> Run:
    x, w = k.x(3, 2), k.w(3, grad=False)

    def function(a: torch.Tensor) -> Any:
        scale = 2.0 if w.sum() > -100 else 3.0  # a question about an unmapped value has one answer
        return (
            a.reshape(a.numel())
            * a.shape[0]
            * (a.dim() + len(a))
            * scale
            * (1 if a.is_contiguous() and a.dtype == torch.float64 else 0)
        )

    return lambda vmap: vmap(function)(x)


@case()
def printing_changes_nothing(k: Kit) -> Run:
    x = k.x(3, grad=True)

    def function(a: torch.Tensor) -> torch.Tensor:
        print(a)
        return a * 2

    return lambda vmap: vmap(function)(x)


@case()
def parameters_made_inside(k: Kit) -> Run:
    x = k.x(3, 2, grad=True)

    def function(a: torch.Tensor) -> Any:
        weight = nn.Parameter(a)
        loss = (weight**2).sum() * a.sum()
        return loss, torch.autograd.grad(loss, weight, retain_graph=True)[0]

    return lambda vmap: vmap(function)(x)


@case()
def detached_then_written(k: Kit) -> Run:
    x, w = k.x(3, grad=True), k.w(3)
    return lambda vmap: vmap(
        lambda a: ((a * w).detach().mul_(a), torch.stack([w, w]).detach().mul_(w)[0].add_(a))
    )(x)


@case()
def written_after_an_index_without_grad(k: Kit) -> Run:
    x, y = k.x(3, 4), k.x(grad=True)

    def function(a: torch.Tensor, b: torch.Tensor) -> Any:
        with torch.no_grad():
            picked, shifted = a[:, torch.tensor([0, 2])], a[[1]]
        picked[:] = b.cos()
        shifted += b
        return picked, shifted, a

    return lambda vmap: vmap(function)(x, y)


@case(gradient=False)
def under_func_jvp_of_a_write_that_reads_its_detached_self(k: Kit) -> Run:
    x = k.x(3)

    def function(a: torch.Tensor) -> torch.Tensor:
        out = (a * 2).sin()
        out.addcmul_(out.detach(), a, value=0.5)
        return out

    return lambda vmap: torch.func.jvp(vmap(function), (x,), (x.cos(),))


@case()
def written_with_gaps_between_elements(k: Kit) -> Run:
    x = k.x(4, 3, 3, grad=True)

    def function(a: torch.Tensor) -> Any:
        rows = a[1, ..., 0]
        second = torch.func.hessian(lambda t: (t**3).sum())(rows)
        return second, second.mT.mv(rows)

    return lambda vmap: vmap(function)(x)
