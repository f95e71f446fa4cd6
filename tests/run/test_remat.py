"""Chunks that are computed again in backward."""

from __future__ import annotations

import pytest
import torch

import shardmap
from shardmap import errors
from tests import oracle


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
