"""Chunks that are computed again in backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import shardmap
from shardmap import errors
from tests import oracle
from tests.loop import loop


def test_a_captured_tensor_that_changes_before_backward_is_refused() -> None:
    """The loop raises as well: what autograd saved has been written."""
    weight = torch.randn(5)
    for samples in (3, 17):
        x = torch.randn(samples, 5, requires_grad=True)
        mapped = shardmap.vmap(lambda r: (r * weight).sum(), remat=True, chunk_size=2)
        out = mapped(x)
        weight.mul_(2)
        with pytest.raises(errors.CapturedWriteError, match=r"remat=True.*remat=False"):
            torch.autograd.grad(out.sum(), x)
        (got,) = torch.autograd.grad(mapped(x).sum(), x)
        oracle.assert_same(got, weight.expand(samples, 5), "gradient")


def test_around_and_inside_transforms_and_other_maps() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    remat = {"remat": True, "chunk_size": 2}

    def gradient(w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda q: (q * w).sin().sum())(r)

    def nested(vmap: oracle.Subject, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return vmap(lambda q: (q * w).sin(), **remat)(r[:, None] * w).sum(0)

    functions = {"gradient": lambda vmap, w, r: gradient(w, r), "nested": nested}
    for name, function in functions.items():

        def mapped(vmap: oracle.Subject, w: torch.Tensor, function=function) -> torch.Tensor:
            return vmap(lambda r: function(vmap, w, r), **remat)(x)

        found = []
        for vmap in (shardmap.vmap, loop):
            leaf = w.clone().requires_grad_()
            first = torch.autograd.grad(mapped(vmap, leaf).sin().sum(), leaf, create_graph=True)
            second = torch.autograd.grad(first[0].sin().sum(), leaf)
            total = lambda v, vmap=vmap: mapped(vmap, v).sin().sum()
            found.append(
                [
                    mapped(vmap, w),
                    *first,
                    *second,
                    torch.func.grad(total)(w),
                    torch.func.jacrev(lambda v, vmap=vmap: mapped(vmap, v))(w),
                    torch.func.jvp(total, (w,), (w,))[1],
                ]
            )
        for k, (got, want) in enumerate(zip(*found, strict=True)):
            oracle.assert_same(got, want, f"{name}, {k}")


def test_a_second_gradient_through_a_write_by_a_view_is_refused_by_name() -> None:
    def by_a_view(r: torch.Tensor) -> torch.Tensor:
        h = r.sin()
        h.view(2, 2).mul_(2).exp_()
        return h * r

    def out_of_place(r: torch.Tensor) -> torch.Tensor:
        return (r.sin() * 2).exp() * r

    def second(call: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4).requires_grad_()
        (g,) = torch.autograd.grad(call(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.sin().sum(), x)[0]

    expected = second(lambda x: torch.stack([by_a_view(x[i]) for i in range(len(x))]))
    with pytest.raises(errors.TransformError, match="passes through an intermediate that the"):
        second(shardmap.vmap(by_a_view, remat=True, chunk_size=2))
    for remedy in (
        shardmap.vmap(by_a_view, chunk_size=2),
        shardmap.vmap(out_of_place, remat=True, chunk_size=2),
    ):
        torch.testing.assert_close(second(remedy), expected)


def deep(r: torch.Tensor) -> torch.Tensor:
    return (r.sin().exp() * r).tanh()


def branching(r: torch.Tensor) -> torch.Tensor:
    return (r.sin() * r).exp() if r.sum() > 0 else r.exp().tanh()


def bfloat16(t: torch.Tensor) -> torch.Tensor:
    return t.bfloat16() if t.is_floating_point() else t


def back(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t


Run = Callable[[torch.Tensor], torch.Tensor]


def gradients(run: Run, x: torch.Tensor) -> list[torch.Tensor]:
    """The first and the second gradient."""
    (first,) = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)
    return [first, *torch.autograd.grad(first.cos().sum(), x)]


def samples() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(11, 4, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("chunk_size", [1, 2, 5])
@pytest.mark.parametrize("function", [deep, branching])
def test_hooks_around_the_call_change_what_chunks_save(function: Run, chunk_size: int) -> None:
    def coarse(run: Run) -> Run:
        def hooked(x: torch.Tensor) -> torch.Tensor:
            with saved_tensors_hooks(bfloat16, back):
                return run(x)

        return hooked

    x, mapped = samples(), shardmap.vmap(function, remat=True, chunk_size=chunk_size)
    wanted = gradients(coarse(loop(function)), x)
    exact = gradients(loop(function), x)
    assert not torch.allclose(wanted[0], exact[0], atol=1e-5)
    for _ in range(2):
        torch.testing.assert_close(gradients(coarse(mapped), x), wanted)
        torch.testing.assert_close(gradients(mapped, x), exact)
        around = lambda x: checkpoint(coarse(mapped), x, use_reentrant=False)
        torch.testing.assert_close(gradients(around, x), wanted)
        found, expected = [  # the hooks are given the checkpoint's samples only
            gradients(coarse(lambda x, run=run: checkpoint(run, x, use_reentrant=False)), x)
            for run in (mapped, loop(function))
        ]
        torch.testing.assert_close(found, expected)


def branches_inside(r: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda z: ((z * 2).sin() if z.sum() > 0 else z.exp()).sum())(r)


def writes_at_its_largest(r: torch.Tensor) -> torch.Tensor:
    def inner(z: torch.Tensor) -> torch.Tensor:
        z = z * 2
        z[r.argmax()].mul_(3.0)
        return z.sin().sum()

    return torch.func.grad(inner)(r)


def forbids_hooks(r: torch.Tensor) -> torch.Tensor:
    with disable_saved_tensors_hooks("as a test"):
        return branching(r)


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("chunk_size", [1, 2, 5])
@pytest.mark.parametrize("function", [branches_inside, writes_at_its_largest, forbids_hooks])
def test_functions_that_forbid_hooks_on_several_paths(function: Run, chunk_size: int) -> None:
    mapped = shardmap.vmap(function, remat=True, chunk_size=chunk_size)
    x = samples()
    wanted = gradients(loop(function), x)
    for _ in range(3):  # samples of unknown paths, then of known ones
        torch.testing.assert_close(gradients(mapped, x), wanted)


def test_hooks_forbidden_around_the_call_are_refused_and_the_remedies_work() -> None:
    x = samples()

    def around(run: Run) -> Run:
        def forbidden(x: torch.Tensor) -> torch.Tensor:
            with disable_saved_tensors_hooks("as a test"):
                return run(x)

        return forbidden

    mapped = shardmap.vmap(deep, remat=True, chunk_size=2)
    with pytest.raises(errors.TransformError, match=r"remat=True.*'as a test'.*remat=False"):
        around(mapped)(x)
    wanted = gradients(around(loop(deep)), x)
    torch.testing.assert_close(gradients(mapped, x), wanted)
    kept = shardmap.vmap(deep, remat=False, chunk_size=2)
    torch.testing.assert_close(gradients(around(kept), x), wanted)
