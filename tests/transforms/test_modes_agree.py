"""`shardmap.jacobian` is `torch.func.jacrev` of each sample, whichever mode it takes.

The first sample of a batch shows neither what others do on their paths nor the kinks they meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import functional
from torch.nn import functional as F

import shardmap
from tests.same import assert_same

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]

torch.manual_seed(0)
WIDE = torch.randn(3, 50, dtype=torch.float64)
"""More outputs than inputs: forward mode costs less."""


class OwnRules(torch.autograd.Function):
    """A Function whose backward and jvp are not those of its forward, nor of each other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0] * 5


def hooked(r: Tensor) -> Tensor:
    h = r.sin()
    if h.requires_grad:
        h.register_hook(lambda g: g * 3)
    return h @ WIDE


def hooked_always(r: Tensor) -> Tensor:
    h = r.sin()
    h.register_hook(lambda g: g * 3)
    return h @ WIDE


def asked(r: Tensor) -> Tensor:
    h = r.sin()
    return (h * 5 if h.requires_grad else h) @ WIDE


def asked_by_its_node(r: Tensor) -> Tensor:
    h = r.sin()
    return (h if h.grad_fn is None else h * 5) @ WIDE


def asked_by_a_leaf(r: Tensor) -> Tensor:
    h = r.sin()
    return (h if h.is_leaf else h * 5) @ WIDE


def asked_on_a_path(r: Tensor) -> Tensor:
    h = r.sin()
    if r[0] > 0 and h.requires_grad:
        h = h * 5
    return h @ WIDE


def hooked_on_a_path(r: Tensor) -> Tensor:
    h = r.sin()
    if r[0] > 0 and h.requires_grad:
        h.register_hook(lambda g: g * 3)
    return h @ WIDE


def without_grad(r: Tensor) -> Tensor:
    with torch.no_grad():
        h = r.sin()
    return (h * r) @ WIDE


FUNCTIONS = (
    hooked, hooked_always, asked, asked_by_its_node, asked_by_a_leaf, asked_on_a_path,
    hooked_on_a_path, without_grad, lambda r: OwnRules.apply(r) @ WIDE,
)  # fmt: skip


def batch() -> Tensor:
    """Samples of which the first is negative: it takes the path that asks nothing."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 0] = torch.tensor([-1.0, 2.0, -0.5, 0.5, 1.0])
    return x


def looped(function: Function, x: Tensor) -> Tensor:
    return torch.stack([torch.func.jacrev(function)(r) for r in x])  # pyright: ignore


@pytest.mark.parametrize("trace", ["auto", "each", "once"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_what_differs_by_mode_is_that_of_reverse_mode(function: Function, trace: str) -> None:
    jacobians = shardmap.jacobian(function, trace=trace)
    for x in (batch(), batch().flip(0)):
        expected = looped(function, x)
        for _ in range(2):
            assert_same(jacobians(x), expected, function.__name__)
        assert_same(shardmap.jacobian(function, trace=trace)(x), expected, function.__name__)


def test_a_module_with_a_backward_hook() -> None:
    module = torch.nn.Tanh()
    module.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
    x = batch()
    expected = 3 * looped(lambda r: r.tanh() @ WIDE, x)
    assert_same(shardmap.jacobian(lambda r: module(r) @ WIDE)(x), expected, "the hook's")


@pytest.mark.parametrize("inner", [torch.float32, torch.float64])
@pytest.mark.parametrize("outer", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 50])
def test_the_dtype_is_that_of_the_input(inner: torch.dtype, outer: torch.dtype, width: int) -> None:
    weights = WIDE[:, :width].to(outer)

    def function(r: Tensor, empty: Tensor) -> Tensor:
        return r.to(outer).sin() @ weights + empty.sum().to(outer)

    x, empty = batch().to(inner), torch.zeros(5, 0, dtype=torch.float16)
    jacobians = shardmap.jacobian(function, argnums=(0, 1))
    found = jacobians(x, empty)
    assert jacobians.method == ("forward" if width == 50 else "reverse")
    expected = looped(lambda r: function(r, empty[0]), x)
    assert found[0].dtype == expected.dtype == inner
    assert_same(found[0], expected, "the Jacobian", precision=torch.float32)
    assert found[1].dtype == torch.float16
    assert found[1].shape == (5, width, 0)


def test_forward_mode_is_still_taken_where_the_modes_agree() -> None:
    def masked(r: Tensor) -> Tensor:
        with torch.no_grad():
            mask = torch.ones(3, dtype=r.dtype).cumsum(0)
        return (r * mask).relu() @ WIDE

    jacobians = shardmap.jacobian(masked)
    assert_same(jacobians(batch()), looped(masked, batch()), "the Jacobian")
    assert jacobians.method == "forward"


class Rounded(OwnRules):
    """A rounding whose gradient passes, and whose tangent does not."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return torch.zeros_like(tangents[0])


