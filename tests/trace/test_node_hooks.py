"""Hooks on nodes, of several gradients, and on tensors that they read, under outer gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import shardmap
from shardmap import errors
from tests.trace import own_functions as own
from tests.trace.test_own_backwards import WAYS, M, W, batch, compared

Tensor = torch.Tensor
Hook = Callable[[tuple[Tensor | None, ...], tuple[Tensor, ...]], tuple[Tensor, ...] | None]


def _tripled(grads: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...]:
    return tuple([None if g is None else g * 3 for g in grads])


def on_its_node(r: Tensor) -> Tensor:
    t = (r * W).sin()
    t.grad_fn.register_hook(_tripled)
    return t * 2


def before_its_node(r: Tensor) -> Tensor:
    t = (r * W).sin()
    t.grad_fn.register_prehook(lambda grads: (grads[0] * 3,))
    return t * 2


def on_the_node_before(r: Tensor) -> Tensor:
    t = (r * W).sin()
    t.grad_fn.next_functions[0][0].register_hook(_tripled)
    return t * 2


def on_the_node_of_a_function(r: Tensor) -> Tensor:
    t = own.Swish.apply(r * W)
    t.grad_fn.register_prehook(lambda grads: (grads[0] * 3,))
    return t * 2


def on_the_leaf_that_all_share(r: Tensor) -> Tensor:
    t = r.detach() * W
    t.grad_fn.next_functions[1][0].register_hook(lambda grads, outs: None)
    return t * 2


def beside_a_hook_on_a_tensor(r: Tensor) -> Tensor:
    t = (r * W).sin()
    t.register_hook(lambda g: g + 1)
    t.grad_fn.register_hook(_tripled)
    return t * 2


REFUSED = (
    on_its_node, before_its_node, on_the_node_before, on_the_node_of_a_function,
    on_the_leaf_that_all_share, beside_a_hook_on_a_tensor,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", REFUSED)
def test_a_hook_on_a_node_is_refused(function: Callable[[Tensor], Tensor], way: str) -> None:
    mapped = shardmap.vmap(function, **WAYS[way])
    for _ in range(2):
        with pytest.raises(errors.AutogradFunctionError, match=r"Tensor\.register_hook.*inside"):
            mapped(batch(5, True))


def test_a_hook_on_a_node_that_all_samples_share_is_refused_and_removed() -> None:
    shared = W.exp()

    def function(r: Tensor) -> Tensor:
        shared.grad_fn.register_prehook(lambda grads: (grads[0] * 3,))
        return r * shared

    with pytest.raises(errors.AutogradFunctionError, match="ExpBackward0"):
        shardmap.vmap(function)(batch(5, True))
    (got,) = torch.autograd.grad(shared.sum(), W)
    torch.testing.assert_close(got, W.exp())


def on_the_tensor(r: Tensor) -> Tensor:
    t = r * W
    t.register_hook(lambda g: g * 3)
    return t.sin() * 2


def taken_inside(r: Tensor) -> tuple[Tensor, Tensor]:
    q = r.detach().requires_grad_()
    return torch.autograd.grad(on_its_node(q).sum(), (q, W))


def removed(r: Tensor) -> Tensor:
    t = (r * W).sin()
    t.grad_fn.register_hook(_tripled).remove()
    return t * 2


def on_what_leads_to_no_output(r: Tensor) -> Tensor:
    with torch.enable_grad():
        on_its_node(r.detach().requires_grad_())
    return (r * W).sin()


def registered_before(r: Tensor) -> Tensor:
    return HOOKED * r


HOOKED = M.sum(0).exp()
HOOKED.grad_fn.register_hook(_tripled)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "function", [on_the_tensor, removed, on_what_leads_to_no_output, registered_before]
)
def test_the_remedy_and_hooks_that_do_not_matter(
    function: Callable[[Tensor], Tensor], way: str
) -> None:
    for rows in (5, 3, 1):
        if function is not registered_before:
            compared(function, batch(rows, True), function.__name__, **WAYS[way])
            continue
        x = batch(rows, True)
        want = torch.autograd.grad(
            torch.stack([function(r) for r in x]).sin().sum(), [x, M], retain_graph=True
        )
        got = torch.autograd.grad(
            shardmap.vmap(function, **WAYS[way])(x).sin().sum(), [x, M], retain_graph=True
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_taken_inside_call_hooks_on_nodes(way: str) -> None:
    x = batch(5, False)
    got = shardmap.vmap(taken_inside, **WAYS[way])(x)
    for k, want in enumerate(zip(*[taken_inside(r) for r in x], strict=True)):
        torch.testing.assert_close(got[k], torch.stack(want))


def reads_its_tensor(r: Tensor) -> Tensor:
    t = (r * W).sin()
    t.register_hook(lambda g: g * (t > 0))
    return t * 2


def reads_its_view_and_its_base(r: Tensor) -> Tensor:
    base = (r * W).sin()
    t = base.view(1, 3)
    t.register_hook(lambda g: g * (t > 0) * base.detach().exp())
    return t[0] * 2


def reads_a_saved_result(r: Tensor) -> Tensor:
    t = (r * W).exp()
    v = t.view_as(t)
    v.register_hook(lambda g: g * t.detach().clamp(max=1))
    return v * r


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "function", [reads_its_tensor, reads_its_view_and_its_base, reads_a_saved_result]
)
def test_a_hook_may_read_its_own_tensor(function: Callable[[Tensor], Tensor], way: str) -> None:
    for rows, grad in ((5, True), (3, False), (1, True)):
        compared(function, batch(rows, grad), function.__name__, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["all", "any"])
def test_a_hook_of_several_gradients_is_refused_and_its_remedies_work(mode: Any, way: str) -> None:
    def function(r: Tensor) -> Tensor:
        t, s = (r * W).sin(), (r * W).cos()
        torch.autograd.graph.register_multi_grad_hook((t, s), lambda grads: None, mode=mode)
        return t * s

    with pytest.raises(errors.AutogradFunctionError, match="register_multi_grad_hook.*inside"):
        shardmap.vmap(function, **WAYS[way])(batch(5, True))

    def each(r: Tensor) -> Tensor:
        t, s = (r * W).sin(), (r * W).cos()
        t.register_hook(lambda g: g * 2)
        s.register_hook(lambda g: g.clamp(-0.1, 0.1))
        return t * s

    compared(each, batch(5, True), "a hook on each", **WAYS[way])

    def inside(r: Tensor) -> tuple[Tensor, ...]:
        t, s = (r * W).sin(), (r * W).cos()
        return (t * s, *torch.autograd.grad((t * s).sum(), (t, s), create_graph=True))

    compared(inside, batch(5, False), "inside", **WAYS[way])


@pytest.mark.parametrize("way", [{}, {"chunk_size": 2}, {"trace": "once"}, {"trace": "each"}])
def test_counters_of_operations_around_the_call(way: dict[str, Any]) -> None:
    """`FlopCounterMode` hooks the gradients of every module, to note names."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    weights = list(net.parameters())
    mapped = shardmap.vmap(lambda r: net(r).square().sum(), **way)
    for _ in range(4):
        batch = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            out = mapped(batch)
            found = torch.autograd.grad(out.sin().sum(), [batch, *weights])
        assert counter.get_total_flops() > 0
        wanted = torch.stack([net(r).square().sum() for r in batch])
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(
            found, torch.autograd.grad(wanted.sin().sum(), [batch, *weights])
        )
