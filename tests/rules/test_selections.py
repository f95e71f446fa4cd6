"""Selections and writes by masks that differ by sample, behind other dimensions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import shardmap
from tests.call.paths import batch, expected

Tensor = torch.Tensor


def columns(r: Tensor) -> Tensor:
    """Columns of a matrix, computed and put back."""
    matrix, mask = torch.outer(r, r.cos()), r > 0
    matrix[:, mask] = matrix[:, mask].sin() * 3
    return matrix


def last_of_three(r: Tensor) -> Tensor:
    """A sum over what is selected in the last dimension."""
    cube = torch.outer(r, r.cos()).reshape(3, 1, 3).expand(3, 2, 3)
    return cube[:, :, r > 0].sum(-1)


def plane(r: Tensor) -> Tensor:
    """A mask of two dimensions between two others; the values are of one column."""
    cube = torch.outer(r, r.cos()).reshape(1, 3, 3, 1).expand(2, 3, 3, 2).clone()
    mask = cube[0, ..., 0] > 0
    cube[:, mask] = cube[:, mask, :1].sin() * 3
    return cube


def rows_for_all(r: Tensor) -> Tensor:
    """The same values are written for each leading index."""
    cube = torch.outer(r, r.cos()).expand(2, 3, 3).clone()
    mask = cube[0] > 0
    cube[:, mask] = cube[1, mask].cos()
    return cube


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"reduce": "sum"}], ids=str)
@pytest.mark.parametrize("function", [columns, last_of_three, plane, rows_for_all])
def test_values_and_gradients(function: Callable[[Tensor], Tensor], options: dict) -> None:
    x, found = batch(211), []
    for run in (shardmap.vmap(function, strict=True, **options), lambda t: expected(function, t)):
        t = x.clone().requires_grad_()
        out = run(t)
        if options.get("reduce") and out.shape[0] == len(x):
            out = out.sum(0)
        first = torch.autograd.grad(out.sin().sum(), t, create_graph=True)[0]
        found.append((out, first, torch.autograd.grad(first.square().sum(), t)[0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
