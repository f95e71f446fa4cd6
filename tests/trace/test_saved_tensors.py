"""`saved_tensors_hooks` inside a function, under gradients from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import shardmap
from shardmap import errors

PACKS = {
    "as it is": (lambda t: t, lambda t: t),
    "a copy": (lambda t: t.clone(), lambda t: t),
    "half of the bits": (lambda t: t.half(), lambda t: t.float()),
    "twice as much": (lambda t: t, lambda t: t * 2),
}


@pytest.mark.parametrize("name", PACKS)
def test_saved_tensors_that_change_are_refused_and_others_are_not(name: str) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def function(r: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(*PACKS[name]):
            return (weight @ r).sin()

    def inside(r: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(function(r).sum(), weight)[0]

    want = torch.stack([inside(r) for r in x])
    torch.testing.assert_close(shardmap.vmap(inside)(x), want)
    for options in ({}, {"chunk_size": 2}, {"trace": "once"}):
        mapped = shardmap.vmap(function, **options)
        if name in ("as it is", "a copy"):
            (got,) = torch.autograd.grad(mapped(x).sum(), weight)
            torch.testing.assert_close(got, want.sum(0))
        else:
            with pytest.raises(errors.AutogradFunctionError, match="saved_tensors_hooks.*inside"):
                mapped(x)


def test_saved_tensors_on_the_cpu_and_checkpoints_pass() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def offloaded(r: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.save_on_cpu():
            return (weight @ r).sin()

    def again(r: torch.Tensor) -> torch.Tensor:
        step = lambda t: (weight @ t).sin()
        return checkpoint(step, r, use_reentrant=False) * 1

    for function in (offloaded, again):
        (got,) = torch.autograd.grad(shardmap.vmap(function)(x).sum(), weight)
        (want,) = torch.autograd.grad(torch.stack([function(r) for r in x]).sum(), weight)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"trace": "once"}, {"trace": "each"}])
def test_results_that_are_offloaded_are_not_taken_for_kept_ones(options: dict) -> None:
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def function(r: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.save_on_cpu():
            return (r.exp() * r).tanh()

    want = torch.stack([function(r) for r in x])
    (gradient,) = torch.autograd.grad(want.sum(), x)
    mapped = shardmap.vmap(function, **options)
    for _ in range(4):
        got = mapped(x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], gradient)


class Held:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


HOLDERS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "itself": (lambda t: t, lambda t: t),
    "a tuple": (lambda t: ("saved", t), lambda pair: pair[1]),
    "a dictionary": (lambda t: {"saved": [t]}, lambda found: found["saved"][0]),
    "an object": (Held, lambda held: held.tensor),
    "a closure": (lambda t: lambda: t, lambda give: give()),
}
OF_THEIR_RESULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{name: getattr(torch, name) for name in ("exp", "tanh", "sigmoid", "sqrt", "rsqrt")},
    "softmax": lambda r: r.softmax(0),
    "log_softmax": lambda r: torch.nn.functional.log_softmax(r, 0),
    "in place": lambda r: (r * 1).exp_(),
    "in place, then again": lambda r: torch.relu_(r * 2).sqrt(),
    "a chain": lambda r: (r.exp() * r.tanh()).sigmoid() * r.norm(),
    "attention": lambda r: torch.nn.functional.scaled_dot_product_attention(
        *[(r * k).view(1, 2, 2) for k in (1, 2, 3)]
    ),
}


@pytest.mark.parametrize("options", [{}, {"trace": "once"}, {"trace": "each"}], ids=str)
@pytest.mark.parametrize("name", OF_THEIR_RESULTS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_results_that_hooks_hold_are_not_taken_for_kept_ones(
    holder: str, name: str, options: dict[str, Any]
) -> None:
    """Autograd saves the result of such a call, and its graph is then a cycle of references."""

    def function(r: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(*HOLDERS[holder]):
            return OF_THEIR_RESULTS[name](r)

    def inside(r: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(function(r).sum(), r, create_graph=True)
        return gradient * r

    x = torch.linspace(0.1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    for each in (function, inside):
        want = torch.stack([each(r) for r in x])
        mapped = shardmap.vmap(each, **options)
        for _ in range(2):
            got = mapped(x)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(
                torch.autograd.grad(got.sum(), x),
                torch.autograd.grad(want.sum(), x, retain_graph=True),
            )


@pytest.mark.parametrize("options", [{}, {"trace": "once"}, {"trace": "each"}], ids=str)
def test_copies_that_a_second_gradient_reads_are_refused_and_the_remedies_work(
    options: dict[str, Any],
) -> None:
    x = torch.linspace(0.1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()

    def function(
        r: torch.Tensor, pack: Callable[[torch.Tensor], torch.Tensor], again: bool
    ) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            inner = (r.exp() * r).sum()
        return torch.autograd.grad(inner, r, create_graph=again)[0] + r * r

    def gradients(f: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        return [*torch.autograd.grad(f(x).sum(), x)]

    copies = shardmap.vmap(lambda r: function(r, torch.clone, True), **options)
    with pytest.raises(errors.AutogradFunctionError, match="copy what they save.*create_graph"):
        copies(x)
    for pack, again in ((lambda t: t, True), (torch.clone, False)):
        each = lambda r, pack=pack, again=again: function(r, pack, again)
        want = gradients(lambda x, each=each: torch.stack([each(r) for r in x]))
        torch.testing.assert_close(gradients(shardmap.vmap(each, **options)), want)