class Reversed(OwnRules):
    """A gradient reversal, whose forward computes nothing."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].view_as(tangents[0])


class NoTangent(torch.autograd.Function):
    """A Function in the old form, of which forward mode says that it has no jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 7


def stopped(r: Tensor) -> Tensor:
    with torch.no_grad():
        return r.sin() * 2


def stopped_partly(r: Tensor) -> Tensor:
    return r * stopped(r)


def hooked_gradient(r: Tensor) -> Tensor:
    h = r * 2
    if h.requires_grad:
        h.register_hook(lambda g: g * 5)
    return h


def inner_gradient(r: Tensor) -> Tensor:
    """A gradient without a history: it has tangents."""
    with torch.enable_grad():
        x = r if r.requires_grad else r.detach().requires_grad_()
        (found,) = torch.autograd.grad(x.pow(3).sum(), x)
    return found * r


def segments(r: Tensor) -> Tensor:
    return torch.segment_reduce(r * r, "max", lengths=torch.tensor([1, 1, 1]))


def distances(r: Tensor) -> Tensor:
    return torch.cdist(r.view(1, -1), r.view(1, -1) * 3 + 1).view(1) * r


PATHS = (
    stopped, stopped_partly, hooked_gradient, inner_gradient, segments, distances,
    Rounded.apply, Reversed.apply, NoTangent.apply,
)  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"chunk_size": 3},
    "lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
}


