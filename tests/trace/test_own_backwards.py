"""Backwards and hooks of the user's under gradients from outside, against the loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import shardmap
from shardmap import errors
from tests.loop import loop
from tests.same import assert_same
from tests.trace import own_functions as own

Tensor = torch.Tensor
Function = Callable[[Tensor], Any]

DTYPE = torch.float64


def weights() -> tuple[Tensor, ...]:
    """A vector, one that only backwards read, a matrix and a number."""
    torch.manual_seed(0)
    return tuple(
        [torch.randn(shape, dtype=DTYPE, requires_grad=True) for shape in ((3,), (3,), (4, 3), ())]
    )


W, READ, M, S = weights()
own.Reads.weight = READ


@torch.library.custom_op("shardmap_own_test::bell", mutates_args=())
def bell(x: Tensor, width: float) -> Tensor:
    return torch.exp(-width * x**2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.width = inputs[1]


def _bell_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    x, y = ctx.saved_tensors
    return grad * y * x * ctx.width * -14, None


bell.register_autograd(_bell_backward, setup_context=_keep)


@torch.library.custom_op("shardmap_own_test::mixed", mutates_args=())
def mixed(xs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return xs[0] * xs[1], xs[0] + 2 * xs[1]


mixed.register_autograd(
    lambda ctx, g, h: [g * ctx.saved_tensors[1] + h, g * ctx.saved_tensors[0] + 3 * h],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[0]),
)

FUNCTIONS: dict[str, Function] = {
    "straight_through": lambda r: (own.StraightThrough.apply(r * W) * r).sum(),
    "straight_through_weights": lambda r: (own.StraightThrough.apply(W.exp()) * r).sin(),
    "clipped": lambda r: own.Clipped.apply(r * W) ** 2,
    "clipped_weights": lambda r: (own.Clipped.apply(W) * r).sum(),
    "reversed": lambda r: (own.Reversed.apply(r * W, 0.5) * r).sin(),
    "swish": lambda r: own.Swish.apply(r * W).sum(),
    "swish_of_the_sample": lambda r: own.Swish.apply(r),
    "several_times": lambda r: own.Swish.apply(own.Swish.apply(r) * W) + own.Swish.apply(r),
    "written_afterwards": lambda r: own.Swish.apply(r * W).add_(r).mul_(2),
    "exp_and_another_result": lambda r: (own.Exp.apply(r * W) * 2, r.sum()),
    "own_map": lambda r: own.WithMap.apply(r * W) * r,
    "linear": lambda r: own.Linear.apply((r * W)[None], M, None).tanh(),
    "linear_with_bias": lambda r: own.Linear.apply(r[None], M, M.sum(1)).tanh(),
    "scaled": lambda r: own.Scaled.apply(r * W, S),
    "two": lambda r: [t.sin() for t in own.Two.apply(r, W)],
    "first_of_two": lambda r: own.Two.apply(r * 2, W)[0],
    "second_of_two": lambda r: own.Two.apply(r, W * r)[1].exp(),
    "one_argument_twice": lambda r: sum(own.Two.apply(r, r)) * W,
    "sorted": lambda r: own.Sorted.apply(r * W),
    "first_unmaterialised": lambda r: own.Unmaterialised.apply(r * W)[0],
    "second_unmaterialised": lambda r: own.Unmaterialised.apply(r * W)[1],
    "cube": lambda r: own.Cube.apply(r * W),
    "applies_itself": lambda r: own.Sine.apply(r * W),
    "inner_graph": lambda r: own.Inner.apply(r * W) * r,
    "rectified": lambda r: own.Rectified.apply(r * W) * r,
    "in_place_on_the_cotangent": lambda r: own.InPlace.apply(r * W) * r,
    "dirty": lambda r: own.Dirty.apply(r * W) * r,
    "zeros": lambda r: (own.Zeros.apply(r * W) * r).exp(),
    "zeros_of_weights": lambda r: (own.Zeros.apply(W) * r).exp(),
    "reads_another_tensor": lambda r: own.Reads.apply(r * W),
    "under_an_inner_transform": lambda r: torch.func.grad(lambda q: own.Exp.apply(q * W).sum())(r),
    "inner_map": lambda r: shardmap.vmap(lambda q: own.Swish.apply(q * r))(M).sum(0),
    "checkpointed": lambda r: (
        checkpoint(lambda q: own.Swish.apply(q * W), r * W, use_reentrant=False) * r
    ),
    "custom_operator": lambda r: bell(r * W, 0.3) * r,
    "custom_operator_of_a_list": lambda r: mixed([r * W, r]),
}


def hooked_after_a_use(r: Tensor) -> Tensor:
    t = r * W
    before = t.sin()
    t.register_hook(lambda g: g * 3)
    return before + t.exp()


def hooks_written_in_c(r: Tensor) -> Tensor:
    t = r * W
    t.register_hook(torch.Tensor.neg)
    t.register_hook(torch.sin)
    return t.exp()


def hooks_in_order_and_one_removed(r: Tensor) -> Tensor:
    t = r * W
    removed = t.register_hook(lambda g: g * 3)
    t.register_hook(lambda g: g.clamp(-0.1, 0.1))
    t.register_hook(lambda g: g * g)
    t.register_hook(lambda g: None)
    removed.remove()
    return t.exp()


def hook_that_reads(r: Tensor) -> Tensor:
    t, z = r * W, (r * 2).sin()
    t.register_hook(lambda g: g * z * READ)
    return t.exp()


def hook_on_the_sample(r: Tensor) -> Tensor:
    if r.requires_grad:
        r.register_hook(lambda g: g * 2 + 1)
    return r * W


def hooks_around_a_write(r: Tensor) -> Tensor:
    t = r * W
    t.register_hook(lambda g: g.clamp(-0.2, 0.2))
    t = t.mul_(2)
    t.register_hook(lambda g: g * g)
    return t.sin()


def hook_on_the_result(r: Tensor) -> Tensor:
    t = r * (r * W).sin()
    t.register_hook(lambda g: g * r * 5)
    return t


def hooks_around_a_function(r: Tensor) -> Tensor:
    t = r * W
    t.register_hook(lambda g: g**2)
    out = own.Swish.apply(t)
    out.register_hook(lambda g: g * 5)
    return out * 2


def hook_on_weights(r: Tensor) -> Tensor:
    t = W * 2
    t.register_hook(lambda g: g.clamp(-0.5, 0.5))
    return t * r


def hooks_on_a_tensor_and_its_view(r: Tensor) -> tuple[Tensor, Tensor]:
    t = W * r
    v = t[:2]
    t.register_hook(lambda g: g.cumsum(0) ** 2)
    v.register_hook(lambda g: g * g)
    return v * 2, t.sin()


HOOKS: dict[str, Function] = {
    f.__name__: f
    for f in (
        hooked_after_a_use, hooks_written_in_c, hooks_in_order_and_one_removed, hook_that_reads,
        hook_on_the_sample,
        hooks_around_a_write, hook_on_the_result, hooks_around_a_function, hook_on_weights,
        hooks_on_a_tensor_and_its_view,
    )
}  # fmt: skip

CASES = FUNCTIONS | HOOKS

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks_of_one": {"chunk_size": 1},
    "chunks_of_three": {"chunk_size": 3},
    "two_lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "remat": {"remat": True, "chunk_size": 2},
}


def batch(rows: int, grad: bool) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 3, dtype=DTYPE, generator=generator).requires_grad_(grad)


def differentiated(outs: list[Tensor], ins: list[Tensor]) -> list[Tensor]:
    """The outputs, their gradients, and the gradients of a function of those."""
    generator = torch.Generator().manual_seed(1)

    def random(t: Tensor) -> Tensor:
        return torch.randn(t.shape, dtype=t.dtype, generator=generator)

    tracked = [t for t in outs if t.requires_grad]
    first = torch.autograd.grad(
        tracked, ins, [random(t) for t in tracked], create_graph=True, materialize_grads=True
    )
    total = torch.stack([(g * random(g)).sum() for g in first]).sum()
    second = torch.autograd.grad(total, ins, materialize_grads=True) if total.requires_grad else ()
    return [*outs, *first, *second]


def compared(function: Function, x: Tensor, name: str, **options: Any) -> None:
    ins = [W, READ, M, S, *([x] if x.requires_grad else [])]
    want = differentiated(pytree.tree_leaves(loop(function)(x)), ins)
    mapped = shardmap.vmap(function, **options)
    for call in ("first", "second"):
        got = differentiated(pytree.tree_leaves(mapped(x)), ins)
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"{name}, {call} call, tensor {k}")
            assert a.requires_grad == b.requires_grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_loop(name: str, way: str) -> None:
    for rows, grad in ((5, True), (5, False), (1, True)):
        compared(CASES[name], batch(rows, grad), f"{name}, {rows} rows", **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_complex_samples_of_a_map_inside_a_map(way: str) -> None:
    """The inner map hooks its samples: their gradients are no lazy conjugates, as the loop's."""
    c = torch.randn(5, 2, 3, dtype=torch.complex128, requires_grad=True)

    def inner(r: Tensor) -> Tensor:
        return (r * r.conj() * W).sin() * r

    def weighted(out: Tensor) -> Tensor:
        return (out * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).real.sum()

    mapped = shardmap.vmap(lambda rows: shardmap.vmap(inner)(rows), **WAYS[way])
    want = torch.stack([torch.stack([inner(r) for r in rows]) for rows in c])
    gradients = torch.autograd.grad(weighted(want), (c, W))
    for _ in range(4):
        found = mapped(c)
        assert_same(found, want, "values")
        for a, b in zip(torch.autograd.grad(weighted(found), (c, W)), gradients, strict=True):
            assert_same(a, b, "gradients")


