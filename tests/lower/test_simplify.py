"""Passes over a chunk's calls: the same values with fewer calls, whatever aliases and writes."""

from __future__ import annotations

import collections

import pytest
import torch

import shardmap
from shardmap.lower import codegen
from tests import oracle


@pytest.fixture
def programs(monkeypatch):
    """The batched programs that are made into functions."""
    made = []
    original = codegen.generate

    def generate(program, *rest):
        made.append(program)
        return original(program, *rest)

    monkeypatch.setattr("shardmap.lower.cache.generate", generate)
    return made


def names(calls):
    """How often each function is called."""
    return collections.Counter(
        c.op.name() if c.op is not None else getattr(c.target, "__name__", "") for c in calls
    )


def compare(func, *batch, **options):
    """Compare every sample with the loop, for several sizes and chunks."""
    rows = [func(*row) for row in zip(*batch, strict=True)]
    for size, chunk in ((len(rows), "auto"), (len(rows), 2), (1, "auto"), (3, 2)):
        found = shardmap.vmap(func, chunk_size=chunk, **options)(*[t[:size] for t in batch])
        found = found if isinstance(found, tuple) else (found,)
        wanted = [r if isinstance(r, tuple) else (r,) for r in rows[:size]]
        for got, column in zip(found, zip(*wanted, strict=True), strict=True):
            oracle.assert_same(got, torch.stack(column), "output")


def real(*shape):
    """Different numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_repeated_calls_are_made_once(programs):
    """Two equal calls give one value, but two outputs never share memory."""

    def func(x):
        return torch.sin(x) + torch.cos(x * 2), (x * 2).sin(), torch.sin(x), torch.sin(x)

    compare(func, real(7, 20, 20))
    assert names(programs[-1].chunk)["aten::sin"] == 3
    found = shardmap.vmap(func)(real(7, 20, 20))
    assert len({t.untyped_storage().data_ptr() for t in found}) == 4


def test_what_was_let_go_is_computed_again(programs):
    """A value that is computed again to save memory does not stay alive instead."""

    def func(x):
        first = torch.exp(x).sum()
        rest = torch.cos(x).sum() * first
        return rest + torch.exp(x).mean()

    compare(func, real(5, 30))
    assert names(programs[-1].chunk)["aten::exp"] == 2


def test_signs_become_differences(programs):
    """`x + -y`, with the roll of `-y` too, and not where the negative is needed itself."""

    def func(x, y, z):
        rolled = x + torch.roll(-y, 1, 0)
        sign = -x
        return rolled + -z, sign + y, sign * 2

    compare(func, real(7, 4, 5), real(7, 4, 5) * 2, real(7, 4, 5) * 3)
    found = names(programs[-1].chunk)
    assert found["aten::sub.Tensor"] + found["sub_"] == 2
    assert found["aten::neg"] == 1


def test_a_difference_keeps_the_layout_of_a_negative_that_comes_first():
    """A result has the layout of its first operand, and only one of them can be viewed here."""

    def func(x, y):
        turned = (-y.transpose(0, 1)) + x  # laid out as the negative is
        return turned.transpose(0, 1).view(-1) * 2

    compare(func, real(7, 4, 4), real(7, 4, 4) * 2)


@pytest.mark.parametrize("steps", [2, 3, 11, 40])
def test_sums_of_products_become_one(steps, programs):
    """The gradient of a recurrent weight; long ones in parts no larger than the sum."""
    weight = (real(16, 16) / 4).requires_grad_()

    def func(x):
        h = x
        for _ in range(steps):
            h = torch.tanh(weight @ h)
        return torch.autograd.grad((h**2).sum(), weight)[0]

    compare(func, real(5, 16))
    calls = names(programs[-1].chunk)
    products = calls["aten::mul.Tensor"] + calls["aten::bmm"] + calls["aten::baddbmm"]
    assert products - steps < steps or steps < 3


def test_factors_that_are_written_later_are_read_in_time():
    """A buffer that is a factor of each product holds other values each time."""

    def func(x):
        buffer = torch.zeros_like(x)
        total = torch.zeros(6, 6, dtype=x.dtype)
        for i in range(4):
            buffer.copy_(x).mul_(i + 1.0)
            view = buffer[:, None] if i % 2 else buffer.unsqueeze(1)
            total = total + view @ x[None] * 1.0 + view @ buffer[None]
        return total

    compare(func, real(5, 6))


def test_products_with_a_term_of_another_kind():
    """Terms that are no products, sizes that differ, and a sum that is an output itself."""

    def func(x, y):
        first = x @ y + y.mT @ x.mT
        second = first + x @ y
        third = second + torch.ones(8, 8, dtype=x.dtype) + x @ y
        return first * 1, second, third, third + (x @ y).sum(0, keepdim=True)

    compare(func, real(5, 8, 2), real(5, 2, 8))


def test_results_in_place_of_operands_that_are_done(programs):
    """Operands that are read later, viewed, returned or given keep their values."""

    def func(x, y):
        a = x * y
        b = a + 1.0
        view = a.mT
        c = torch.exp(b) * 2.0 + a
        d = view - 3.0
        e = x * 2.0
        f = (e - y).neg().sigmoid()
        return c, d, f * f, e + x, a.sum(0)

    compare(func, real(7, 20, 20), real(7, 20, 20))
    found = names(programs[-1].chunk)
    assert any(name.endswith("_") for name in found), found


def test_sums_drop_their_dimensions_at_once(programs):
    """A bias's gradient is a sum whose dimension is squeezed next."""
    layer = torch.nn.Linear(3, 4, dtype=torch.float64)

    def func(x):
        return torch.autograd.grad((layer(x) ** 2).sum(), tuple(layer.parameters()))

    compare(func, real(5, 6, 3))
    assert not any(
        c.op is torch.ops.aten.sum.dim_IntList and len(c.args) > 2 for c in programs[-1].chunk
    )


def test_copies_of_views_nobody_else_refers_to(programs):
    """A result that is written in place is not copied before, unless it is a view of a given one."""
    weight = real(4, 4)

    def func(x):
        out = x @ weight
        out += 1.0
        other = x.view(2, 2).mT.reshape(4)
        other += out
        return out.sigmoid_(), other

    compare(func, real(7, 4))
    assert names(programs[-1].chunk)["no_view"] <= 1


def test_a_pass_that_is_wrong_is_left_out(monkeypatch):
    """Results are compared with the calls one by one, and the plain calls take over."""

    def wrong(calls, *rest):
        return [c._replace(target=torch.Tensor.sub) if "add" in str(c.op) else c for c in calls]

    monkeypatch.setattr("shardmap.lower.simplify.sums_of_products", wrong)
    compare(lambda x, y: (x + y) * 3.0, real(5, 9), real(5, 9))
