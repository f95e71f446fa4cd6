"""Named cases: what a mapped function may do (`tests.refusals` has what it may not).

A case is a function of a `Kit`. It makes its tensors with the kit, which gives the same values at
each call, and returns a function of the map under test. So `vmap` can be nested, or stand under
another transform, in any way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests import oracle

Run = Callable[[oracle.Subject], Any]


@dataclass
class Kit:
    """Makes tensors, and remembers them so that they are compared afterwards."""

    size: int = 3
    inputs: list[torch.Tensor] = field(default_factory=list)
    captured: list[torch.Tensor] = field(default_factory=list)

    def values(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Different values for each tensor of a setting, the same in each setting."""
        generator = torch.Generator().manual_seed(
            31 * (len(self.inputs) + len(self.captured)) + len(shape)
        )
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return torch.randint(0, 2 if dtype == torch.bool else 4, shape, generator=generator).to(
            dtype
        )

    def x(
        self, *shape: int, dim: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False
    ) -> torch.Tensor:
        """A mapped input: `shape` is one row's."""
        full = list(shape)
        full.insert(dim if dim >= 0 else len(full) + 1 + dim, self.size)
        self.inputs.append(self.values(*full, dtype=dtype).requires_grad_(grad))
        return self.inputs[-1]

    def w(self, *shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> torch.Tensor:
        """A captured or unmapped tensor."""
        self.captured.append(
            self.values(*shape, dtype=dtype).requires_grad_(grad and dtype.is_floating_point)
        )
        return self.captured[-1]

    def module(self, module: nn.Module) -> nn.Module:
        """A module whose parameters and buffers are captured, with fixed values."""
        module = module.double()
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.copy_(
                        self.values(*tensor.shape) * 0.5
                        if isinstance(tensor, nn.Parameter)
                        else self.values(*tensor.shape).abs() + 0.5
                    )
            self.captured.append(tensor)
        return module


Case = Callable[[Kit], Run]


CASES: dict[str, tuple[Case, oracle.Checks]] = {}


def case(second_order: bool = True, **checks: Any) -> Callable[[Case], Case]:
    """Registers a case under its function's name."""

    def register(function: Case) -> Case:
        assert function.__name__ not in CASES
        CASES[function.__name__] = function, oracle.Checks(second_order=second_order, **checks)
        return function

    return register


def setting(function: Case, size: int = 3, **options: Any) -> Callable[[], oracle.Setting]:
    """The arguments of `oracle.compare`; `options` go to every map that the case makes."""

    def build() -> oracle.Setting:
        kit = Kit(size)
        run = function(kit)

        def run_with(vmap: oracle.Subject) -> Any:
            return run(lambda func, *args, **kwargs: vmap(func, *args, **{**options, **kwargs}))

        return oracle.Setting(run_with, kit.inputs, kit.captured)

    return build


@case()
def dot_product(k: Kit) -> Run:
    x, y = k.x(5, grad=True), k.x(5, grad=True)
    return lambda vmap: vmap(torch.dot)(x, y)


@case()
def captured_weights(k: Kit) -> Run:
    x, weights = k.x(5, grad=True), k.w(5)
    return lambda vmap: vmap(lambda feature_vec: feature_vec.dot(weights).relu())(x)


@case()
def jacobian_in_one_call(k: Kit) -> Run:
    x, basis = k.w(4), torch.eye(4, dtype=torch.float64)
    k.inputs.append(basis)

    def run(vmap: oracle.Subject) -> Any:
        y = x**2 * x.sum()
        return vmap(
            lambda v: torch.autograd.grad(y, x, v, retain_graph=True, create_graph=True)[0]
        )(basis)

    return run


@case()
def hessian_in_one_call(k: Kit) -> Run:
    x, w = k.w(4), k.w(4)

    def run(vmap: oracle.Subject) -> Any:
        (g,) = torch.autograd.grad((torch.tanh(x * w) ** 2).sum() * x.prod(), x, create_graph=True)
        return vmap(lambda v: torch.autograd.grad(g, x, v, retain_graph=True)[0])(
            torch.eye(4, dtype=torch.float64)
        )

    return run


@case()
def functional_vjp(k: Kit) -> Run:
    x, weight = k.x(5), k.w(5)
    return lambda vmap: vmap(
        lambda s: torch.autograd.functional.vjp(lambda w: s.dot(w).relu(), weight)[1]
    )(x)


@case()
def per_sample_gradients_of_a_module(k: Kit) -> Run:
    model = k.module(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    x, y = k.x(4), k.x(2)
    return lambda vmap: vmap(
        lambda a, b: torch.autograd.grad(F.mse_loss(model(a), b), tuple(model.parameters()))
    )(x, y)


@case()
def functional_call(k: Kit) -> Run:
    model = nn.Linear(4, 2).double()
    weight, bias, x = k.x(2, 4, grad=True), k.x(2, grad=True), k.x(4)
    return lambda vmap: vmap(
        lambda w, b, a: torch.func.functional_call(model, {"weight": w, "bias": b}, (a,))
    )(weight, bias, x)


@case()
def negative_and_none_dims(k: Kit) -> Run:
    x, y, z = k.x(2, 4, dim=-1, grad=True), k.w(4), k.x(4, dim=1, grad=True)
    return lambda vmap: vmap(lambda a, b, c: a * b + c, (-1, None, 1), -1)(x, y, z)


@case()
def trees_in_and_out(k: Kit) -> Run:
    tree = {"a": k.x(3, grad=True), "b": [k.x(2, dim=1, grad=True), k.w(3)]}

    def function(t: Any) -> Any:
        return {"s": t["a"] + t["b"][1], "p": (t["b"][0].sum(), [t["a"].outer(t["b"][0])])}

    return lambda vmap: vmap(function, ({"a": 0, "b": [1, None]},), {"s": 1, "p": (0, [2])})(tree)


@case()
def one_dim_for_a_whole_tree(k: Kit) -> Run:
    tree, factor = (k.x(3, dim=1, grad=True), {"q": k.x(4, dim=1)}), k.w()
    return lambda vmap: vmap(lambda t, f: (t[0].sum() * f, t[1]["q"] * f), (1, None))(tree, factor)


@case()
def keywords_unmapped(k: Kit) -> Run:
    x, scale = k.x(3, grad=True), k.w(3)
    return lambda vmap: vmap(lambda a, *, scale, power: (a * scale) ** power)(
        x, scale=scale, power=2
    )


@case()
def keywords_mapped(k: Kit) -> Run:
    x, scale = k.x(3, grad=True), k.x(3, dim=1, grad=True)
    return lambda vmap: vmap(lambda a, scale, shift: a * scale + shift, kw_in_dims={"scale": 1})(
        x, scale=scale, shift=1.5
    )


@case()
def other_arguments_pass_through(k: Kit) -> Run:
    x = k.x(3, 2, grad=True)
    return lambda vmap: vmap(
        lambda a, dim, name, flag: a.sum(dim) if flag and name == "s" else a, (0, None, None, None)
    )(x, 1, "s", True)


@case()
def numbers_under_the_default_in_dims(k: Kit) -> Run:
    x = k.x(3, grad=True)
    return lambda vmap: vmap(lambda a, power, tree: a**power + tree["shift"])(x, 2, {"shift": 0.5})


@case()
def unmapped_outputs_are_repeated(k: Kit) -> Run:
    x, w = k.x(3), k.w(3)
    return lambda vmap: vmap(
        lambda a: (w, w * 2, a, torch.ones(2), torch.arange(3)[1:]), out_dims=(0, 1, 0, -1, 0)
    )(x)


@case()
def one_tensor_returned_twice(k: Kit) -> Run:
    x = k.x(3, grad=True)

    def function(a: torch.Tensor) -> Any:
        b = a * 2
        return b, b, b[0], b.view(3)

    return lambda vmap: vmap(function)(x)


@case()
def input_returned(k: Kit) -> Run:
    x = k.x(3, 2, grad=True)
    return lambda vmap: vmap(lambda a: (a, a.T, a[0], a.detach()))(x)


@case()
def nested(k: Kit) -> Run:
    x, y, w = k.x(4, 3, grad=True), k.x(5, 3, grad=True), k.w(3)
    return lambda vmap: vmap(lambda a, b: vmap(lambda p: vmap(lambda q: (p * q * w).sum())(b))(a))(
        x, y
    )


@case()
def nested_with_dims(k: Kit) -> Run:
    x, y = k.x(4, 3, grad=True), k.w(3, 2)
    return lambda vmap: vmap(
        lambda a: vmap(lambda p, q: p.outer(q), (1, None), 2)(a, y[:, 0]), 0, -1
    )(x)


@case()
def row_strides_kept(k: Kit) -> Run:
    x = k.x(4, 6, dim=1, grad=True)
    return lambda vmap: vmap(
        lambda a: (a.mT.reshape(-1), a[:, ::2].as_strided((2, 2), (a.stride(0), a.stride(1)))), 1
    )(x)


@case()
def expanded_batch(k: Kit) -> Run:
    w = k.w(1, 4)
    return lambda vmap: vmap(lambda a: a.sin() + a.sum())(w.expand(3, 4))


@case()
def lazy_conjugates_and_negatives(k: Kit) -> Run:
    x = k.x(3, grad=True)

    def run(vmap: oracle.Subject) -> Any:
        z = torch.complex(x, x * 2).conj()
        return vmap(lambda a, b: (a.imag, a.conj() * b, b.view(3, 1)))(z, z.imag)

    return run


@case()
def hook_of_an_inner_gradient(k: Kit) -> Run:
    x = k.x(3)

    def function(a: torch.Tensor) -> torch.Tensor:
        s = a.detach().requires_grad_()
        b = s * 2
        b.register_hook(lambda g: g * 5)
        return torch.autograd.grad(b.sin().sum(), s)[0]

    return lambda vmap: vmap(function)(x)


@case()
def mapped_value_into_unmapped_zeros(k: Kit) -> Run:
    x = k.x(4, grad=True)

    def function(a: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(4, dtype=torch.float64)
        for i in range(4):
            out[i] = a[i] * i
        return out

    return lambda vmap: vmap(function)(x)


@case()
def writes_through_views(k: Kit) -> Run:
    x = k.x(3, grad=True)

    def function(a: torch.Tensor) -> Any:
        base = torch.ones(3, 3, dtype=torch.float64)
        base.t()[0].view(3).mul_(2)
        base.diagonal().add_(a)
        base[1:, :2].copy_(a[:2].expand(2, 2))
        row = base[0]
        row += a
        return base, row, base.sum()

    return lambda vmap: vmap(function)(x)


@case()
def view_made_before_the_write(k: Kit) -> Run:
    x = k.x(3, grad=True)

    def function(a: torch.Tensor) -> Any:
        base = a.new_zeros(2, 3)
        view = base[1]
        flat = base.view(-1)
        base[1] = a
        return view * 2, flat, base

    return lambda vmap: vmap(function)(x)


@case()
def indexed_writes(k: Kit) -> Run:
    x, i, w = k.x(4, grad=True), k.x(2, dtype=torch.int64), k.w(4)

    def function(a: torch.Tensor, at: torch.Tensor) -> Any:
        b = (a * w).clone()
        b[at] = 1.5
        c = torch.zeros(4, dtype=torch.float64).index_add_(0, at, a[:2])
        d = a.clone().scatter_(0, at, 0.25)
        e = w.clone().index_put_((at,), a[:2], accumulate=True)
        return b, c, d, e, a[at], w[at]

    return lambda vmap: vmap(function)(x, i)


@case(gradient=False)
def in_place_on_a_mapped_input(k: Kit) -> Run:
    x = k.x(4)

    def function(a: torch.Tensor) -> torch.Tensor:
        a.mul_(2)
        a[0] = 7
        return a + 1

    return lambda vmap: vmap(function)(x)


@case()
def literals_are_fresh(k: Kit) -> Run:
    x = k.x(3, grad=True)

    def function(a: torch.Tensor) -> torch.Tensor:
        t = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        t += a
        return t

    return lambda vmap: (vmap(function)(x), vmap(function)(x))