@pytest.mark.parametrize("name", CASES)
def test_of_no_samples_no_gradient_arrives(name: str) -> None:
    x = batch(0, True)
    outs = pytree.tree_leaves(shardmap.vmap(CASES[name])(x))
    want = pytree.tree_leaves(loop(CASES[name])(x))
    for got, expected in zip(outs, want, strict=True):
        assert got.shape == expected.shape
    total = torch.stack([t.sum() for t in outs if t.requires_grad]).sum()
    for grad in torch.autograd.grad(total, [x, W, M, S], materialize_grads=True):
        assert not grad.any()


def test_one_sample_of_a_backward_may_not_stand_for_another() -> None:
    """Every row of a Jacobian by rows: each cotangent reaches its own sample only."""
    x = batch(5, True)
    out = shardmap.vmap(lambda r: own.Clipped.apply(r * W) * r)(x)
    for i in range(5):
        cotangent = torch.zeros_like(out)
        cotangent[i] = 1
        (grad,) = torch.autograd.grad(out, x, cotangent, retain_graph=True)
        (want,) = torch.autograd.grad(
            own.Clipped.apply(x[i] * W) * x[i], x, torch.ones(3, dtype=DTYPE)
        )
        assert_same(grad, want, f"sample {i}")


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "grad": lambda h: torch.func.grad(lambda w, x: h(w, x).sin().sum()),
    "grad_of_the_batch": lambda h: torch.func.grad(lambda w, x: h(w, x).sin().sum(), 1),
    "jacrev": torch.func.jacrev,
    "jacrev_of_grad": lambda h: torch.func.jacrev(
        torch.func.grad(lambda w, x: h(w, x).sin().sum())
    ),
    "vmap_of_grad": lambda h: (
        lambda w, x: torch.func.vmap(
            lambda s: torch.func.grad(lambda v: h(v, x).sin().sum())(w * s)
        )(torch.arange(1.0, 4, dtype=DTYPE))
    ),
    "grad_of_vmap": lambda h: torch.func.grad(
        lambda w, x: (
            torch.func.vmap(lambda s: h(w * s, x))(torch.arange(1.0, 4, dtype=DTYPE)).sin().sum()
        )
    ),
}


