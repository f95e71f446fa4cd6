"""Operators that call functions (`torch.cond`, `while_loop`, `scan`, `map`) inside a map."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.utils import _pytree as pytree

import shardmap
from tests.loop import loop
from tests.same import assert_same

higher: Any = torch._higher_order_ops  # type: ignore[attr-defined]
shared = torch.tensor([0.3, -0.5, 0.9])
Sample = Callable[..., Any]
WAYS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 2},
    {"devices": ["cpu", "cpu"]},
    {"trace": "once", "chunk_size": 3},
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """FlexAttention warns that it is not compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check(f: Sample, *columns: torch.Tensor, of: Sample | None = None) -> None:
    """Every sample, as the loop gives it, in each way to run.

    Args:
        f: the function.
        columns: the batch.
        of: what the loop runs, where torch cannot run `f` itself.
    """
    want = pytree.tree_leaves(loop(of or f)(*columns))
    for way in WAYS:
        mapped = shardmap.vmap(f, **way)
        for _ in range(2):
            got = pytree.tree_leaves(mapped(*columns))
            for a, b in zip(got, want, strict=True):
                assert_same(a, b, str(way))


def rows(*shape: int, count: int = 5) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


def gradient(f: Sample) -> Sample:
    """The gradient of one sample's sum of squares."""

    def of(r: torch.Tensor) -> torch.Tensor:
        own = r.detach().clone().requires_grad_()
        results = pytree.tree_leaves(f(own))
        total = sum(((t**2).sum() for t in results if t.requires_grad), torch.zeros(()))
        return torch.autograd.grad(total, own)[0]

    return of


SHARED_CONDITIONS: dict[str, Sample] = {
    "true": lambda r: torch.cond(shared.sum() > 0, torch.sin, torch.cos, (r,)),
    "false": lambda r: torch.cond(shared.sum() > 9, torch.sin, torch.cos, (r,)),
    "of the shape": lambda r: torch.cond(r.shape[0] > 2, torch.sin, torch.cos, (r,)),
    "a number": lambda r: torch.cond(False, torch.sin, torch.cos, (r,)),
    "closures": lambda r: torch.cond(shared[0] > 0, lambda: r * shared, lambda: r + 1),
    "several results": lambda r: torch.cond(
        shared[1] < 0, lambda a: (a.sin(), {"b": a + 1}), lambda a: (a.cos(), {"b": a - 1}), (r,)
    ),
    "one in the other": lambda r: torch.cond(
        shared[0] > 0,
        lambda a: torch.cond(shared[1] > 0, lambda b: b.exp(), lambda b: b.tanh(), (a,)),
        lambda a: a.cos(),
        (r,),
    ),
}


@pytest.mark.parametrize("name", SHARED_CONDITIONS)
def test_cond_of_what_all_samples_share(name: str) -> None:
    check(SHARED_CONDITIONS[name], rows(3))
    check(gradient(SHARED_CONDITIONS[name]), rows(3))


def test_cond_under_transforms_inside_the_function() -> None:
    def f(r: torch.Tensor) -> torch.Tensor:
        return torch.cond(shared.sum() > 0, torch.sin, torch.cos, (r,))

    check(torch.func.grad(lambda r: f(r).sum()), rows(3), of=lambda r: r.cos())
    check(torch.func.jacrev(f), rows(3), of=lambda r: torch.diag(r.cos()))
    check(torch.func.jacfwd(f), rows(3), of=lambda r: torch.diag(r.cos()))

    def inner(r: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda v: torch.cond(v > 0, torch.sin, torch.cos, (v,)))(r)

    check(inner, rows(3), of=lambda r: torch.where(r > 0, r.sin(), r.cos()))
    check(lambda r: shardmap.vmap(f)(r.view(2, 2)), rows(4), of=lambda r: r.sin().view(2, 2))


WHILE_LOOPS: dict[str, Sample] = {
    "three times": lambda r: higher.while_loop(
        lambda i, x: i < 3, lambda i, x: (i + 1, x.sin()), (torch.tensor(0), r)
    ),
    "of torch's documentation": lambda r: higher.while_loop(
        lambda i, x: i.sum() < 10, lambda i, x: (i + 1, x.sin()), (torch.zeros(1), r)
    ),
    "a python number": lambda r: higher.while_loop(
        lambda i, x: 2 * i < x.shape[0], lambda i, x: (i + 1, x + i), (0, r)
    )[1],
    "never": lambda r: higher.while_loop(
        lambda i, x: i < 3, lambda i, x: (i + 1, x.sin()), (torch.tensor(7), r)
    ),
    "nested": lambda r: higher.while_loop(
        lambda i, d: i < 3, lambda i, d: (i + 1, {"a": d["a"] * 2}), (torch.tensor(0), {"a": r})
    ),
}


@pytest.mark.parametrize("name", WHILE_LOOPS)
def test_while_loop_of_what_all_samples_share(name: str) -> None:
    check(WHILE_LOOPS[name], rows(3))


