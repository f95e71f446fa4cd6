"""Derivatives inside, own Functions, hooks, checkpoints and compositions of functions."""

from __future__ import annotations

import functools

import torch
from torch import func
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.conformance.suite import Cases, weight

Tensor = torch.Tensor
case = Cases()
mixing = weight(4, 4, seed=8)


class Cube(torch.autograd.Function):
    """A cube with a backward of its own, which can be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Straight(torch.autograd.Function):
    """Rounds, and passes the gradient on."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


class Scaled(torch.autograd.Function):
    """A product with a number, and a rule of its own for maps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class SinCos(torch.autograd.Function):
    """Two results, one saved for the backward."""

    @staticmethod
    def forward(ctx, x):
        s, c = x.sin(), x.cos()
        ctx.save_for_backward(x)
        return s, c

    @staticmethod
    def backward(ctx, of_s, of_c):
        (x,) = ctx.saved_tensors
        return of_s * x.cos() - of_c * x.sin()


class Reversed(torch.autograd.Function):
    """An identity with the gradient turned around."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def energy(x):
    """A scalar of a vector."""
    return (x**3).sum() + x.prod().sin()


@case()
def an_own_function(r):
    return Cube.apply(r).sum()


@case()
def a_straight_through_estimator(r):
    return Straight.apply(r * 2) * r


@case()
def a_function_with_a_rule(r):
    return Scaled.apply(r.sin(), 3.0)


@case()
def a_function_of_two_results(r):
    s, c = SinCos.apply(r)
    return s * c + s


@case()
def a_reversed_gradient(r):
    return Reversed.apply(r).square()


@case()
def an_own_function_on_one_way(r):
    return Cube.apply(r) if r.sum() > 0 else r


@case(weights=[mixing])
def an_own_function_of_a_weight(r):
    return Cube.apply(mixing) @ r


@case()
def a_gradient(r):
    return func.grad(energy)(r)


@case(weights=[mixing])
def a_gradient_with_a_value(r):
    return func.grad_and_value(lambda x: (mixing @ x).tanh().sum())(r)


@case()
def a_gradient_with_aux(r):
    return func.grad(lambda x: (energy(x), x.sum()), has_aux=True)(r)


@case(3, orders=1)
def a_jacobian_backward(r):
    return func.jacrev(lambda x: x.sin() * x.sum())(r)


@case(3, orders=1)
def a_jacobian_forward(r):
    return func.jacfwd(lambda x: x.exp() * x[0])(r)


@case(3, orders=1)
def a_hessian(r):
    return func.hessian(energy)(r)


@case()
def a_vjp(r):
    out, pull = func.vjp(lambda x: x.sin() * x, r)
    return out + pull(r)[0]


@case()
def a_jvp(r):
    return func.jvp(lambda x: x.tanh() * x.sum(), (r,), (r.flip(0),))


@case()
def a_linearization(r):
    out, push = func.linearize(lambda x: x.cos() * x, r)
    return out * push(torch.ones(4))


@case()
def a_map_inside(r):
    return func.vmap(lambda a: a.sin() * r)(r)


@case()
def a_gradient_of_each_inside(r):
    return func.vmap(func.grad(lambda a, b: (a * b).sin() + a**2))(r, r.flip(0))


@case()
def a_branch_and_a_gradient(r):
    return func.grad(energy)(r) if r[0] > 0 else r


@case()
def a_gradient_of_a_branch(r):
    return func.grad(lambda x: x.sin().sum() if x.sum() > 0 else (x**2).sum())(r)


@case()
def a_third_derivative(r):
    def f(x):
        return torch.sin(x) * x**2

    return func.grad(func.grad(func.grad(f)))(r[0])


@case(orders=0)
def autograd_inside_on_a_leaf(r):
    x = r.detach().requires_grad_()
    (g,) = torch.autograd.grad(energy(x), x)
    return g


@case()
def autograd_inside_with_a_graph(r):
    x = r if r.requires_grad else r.clone().requires_grad_()
    (g,) = torch.autograd.grad(energy(x), x, create_graph=True)
    return g


@case(orders=0)
def backward_inside(r):
    x = r.detach().clone().requires_grad_()
    x.square().sum().backward()
    return x.grad


@case(orders=0)
def descent_inside(r):
    x = r.detach().clone()
    for _ in range(3):
        x.requires_grad_()
        (g,) = torch.autograd.grad((x**2).sum() + x.cos().sum(), x)
        x = (x - 0.1 * g).detach()
    return x


@case(3, orders=0)
def jacobian_of_autograd(r):
    return torch.autograd.functional.jacobian(lambda x: x.sin() * x.sum(), r)


@case(orders=0)
def forward_mode_inside(r):
    with forward_ad.dual_level():
        out = forward_ad.make_dual(r, torch.ones_like(r)).sin()
        return forward_ad.unpack_dual(out).tangent.clone()


@case(weights=[mixing])
def a_checkpoint(r):
    return checkpoint(lambda x: (mixing @ x).tanh(), r, use_reentrant=False)


@case()
def without_gradients_in_part(r):
    with torch.no_grad():
        size = r.norm()
    return r / size


@case()
def detached_in_part(r):
    return (r.softmax(0).detach() * r).sum()


@case()
def a_hook_on_a_tensor(r):
    y = r * 2
    if y.requires_grad:
        y.register_hook(lambda g: g * 0.5)
    return y.sin()


@case()
def partials_and_reductions(r):
    add = functools.partial(torch.add, alpha=2)
    return functools.reduce(add, r.unbind())


@case()
def a_captured_counter(r):
    state = {"n": 0}

    def tick(x):
        state["n"] += 1
        return x * state["n"]

    return tick(r) + tick(r)


@case()
def a_generator(r):
    def halves(x):
        for _ in range(3):
            yield x
            x = x / 2

    return sum(halves(r))


@case(orders=1)
def a_divergence(r):
    def f(x):
        return (mixing.detach() @ x).tanh()

    return func.jacrev(f)(r).diagonal().sum()


@case()
def a_hessian_vector_product(r):
    return func.jvp(func.grad(energy), (r,), (torch.ones(4),))[1]
