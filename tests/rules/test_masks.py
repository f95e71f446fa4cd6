"""Backward operators that take a mask of the wanted gradients: every combination of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import shardmap
from shardmap.rules import registry
from tests.rules.against_loop import assert_close

aten = torch.ops.aten
Tensor = torch.Tensor
SIZE = 3


def draw(*shape: int) -> Tensor:
    """A batch of normal numbers."""
    return torch.randn(SIZE, *shape, dtype=torch.float64)


def check(
    call: Callable[..., Sequence[Any]], batch: Sequence[Any], count: int, wanted: int = 3
) -> None:
    """`call(mask, *tensors)` with every mask, each choice of one unmapped operand, by the loop.

    Only the first `wanted` gradients exist.
    """
    at = [i for i, t in enumerate(batch) if t is not None]
    for mask in itertools.product((False, True), repeat=count):
        if not any(mask) or any(mask[wanted:]):
            continue
        for unmapped in [None, *at]:
            dims = tuple(None if t is None or i == unmapped else 0 for i, t in enumerate(batch))
            given = [t[0] if i == unmapped else t for i, t in enumerate(batch)]
            asked = [i for i, m in enumerate(mask) if m]

            def f(*tensors: Any, mask: Any = mask, asked: Any = asked) -> tuple[Tensor, ...]:
                found = call(list(mask), *tensors)
                return tuple(found[i] for i in asked)

            rows = [
                f(*(t if d is None else t[i] for t, d in zip(given, dims, strict=True)))
                for i in range(SIZE)
            ]
            got = shardmap.vmap(f, dims)(*given)
            want = [torch.stack(column) for column in zip(*rows, strict=True)]
            for number, (mine, theirs) in enumerate(zip(got, want, strict=True)):
                label = f"mask {mask}, unmapped {unmapped}, result {number}"
                assert_close(mine, theirs, 1e-9, label)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("space", [1, 2, 3])
def test_convolution(space: int, groups: int, transposed: bool) -> None:
    one, zero = [1] * space, [0] * space
    weight = draw(4, 4 // groups, *[2] * space)
    x = draw(2, 4, *[4] * space)
    out = aten.convolution(x[0], weight[0], None, one, zero, one, transposed, zero, groups)

    def call(mask: list[bool], grad: Tensor, x: Tensor, weight: Tensor) -> Any:
        numbers = (one, zero, one, transposed, zero, groups)
        return aten.convolution_backward(grad, x, weight, [4], *numbers, mask)

    check(call, [draw(*out.shape), x, weight], 3)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(affine: bool) -> None:
    x = draw(2, 5, 4)
    found = [torch.native_layer_norm(t, [4], None, None, 1e-5) for t in x]
    mean, rstd = (torch.stack([f[i] for f in found]) for i in (1, 2))

    def call(mask: list[bool], grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Any) -> Any:
        return aten.native_layer_norm_backward(grad, x, [4], mean, rstd, w, w, mask)

    check(call, [draw(2, 5, 4), x, mean, rstd, draw(4) if affine else None], 3, 3 if affine else 1)


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(affine: bool) -> None:
    x = draw(2, 4, 3)
    found = [torch.native_group_norm(t, None, None, 2, 4, 3, 2, 1e-5) for t in x]
    mean, rstd = (torch.stack([f[i] for f in found]) for i in (1, 2))

    def call(mask: list[bool], grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Any) -> Any:
        return aten.native_group_norm_backward(grad, x, mean, rstd, w, 2, 4, 3, 2, mask)

    check(call, [draw(2, 4, 3), x, mean, rstd, draw(4) if affine else None], 3, 3 if affine else 1)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm(train: bool, affine: bool) -> None:
    x, running = draw(6, 4), (draw(4), draw(4).abs() + 0.5)
    found = [torch.native_batch_norm(t, None, None, None, None, True, 0.1, 1e-5) for t in x]
    saved = [torch.stack([f[i] for f in found]) for i in (1, 2)]

    def call(mask: list[bool], grad: Tensor, x: Tensor, w: Any, *stats: Tensor) -> Any:
        return aten.native_batch_norm_backward(grad, x, w, *stats, train, 1e-5, mask)

    weight = draw(4) if affine else None
    check(call, [draw(6, 4), x, weight, *running, *saved], 3, 3 if affine else 1)


@pytest.mark.parametrize("space", [2, 3])
def test_grid_sampler(space: int) -> None:
    op = getattr(aten, f"grid_sampler_{space}d_backward")
    x, grid = draw(2, 3, *[4] * space), draw(2, *[3] * space, space).tanh()

    def call(mask: list[bool], grad: Tensor, x: Tensor, grid: Tensor) -> Any:
        return op(grad, x, grid, 0, 0, False, mask)

    check(call, [draw(2, 3, *[3] * space), x, grid], 2)


WITH_A_MASK = {
    "convolution_backward",
    "native_layer_norm_backward",
    "native_group_norm_backward",
    "native_batch_norm_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
}
"""The operators above."""
ON_CUDA_ONLY = {"_fused_rms_norm_backward", "_scaled_dot_product_efficient_attention_backward"}


def test_every_rule_of_an_operator_with_a_mask_is_tried_here() -> None:
    found = {
        op._schema.name.removeprefix("aten::")
        for op in registry._rules
        for a in op._schema.arguments
        if "mask" in a.name and str(a.type) == "List[bool]"
    } - ON_CUDA_ONLY
    assert found <= WITH_A_MASK, found - WITH_A_MASK
    assert "convolution_backward" in found