@pytest.mark.parametrize("way", ["whole", "chunks_of_three", "two_lanes", "once"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_around_the_map(transform: str, way: str) -> None:
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "exp": lambda w, r: own.Exp.apply(r * w) * r,
        "exp_of_weights": lambda w, r: own.Exp.apply(w) * r,
        "own_map": lambda w, r: own.WithMap.apply(r * w),
    }
    x, w = batch(5, False), W.detach()
    for name, function in functions.items():

        def by_loop(w: Tensor, x: Tensor, function: Any = function) -> Tensor:
            return torch.stack([function(w, r) for r in x])

        def by_map(w: Tensor, x: Tensor, function: Any = function) -> Tensor:
            return shardmap.vmap(lambda r: function(w, r), **WAYS[way])(x)

        want = TRANSFORMS[transform](by_loop)(w, x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(TRANSFORMS[transform](by_map)(w, x), want, f"{name}, {transform}")


def test_another_backward_behind_the_same_forward() -> None:
    """The code and its calls are the same: only the history of a result differs."""
    chosen: Any = own.Clipped

    def function(r: Tensor) -> Tensor:
        return chosen.apply(r * W) * 2

    x = batch(3, True)
    for kind in (own.Clipped, own.StraightThrough, own.Clipped, own.Reversed):
        chosen = kind if kind is not own.Reversed else type("Plain", (), {"apply": torch.clone})
        compared(function, x, kind.__name__)


def test_a_number_of_a_backward_may_change_between_calls() -> None:
    x = batch(3, True)
    for strength in (0.5, 0.25, 2.0):
        compared(lambda r, s=strength: own.Reversed.apply(r * W, s).sin(), x, f"{strength}")


def test_gradients_of_a_network_with_quantised_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def function(r: Tensor) -> Tensor:
        for layer in net:
            if isinstance(layer, nn.Linear):
                weight = own.StraightThrough.apply(layer.weight * 8) / 8
                r = nn.functional.linear(own.Clipped.apply(r), weight, layer.bias)
            else:
                r = layer(r)
        return r.square().sum()

    x = batch(7, True)
    ins = [x, *net.parameters()]
    want = torch.autograd.grad(loop(function)(x).sum(), ins)
    for way in WAYS.values():
        got = torch.autograd.grad(shardmap.vmap(function, **way)(x).sum(), ins)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b, str(way))


REFUSED: dict[str, tuple[Function, str]] = {
    "unread": (lambda r: own.Unread.apply(r * W), "takes part in no operator"),
    "unmaterialised": (lambda r: sum(own.Unmaterialised.apply(r * W)), "several results"),
    "noisy": (lambda r: own.Noisy.apply(r * W), "draws random numbers"),
    "overwrites": (lambda r: own.Overwrites.apply(r * W), "clone it first"),
    "fails": (lambda r: own.Fails.apply(r * W), "raised ValueError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name: str) -> None:
    function, text = REFUSED[name]
    with pytest.raises(errors.AutogradFunctionError, match=text):
        shardmap.vmap(function, randomness="different")(batch(3, True))


@pytest.mark.parametrize("name", REFUSED)
def test_the_remedies_of_a_refusal(name: str) -> None:
    """Without gradients from outside all of them run, and so do gradients taken inside."""
    function, _ = REFUSED[name]
    x = batch(3, False)
    with torch.no_grad():
        assert_same(shardmap.vmap(function)(x), loop(function)(x), name)
    if name in ("unread", "unmaterialised"):

        def inside(r: Tensor) -> Tensor:
            with torch.enable_grad():
                q = r.detach().requires_grad_()
                return torch.autograd.grad(function(q).sum(), q)[0]

        with torch.no_grad():
            assert_same(shardmap.vmap(inside)(x), loop(inside)(x), name)


def test_a_backward_marked_once_is_not_differentiated() -> None:
    x = batch(3, True)
    function = lambda r: own.Once.apply(r * W) * r
    want = torch.autograd.grad(loop(function)(x).sum(), [x, W])
    out = shardmap.vmap(function)(x).sum()
    got = torch.autograd.grad(out, [x, W], create_graph=True)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, "first derivative")
    with pytest.raises(errors.AutogradFunctionError, match="once_differentiable"):
        got[0].sum().backward()


def test_a_derivative_of_too_high_an_order_is_refused() -> None:
    x = batch(3, False)
    w = W.detach().requires_grad_()
    grads: list[list[Tensor]] = []
    for mapped in (loop, shardmap.vmap):
        out = mapped(lambda r: own.Sine.apply(r * w))(x).sum()
        found = []
        for _ in range(3):
            (out,) = torch.autograd.grad(out.sum(), w, create_graph=True)
            found.append(out)
        grads.append(found)
    for k, (a, b) in enumerate(zip(grads[1], grads[0], strict=True)):
        assert_same(a, b, f"derivative {k + 1}")
    with pytest.raises(errors.AutogradFunctionError, match="order higher than three"):
        torch.autograd.grad(grads[1][-1].sum(), w)


def test_a_hook_on_what_an_operator_saves_is_not_differentiated_twice() -> None:
    def function(r: Tensor) -> Tensor:
        t = W.exp()
        t.register_hook(lambda g: g * 3)
        return t * r

    x = batch(3, False)
    want = torch.autograd.grad(loop(function)(x).sum(), W)
    got = torch.autograd.grad(shardmap.vmap(function)(x).sum(), W, create_graph=True)
    assert_same(got[0], want[0], "first derivative")
    with pytest.raises(errors.AutogradFunctionError, match="view_as"):
        torch.autograd.grad(got[0].sum(), W)

    def remedy(r: Tensor) -> Tensor:
        t = W.exp()
        t = t.view_as(t)
        t.register_hook(lambda g: g * 3)
        return t * r

    compared(remedy, x, "a view")


def test_a_hook_on_a_shared_tensor_is_refused() -> None:
    def function(r: Tensor) -> Tensor:
        W.register_hook(lambda g: g * 2)
        return r * W

    with pytest.raises(errors.AutogradFunctionError, match="all samples share"):
        shardmap.vmap(function)(batch(3, True))
    assert W._backward_hooks is not None
    W._backward_hooks.clear()


def test_a_full_backward_hook_of_a_module_is_refused() -> None:
    layer = nn.Linear(3, 2).double()
    handle = layer.register_full_backward_hook(lambda module, grads, outs: (grads[0] * 2,))
    x = batch(3, True)
    with pytest.raises(errors.AutogradFunctionError, match="full backward hook"):
        shardmap.vmap(layer)(x)
    handle.remove()
    assert_same(shardmap.vmap(layer)(x), loop(layer)(x), "the hook is removed")


@torch.library.custom_op("shardmap_own_test::metric", mutates_args=())
def metric(t: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(t.detach().numpy().copy()).max()


@pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")
def test_a_metric_without_a_backward_beside_a_loss_is_refused_and_the_remedy_works() -> None:
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(5, 3, dtype=torch.float64)

    def both(r: torch.Tensor, cut: bool) -> tuple[torch.Tensor, torch.Tensor]:
        y = (weight * r).sin()
        return y.sum(), metric(y.detach() if cut else y)

    with pytest.raises(errors.AutogradFunctionError, match=r"\.detach\(\) what it takes"):
        shardmap.vmap(lambda r: both(r, False))(rows)
    losses, metrics = shardmap.vmap(lambda r: both(r, True))(rows)
    pairs = [both(r, False) for r in rows]
    torch.testing.assert_close(metrics, torch.stack([m for _, m in pairs]))
    expected = torch.autograd.grad(torch.stack([value for value, _ in pairs]).sum(), weight)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), weight), expected)
