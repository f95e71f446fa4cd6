"""Costs of a chunk by calls on tensors without memory, compared with those of computed chunks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import shardmap
from shardmap.planning import shapes
from shardmap.planning.observe import Observation
from shardmap.rules import registry
from shardmap.run import watch


def mlp(x):
    """Gradients of two layers."""
    a, b = MATRICES
    with torch.enable_grad():
        return torch.autograd.grad((torch.tanh(x @ a) @ b).pow(2).sum(), [a, b])


def attention(x):
    """Attention of 4 heads, normalised, with a residual."""
    q = x.view(8, 4, 16).transpose(0, 1)
    y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    return F.layer_norm(x.view(8, 64) + y.transpose(0, 1).reshape(8, 64), (64,))


def writes(x):
    """Writes in place, and views of what is written."""
    y = torch.zeros_like(x)
    y.add_(x)
    y[::2].mul_(2)
    return torch.cat([y, x.clone().relu_()]), y.view(32, 16).t().contiguous()


def images(x):
    """A convolution, its pooling, and a gradient by the image."""
    with torch.enable_grad():
        x = x.view(2, 16, 16).requires_grad_()
        loss = F.max_pool2d(F.conv2d(x[None], KERNEL).relu(), 2).sum()
        return torch.autograd.grad(loss, x)[0]


MATRICES = [(torch.randn(shape) / 22).requires_grad_() for shape in ((512, 64), (64, 8))]
KERNEL = torch.randn(4, 2, 3, 3)
CASES = [mlp, attention, writes, images]


def observed(monkeypatch, function, least: int) -> tuple[Observation | None, torch.Tensor]:
    """The cost of a chunk, pretended from `least` bytes for each call on, and its inputs."""
    shardmap.clear_caches()
    monkeypatch.setattr(watch, "PRETENDED_FROM", least)
    x = torch.randn(7, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plan = shardmap.plan(function, memory_budget="1GiB")(x)
    return plan._seen(), x


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_pretended_chunks_cost_what_computed_ones_cost(function, monkeypatch):
    """Levels, what stays, and every kernel are equal."""
    calls = []
    describe = shapes._described
    monkeypatch.setattr(shapes, "_described", lambda *a: calls.append(1) or describe(*a))
    computed, x = observed(monkeypatch, function, 1 << 40)
    assert not calls
    pretended, _ = observed(monkeypatch, function, 0)
    assert calls, "the chunks were computed"
    assert pretended.levels == computed.levels
    assert pretended.kept == computed.kept
    assert pretended.kernels == computed.kernels
    assert pretended.costs == computed.costs
    rows = [function(row) for row in x]
    found = shardmap.vmap(function)(x)
    if isinstance(found, torch.Tensor):
        rows, found = [(row,) for row in rows], (found,)
    for column, got in zip(zip(*rows, strict=True), found, strict=True):
        torch.testing.assert_close(got.detach(), torch.stack(column).detach(), rtol=1e-4, atol=1e-5)


def test_calls_that_need_values_are_computed(monkeypatch):
    """An operator of the user's that reads numbers has no cost without them."""

    @torch.library.custom_op("shardmap_shapes::scaled", mutates_args=())
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.abs().max())

    def function(x):
        return scaled(x) + 1

    with pytest.warns(shardmap.errors.SlowLoopWarning):
        computed, x = observed(monkeypatch, function, 0)
    assert computed is not None
    assert any(level.at(3) >= 2 * x[:3].nbytes for level in computed.levels)
    found = shardmap.vmap(function)(x)
    torch.testing.assert_close(found, torch.stack([function(row) for row in x]))


def test_what_a_call_returns_is_remembered_for_equal_arguments_only():
    """Results differ by shape, strides, dtype, scalars, and by which argument is written."""
    run = shapes.Shapes()
    meta = {"device": "meta"}
    for _ in range(2):
        a, b = torch.empty(3, 4, **meta), torch.empty(4, 3, **meta)
        assert run(torch.ops.aten.mm.default, (a, b), {}).shape == (3, 3)
        assert run(torch.ops.aten.mm.default, (b, a), {}).shape == (4, 4)
        assert run(torch.ops.aten.sum.dim_IntList, (a, [0]), {}).shape == (4,)
        assert run(torch.ops.aten.sum.dim_IntList, (a, [1]), {}).shape == (3,)
        assert run(torch.ops.aten.mul.Tensor, (a, 2), {}).stride() == (4, 1)
        assert run(torch.ops.aten.mul.Tensor, (b.t(), 2), {}).stride() == (1, 3)
        assert run(torch.ops.aten.add_.Tensor, (a, 1), {}) is a
        out = torch.empty(3, 3, **meta)
        assert run(torch.ops.aten.mm.out, (a, b), {"out": out}) is out
        half = a.to(torch.float16)
        assert run(torch.ops.aten.mul.Tensor, (half, 2), {}).dtype is torch.float16
        assert run(torch.ops.aten.mul.Tensor, (half, a), {}).dtype is torch.float32
        view = run(torch.ops.aten.t.default, (a,), {})
        assert view.shape == (4, 3)
        assert view.untyped_storage()._cdata == a.untyped_storage()._cdata
        first, second = run(torch.ops.aten.max.dim, (a, 0), {})
        assert first.dtype is torch.float32
        assert second.dtype is torch.int64


@torch.library.custom_op("shardmap_shapes::plus", mutates_args=())
def plus(x: torch.Tensor) -> torch.Tensor:
    """An operator whose rule is wrong."""
    return x + 1


@plus.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("chunk_size", [1, 3, "auto"])
def test_a_lowering_that_a_trial_changes_is_measured_again(chunk_size, monkeypatch):
    """The plan shows the memory of what runs, and the results are the loop's."""
    rules = dict(registry._rules)
    operator = torch.ops.shardmap_shapes.plus.default

    @shardmap.batching_rule(operator)
    def rule(b, eq, args, kwargs):
        spec = eq.outs[0].spec
        return b.call(torch.add, args[0], 2, shape=spec.shape, dtype=spec.dtype)

    def function(x):
        return torch.ops.shardmap_shapes.plus(x.sin()).cos()

    try:
        monkeypatch.setattr(watch, "PRETENDED_FROM", 0)
        shardmap.clear_caches()
        x = torch.randn(7, 512)
        with pytest.warns(shardmap.errors.SlowLoopWarning, match="is wrong"):
            plan = shardmap.plan(function, chunk_size=chunk_size, memory_budget="1GiB")(x)
        assert "loop" in str(plan)
        names = [cost.name for cost in plan._seen().costs]
        assert "shardmap_shapes::plus" in names
        calls = next(c.calls for c in plan._seen().costs if c.name == "shardmap_shapes::plus")
        assert calls > 1, "the loop's calls, not the rule's one"
        torch.testing.assert_close(plan.run(), torch.stack([function(row) for row in x]))
    finally:
        registry._rules.clear()
        registry._rules.update(rules)
        shardmap.clear_caches()
