"""Selective checkpoints keep results of operators by their order: none around a map."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import shardmap
from shardmap import errors

OPERATORS = [torch.ops.aten.mm.default, torch.ops.aten.mv.default]
CONTEXTS = functools.partial(create_selective_checkpoint_contexts, OPERATORS)
W = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W.requires_grad_()


def shared(r: Tensor) -> Tensor:
    return ((W @ W) @ r).sin()


def branched(r: Tensor) -> Tensor:
    return W @ (W @ r).sin() if r[0] > 0 else (W.T @ r).cos()


def gradient(run: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    return torch.autograd.grad(run(x).square().sum(), W)[0]


def looped(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([f(r) for r in x])


@pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")
@pytest.mark.parametrize("f", [shared, branched])
@pytest.mark.parametrize("options", [{}, {"trace": "once"}, {"chunk_size": 2}], ids=str)
def test_refused_around_a_map_and_the_remedies(
    f: Callable[[Tensor], Tensor], options: dict[str, Any]
) -> None:
    mapped = shardmap.vmap(f, **options)
    again = shardmap.vmap(f, remat=True, **options)

    def inside(r: Tensor) -> Any:
        return checkpoint(f, r, use_reentrant=False, context_fn=CONTEXTS)

    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(7, 3, dtype=torch.float64, generator=generator)
        with pytest.raises(errors.TransformError, match="checkpoint without context_fn"):
            checkpoint(mapped, x, use_reentrant=False, context_fn=CONTEXTS)
        expected = gradient(looped(f), x)
        plain = gradient(lambda x: checkpoint(mapped, x, use_reentrant=False), x)
        torch.testing.assert_close(plain, expected)
        torch.testing.assert_close(gradient(again, x), expected)
        torch.testing.assert_close(gradient(shardmap.vmap(inside, **options), x), expected)
