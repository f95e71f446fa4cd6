"""Cases of autograd inside a mapped function.

Importing this module adds them to `tests.cases`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tests import oracle
from tests.cases import Kit, Run, case


@case()
def detach_and_no_grad(k: Kit) -> Run:
    x, w = k.x(3, grad=True), k.w(3)

    def function(a: torch.Tensor) -> Any:
        with torch.no_grad():
            c = a * w
        return a.detach() * a * w, c * a, c, (a * w).detach(), a.exp()

    return lambda vmap: vmap(function)(x)


@case()
def shape_changed_in_place_without_grad(k: Kit) -> Run:
    """The tensor keeps its history, and may be written afterwards."""
    x = k.x(3, grad=True)

    def function(a: torch.Tensor) -> Any:
        b, c = a * 2, a.exp()
        with torch.no_grad():
            b.unsqueeze_(0)
            c.unsqueeze_(0)
        c[c > 1] = 0.25
        return b @ b.mT, c**2

    return lambda vmap: vmap(function)(x)


@case()
def straight_through_estimator(k: Kit) -> Run:
    x = k.x(4, grad=True)
    return lambda vmap: vmap(lambda a: (a.round() - a).detach() + a.tanh())(x)


@case()
def inner_gradient_without_graph(k: Kit) -> Run:
    x, w = k.x(3, grad=True), k.w(3)

    def function(a: torch.Tensor) -> Any:
        (g,) = torch.autograd.grad((a * w).sin().sum(), a, retain_graph=True)
        return g * a * w

    return lambda vmap: vmap(function)(x)


@case()
def inner_gradient_with_graph(k: Kit) -> Run:
    x, w = k.x(3, grad=True), k.w(3)

    def function(a: torch.Tensor) -> Any:
        (g,) = torch.autograd.grad((a * w).sin().sum(), a, create_graph=True)
        return (g**2).sum() + (g * a).sum().detach()

    return lambda vmap: vmap(function)(x)


@case()
def requires_grad_inside(k: Kit) -> Run:
    x, w = k.x(3), k.w(3)

    def function(a: torch.Tensor) -> Any:
        b = a.clone().requires_grad_()
        (g,) = torch.autograd.grad((b**3 * w).sum(), b, create_graph=True)
        return g

    return lambda vmap: vmap(function)(x)


@case()
def functional_of_autograd(k: Kit) -> Run:
    x, w = k.x(3, grad=True), k.w(3)
    f = torch.autograd.functional

    def function(a: torch.Tensor) -> Any:
        def y(t: torch.Tensor) -> torch.Tensor:
            return (t * w).sin()

        def s(t: torch.Tensor) -> torch.Tensor:
            return (t**3 * w).sum()

        return (
            f.vjp(y, a, a, create_graph=True)[1],
            f.jvp(y, a, a)[1],
            f.jacobian(y, a, create_graph=True),
            f.hessian(s, a),
            f.hvp(s, a, a)[1],
        )

    return lambda vmap: vmap(function)(x)


@case()
def transforms_inside(k: Kit) -> Run:
    x, w = k.x(3, grad=True), k.w(3)

    def function(a: torch.Tensor) -> Any:
        def s(t: torch.Tensor) -> torch.Tensor:
            return (t**3 * w).sum()

        def y(t: torch.Tensor) -> torch.Tensor:
            return (t * w).tanh()

        return (
            torch.func.grad(s)(a),
            torch.func.vjp(y, a)[1](a)[0],
            torch.func.jvp(y, (a,), (w.detach(),))[1],
            torch.func.jacrev(y)(a),
            torch.func.jacfwd(y)(a),
            torch.func.hessian(s)(a),
            torch.func.vmap(lambda t: t * w.sum())(a),
        )

    return lambda vmap: vmap(function)(x)


@case()
def checkpointed(k: Kit) -> Run:
    x, w = k.x(3, grad=True), k.w(3, 3)

    def function(a: torch.Tensor) -> Any:
        b = a.clone().requires_grad_() if not a.requires_grad else a
        y = checkpoint(lambda t: torch.tanh(w @ t), b, use_reentrant=False)
        return y, torch.autograd.grad(y.sum(), b, create_graph=True)[0]

    return lambda vmap: vmap(function)(x)


@case()
def gradient_under_enable_grad_only(k: Kit) -> Run:
    x, w = k.x(3), k.w(3)

    def run(vmap: oracle.Subject) -> Any:
        with torch.no_grad():

            def function(a: torch.Tensor) -> torch.Tensor:
                with torch.enable_grad():
                    return torch.autograd.grad((a * w).cos().sum(), w)[0]

            return vmap(function)(x)

    return run