def add(carry: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return carry + x, (carry + x).clone()


SCANS: dict[str, tuple[Sample, tuple[int, ...]]] = {
    "of torch's documentation": (lambda r: higher.scan(add, torch.zeros(()), r), (4,)),
    "nested, backwards": (
        lambda r: higher.scan(
            lambda c, x: ({"s": c["s"] + x["v"].sin()}, [c["s"] * x["v"], x["v"].clone()]),
            {"s": torch.zeros(())},
            {"v": r},
            reverse=True,
        ),
        (4,),
    ),
    "two carried": (
        lambda r: higher.scan(
            lambda c, x: ((c[0] + x, c[1] * x), c[0] - c[1]), (torch.zeros(2), torch.ones(2)), r
        ),
        (3, 2),
    ),
    "another dimension": (
        lambda r: higher.scan(lambda c, x: (c + x, c * x), torch.zeros(3), r, dim=1),
        (3, 4),
    ),
    "one step": (lambda r: higher.scan(add, torch.zeros(()), r), (1,)),
}


@pytest.mark.parametrize("name", SCANS)
def test_scan(name: str) -> None:
    f, shape = SCANS[name]
    check(f, rows(*shape))
    check(gradient(f), rows(*shape))


MAPS: dict[str, tuple[Sample, tuple[int, ...]]] = {
    "of torch's documentation": (
        lambda r: higher.map(lambda xs: xs[0] + xs[1] + shared, [r, r + 1]),
        (2, 3),
    ),
    "arguments": (lambda r: higher.map(lambda x, y: (x * y, x + 1), r, shared), (2, 3)),
}


@pytest.mark.parametrize("name", MAPS)
def test_map(name: str) -> None:
    f, shape = MAPS[name]
    check(f, rows(*shape))
    check(gradient(f), rows(*shape))


def test_associative_scan() -> None:
    def both(a: Any, b: Any) -> Any:
        return a[0] * b[0], a[1] * b[0] + b[1]

    def f(r: torch.Tensor) -> Any:
        return higher.associative_scan(both, (r, r + 1), 0, reverse=True, combine_mode="generic")

    check(f, rows(5))
    check(gradient(f), rows(5))


FLEX: dict[str, Sample] = {
    "plain": lambda r: flex.flex_attention(r, r + 1, r * 2),
    "score": lambda r: flex.flex_attention(
        r, r + 1, r * 2, score_mod=lambda s, b, h, q, k: s + (q - k) * 0.1
    ),
    "causal": lambda r: flex.flex_attention(
        r,
        r + 1,
        r * 2,
        score_mod=lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    ),
    "a bias of the sample": lambda r: flex.flex_attention(
        r, r + 1, r * 2, score_mod=lambda s, b, h, q, k: s + r[0, 0, q, 0] * r[0, 0, k, 1]
    ),
    "grouped": lambda r: flex.flex_attention(r, r[:, :1] + 1, r[:, :1] * 2, enable_gqa=True),
    "blocks": lambda r: flex.flex_attention(
        r,
        r + 1,
        r * 2,
        block_mask=flex.create_block_mask(
            lambda b, h, q, k: q >= k, None, None, 6, 6, device="cpu", BLOCK_SIZE=2
        ),
    ),
    "log-sum-exp": lambda r: (
        flex.flex_attention(r, r + 1, r * 2, return_aux=flex.AuxRequest(lse=True))[1].lse
    ),
}


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention(name: str) -> None:
    check(FLEX[name], rows(1, 2, 6, 4))


def test_a_mask_of_the_samples_own_length() -> None:
    def f(r: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        mask = flex.create_block_mask(
            lambda b, h, q, k: q * 0 + k < length, None, None, 6, 6, device="cpu", BLOCK_SIZE=8
        )
        return flex.flex_attention(r, r + 1, r * 2, block_mask=mask)

    check(f, rows(1, 2, 6, 4), torch.tensor([3, 5, 6, 1, 4]))


DIFFERING: dict[str, tuple[Sample, Sample]] = {
    "two branches": (
        lambda r: torch.cond(r.sum() > 0, torch.sin, torch.cos, (r,)),
        lambda r: r.sin() if r.sum() > 0 else r.cos(),
    ),
    "a branch that is NaN for the others": (
        lambda r: torch.cond(
            r.sum() > 0, lambda a: a.sum().sqrt() * a, lambda a: (-a.sum()).log() * a, (r,)
        ),
        lambda r: r.sum().sqrt() * r if r.sum() > 0 else (-r.sum()).log() * r,
    ),
    "one in the other": (
        lambda r: torch.cond(
            r[0] > 0,
            lambda a: torch.cond(a[1] > 0, lambda b: b.exp(), lambda b: b.tanh(), (a,)),
            lambda a: a.cos(),
            (r,),
        ),
        lambda r: (r.exp() if r[1] > 0 else r.tanh()) if r[0] > 0 else r.cos(),
    ),
    "halved until small": (
        lambda r: higher.while_loop(lambda x: x.norm() > 1, lambda x: (x / 2,), (r * 3,))[0],
        lambda r: r * 3 / 2 ** ((r * 3).norm().log2().ceil().clamp(min=0)),
    ),
}


@pytest.mark.parametrize("name", DIFFERING)
def test_conditions_that_differ_by_sample(name: str) -> None:
    """Each sample goes its own way; gradients see nothing of the other way."""
    f, plain = DIFFERING[name]
    x = rows(3, count=7)
    assert len({bool(r.sum() > 0) for r in x}) == 2
    check(f, x, of=plain)
    if "until" not in name:
        check(gradient(f), x, of=gradient(plain))
