"""Captured masks that select another number of elements than when the function was recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import shardmap

Tensor = torch.Tensor
X = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def doubled(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    y[mask] = x[mask] * 2
    return y


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x[mask]": lambda x, mask: x[mask].sum() * 2,
    "masked_select": lambda x, mask: x.masked_select(mask).exp().sum(),
    "nonzero": lambda x, mask: x[mask.nonzero()[:, 0]].sum(),
    "y[mask] =": doubled,
    "repeat_interleave": lambda x, mask: x.repeat_interleave(mask.long()).sum(),
}
OPTIONS = [{}, {"strict": True}, {"trace": "once", "strict": True}, {"trace": "each"},
           {"chunk_size": 3}, {"devices": ["cpu", "cpu"], "chunk_size": 2},
           {"check": "off", "strict": True}]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_it_is_recorded_again(name: str, options: dict, requires_grad: bool) -> None:
    """No rule is said to be wrong: the shapes of the recording are those of an older mask."""
    mask, function = torch.tensor([True, False, True, False]), FUNCTIONS[name]
    mapped = shardmap.vmap(lambda x: function(x, mask), **options)
    for bits in (0b0101, 0b0101, 0b0110, 0b0111, 0b0001, 0b1111, 0b0001, 0b1110):
        mask.copy_(torch.tensor([bool(bits >> k & 1) for k in range(4)]))
        x = X.clone().requires_grad_(requires_grad)
        found, expected = mapped(x), torch.stack([function(row, mask) for row in x])
        torch.testing.assert_close(found, expected)
        if requires_grad:
            grads = [torch.autograd.grad(out.sum(), x)[0] for out in (found, expected)]
            torch.testing.assert_close(*grads)
