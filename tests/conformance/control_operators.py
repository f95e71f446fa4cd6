"""Operators that call functions: cond, while_loop, scan, associative_scan and map.

The loop runs the same functions with python's own control flow: torch compiles these operators at
each sample, and its own second gradients of `cond` and `scan` are wrong (torch 2.13: those of the unrolled loop differ).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import _higher_order_ops as higher

from tests.conformance.suite import Cases, Function, weight

Tensor = torch.Tensor
case = Cases()
matrix = weight(4, 4, seed=10)
fixed = torch.tensor([0.5, -1.0, 1.5, 0.2])


def plain_cond(asked, yes, no, operands):
    return yes(*operands) if asked else no(*operands)


def plain_while_loop(going, step, carried):
    while going(*carried):
        carried = step(*carried)
    return carried


def plain_scan(step, carried, rows, reverse=False):
    found = []
    for row in reversed(rows.unbind()) if reverse else rows.unbind():
        carried, result = step(carried, row)
        found.append(result)
    return carried, torch.stack(found[::-1] if reverse else found)


def plain_associative_scan(combine, rows, dim, combine_mode):
    found = [rows.select(dim, 0)]
    for row in rows.unbind(dim)[1:]:
        found.append(combine(found[-1], row))
    return torch.stack(found, dim)


def plain_map(function, rows, *others):
    return torch.stack([function(row, *others) for row in rows.unbind()])


torchs = SimpleNamespace(
    cond=torch.cond,
    while_loop=higher.while_loop,
    scan=higher.scan,
    associative_scan=higher.associative_scan,
    map=higher.map,
)
pythons = SimpleNamespace(
    cond=plain_cond,
    while_loop=plain_while_loop,
    scan=plain_scan,
    associative_scan=plain_associative_scan,
    map=plain_map,
)


def operators(*shape: int, **known: Any) -> Callable[[Callable[..., Any]], Function]:
    """A decorator that enters a function of a sample and of who serves the operators."""

    def enter(function: Callable[..., Any]) -> Function:
        @functools.wraps(function)
        def plain(r: Tensor) -> Any:
            return function(r, ops=pythons)

        return case(*shape, plain=plain, **known)(function)

    return enter


@operators()
def cond_on_the_sample(r, ops=torchs):
    return ops.cond(r.sum() > 0, torch.sin, torch.cos, (r,))


@operators()
def cond_on_a_captured_value(r, ops=torchs):
    return ops.cond(fixed.sum() > 0, lambda x: x * fixed, torch.neg, (r,))


@operators()
def cond_on_a_shape(r, ops=torchs):
    return ops.cond(r.shape[0] > 2, torch.exp, torch.neg, (r,))


@operators()
def cond_of_two_operands(r, ops=torchs):
    return ops.cond(r[0] > r[1], torch.mul, torch.add, (r, r.flip(0)))


@operators()
def cond_in_a_cond(r, ops=torchs):
    def inner(x):
        return ops.cond(x[1] > 0, torch.tanh, torch.neg, (x,))

    return ops.cond(r[0] > 0, inner, lambda x: x * 2, (r,))


@operators()
def cond_with_a_dictionary(r, ops=torchs):
    return ops.cond(
        r[3] > 0.5, lambda x: {"a": x * 2, "b": x.sum()}, lambda x: {"a": -x, "b": x.prod()}, (r,)
    )


@operators()
def cond_after_a_branch(r, ops=torchs):
    y = r * 2 if r[0] > 0 else r
    return ops.cond(y.sum() > 0, torch.sin, torch.exp, (y,))


@operators(orders=0)
def while_loop_by_the_sample(r, ops=torchs):
    return ops.while_loop(
        lambda i, x: (i < 6) & (x.norm() > 0.5), lambda i, x: (i + 1, x / 2), (torch.tensor(0), r)
    )


@operators(orders=0)
def while_loop_of_a_fixed_length(r, ops=torchs):
    return ops.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x.sin()), (torch.tensor(0), r))


@operators()
def scan_of_sums(r, ops=torchs):
    return ops.scan(lambda c, x: (c + x, c * x), torch.zeros(()), r)


@operators(3, 4)
def scan_of_rows(r, ops=torchs):
    return ops.scan(lambda c, x: (torch.tanh(c + x), c.sum() * x), torch.zeros(4), r)


@operators(3, 4, weights=[matrix])
def scan_with_a_weight(r, ops=torchs):
    return ops.scan(lambda c, x: ((matrix @ c).tanh() + x, c * 2), torch.ones(4), r)[0]


@operators(3, 4)
def scan_backwards(r, ops=torchs):
    return ops.scan(lambda c, x: (c * 0.9 + x, c + x), torch.zeros(4), r, reverse=True)


@operators(3, 4, orders=1)
def an_associative_scan(r, ops=torchs):
    return ops.associative_scan(lambda a, b: a * b, r, dim=0, combine_mode="generic")


@operators(3, 4)
def map_over_rows(r, ops=torchs):
    return ops.map(lambda x: x.sin() * x.sum(), r)


@operators(3, 4)
def map_with_an_argument(r, ops=torchs):
    return ops.map(lambda x, y: (x * y).sum(), r, r.sum(0))