def by_plain_autograd(function: Function, x: Tensor) -> Tensor:
    """Its Jacobians: torch.func takes no Function in the old form."""
    found = [functional.jacobian(function, r) for r in x]
    tensors = [t for t in found if isinstance(t, Tensor)]
    assert len(tensors) == len(x)
    return torch.stack(tensors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", PATHS, ids=lambda f: getattr(f, "__qualname__", str(f)))
def test_the_first_sample_takes_another_path(other: Function, way: str) -> None:
    """Each path is judged before its numbers are handed out, in later calls too."""

    def function(r: Tensor) -> Tensor:
        return (r.sin() if r[0] > 0 else other(r)) @ WIDE

    plain = batch().abs()
    for grad in (True, False):
        jacobians = shardmap.jacobian(function, **WAYS[way])
        with torch.set_grad_enabled(grad):
            for x in (plain, batch(), plain + 1, batch() - 0.25, batch().flip(0), batch()):
                assert_same(jacobians(x), by_plain_autograd(function, x), "the Jacobian")
        assert jacobians.method == "forward"


KINKS: dict[str, Function] = {
    "prelu": lambda r: F.prelu(r, torch.tensor([0.25], dtype=r.dtype)),
    "fmax": lambda r: torch.fmax(r, r.flip(0)),
    "clamp to a tensor": lambda r: r.clamp(min=r.flip(0)),
    "atan2": lambda r: torch.atan2(r, r.flip(0)),
    "a masked square root": lambda r: torch.where(r > 0, r.sqrt(), r),
    "square root": torch.sqrt,
    "quotient": lambda r: r / r.flip(0),
    "quotient by another argument": lambda r: r / r.detach().flip(0),
    "logarithm": torch.log,
    "power of a number": lambda r: r**0.5,
    "power of a tensor": lambda r: r ** torch.tensor([0.0, 1.0, 0.5], dtype=r.dtype),
    "xlogy": lambda r: torch.xlogy(r, r.flip(0)),
    "fmod": lambda r: torch.fmod(r, r.flip(0)),
    "norm": lambda r: r.norm() * r,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KINKS)
def test_the_first_sample_meets_no_kink(name: str, way: str) -> None:
    def function(r: Tensor) -> Tensor:
        return KINKS[name](r).unsqueeze(0) * WIDE[:1].t()

    smooth = torch.tensor([[1.0, 2.0, 4.5], [0.5, 3.0, 2.0]], dtype=torch.float64)
    kinks = torch.tensor([[0, 0, 0], [1, 0, 1], [2, 1, 0], [-1, 0, 1]], dtype=torch.float64)
    jacobians = shardmap.jacobian(function, **WAYS[way])
    for x in (smooth, torch.cat([smooth, kinks]), torch.cat([kinks, smooth]), kinks):
        assert_same(jacobians(x), looped(function, x), name)


def normalised(r: Tensor) -> Tensor:
    return (r - r.detach().new_tensor([1.0, 2, 3])) / torch.tensor([2.0, 4, 8], dtype=r.dtype)


def written(r: Tensor) -> Tensor:
    out = torch.zeros(3, dtype=r.dtype)
    out[1:] = r[:-1] * r[0]
    return out.add_(r)


AGREEING: dict[str, Function] = {
    **{
        f.__name__: f
        for f in (
            torch.abs, torch.cosh, torch.cos, torch.erf, torch.exp, torch.expm1,
            torch.neg, torch.relu, torch.sigmoid, torch.sign, torch.sinh, torch.sin, torch.square,
            torch.tanh, F.gelu, F.leaky_relu, F.silu, F.softplus, normalised, written,
        )
    },
    "power": lambda r: r**2 + r**3 + r**1 + r**0,
    "rounded": lambda r: r.round() * r + r.floor() - r.ceil() + r.trunc(),
    "compared": lambda r: (r > 0) * r,
    "moved": lambda r: r.roll(1).flip(0).repeat(2)[:3] + torch.stack([r, r])[1].cumsum(0),
    "taken": lambda r: r[torch.tensor([0, 0, 2])] + r.mean() - r.sum(),
    "products": lambda r: torch.outer(r, r) @ r + torch.addcmul(r, r, r) + r.dot(r),
    "detached": lambda r: r.detach() * r + r,
    "layer norm": lambda r: F.layer_norm(r, (3,), WIDE[:, 0].to(r.dtype), WIDE[:, 1].to(r.dtype)),
    "chosen": lambda r: torch.where(r > 0.5, r.sin(), r * r),
    "clamped": lambda r: r.clamp(-1, 1) + r.clamp(min=0.5) * F.hardtanh(r) + r.clamp(max=2.0),
    "larger": lambda r: torch.maximum(r, r.flip(0)) + torch.minimum(r, r * r),
    "gradient inside": torch.func.grad(lambda r: (r.sin() * r * r).sum()),
}  # fmt: skip


@pytest.mark.parametrize("name", AGREEING)
def test_operators_on_the_list_agree_at_every_sample(name: str) -> None:
    def function(r: Tensor) -> Tensor:
        return AGREEING[name](r) @ WIDE

    values = (0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1e-300, 20.0)
    x = torch.cartesian_prod(*[torch.tensor(values, dtype=torch.float64)] * 3)[::7]
    for grad in (True, False):
        jacobians = shardmap.jacobian(function)
        with torch.set_grad_enabled(grad):
            for _ in range(4):
                torch.testing.assert_close(jacobians(x), looped(function, x))
        assert jacobians.method == "forward"
