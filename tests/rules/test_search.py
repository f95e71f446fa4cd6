"""Rules for positions in flattened tensors, sorted sequences and distances, against the loop."""

from __future__ import annotations

import pytest
import torch

from tests.rules.against_loop import below, check, distinct, real
from tests.rules.test_conv import gradients


def _put(x, i, v):
    y = x.clone()
    y.put_(i, v, True)
    return y


def _sorted(*shape):
    return lambda g: torch.randn(shape, generator=g, dtype=torch.float64).sort(-1).values


CASES = {
    "take": (torch.take, real(2, 3), below(6, 2, 2, low=-6)),
    "take scalar": (torch.take, real(), below(1, 3)),
    "take of nothing": (torch.take, real(3), below(3, 0)),
    "put": (lambda x, i, v: x.put(i, v, True), real(2, 3), below(6, 4, low=-6), real(4)),
    "put shaped": (lambda x, i, v: x.put(i, v), real(2, 3), distinct(6, 4), real(2, 2)),
    "put_": (_put, real(2, 3), below(6, 4), real(4)),
    "masked_scatter": (lambda x, m, v: x.masked_scatter(m > 0, v), real(2, 3), real(2, 3), real(7)),
    "masked_scatter row": (
        lambda x, m, v: x.masked_scatter(m > 0, v),
        real(2, 3),
        real(3),
        real(2, 3),
    ),
    "searchsorted": (torch.searchsorted, _sorted(5), real(3, 2)),
    "searchsorted right": (
        lambda s, x: torch.searchsorted(s, x, right=True, out_int32=True),
        _sorted(5),
        real(3),
    ),
    "searchsorted scalar": (torch.searchsorted, _sorted(5), real()),
    "searchsorted rows": (torch.searchsorted, _sorted(2, 5), real(2, 3)),
    "searchsorted order": (
        lambda s, x: torch.searchsorted(s, x, sorter=s.argsort()),
        real(5),
        real(3),
    ),
    "bucketize": (torch.bucketize, real(2, 3), _sorted(4)),
    "bucketize right": (lambda x, s: torch.bucketize(x, s, right=True), real(2, 3), _sorted(4)),
}


@pytest.mark.parametrize("name", CASES)
def test_positions(name):
    """Values and gradients."""
    func, *makers = CASES[name]
    check(func, *makers)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_distances(p):
    """Distances and their gradients."""
    check(gradients(lambda x, y: torch.cdist(x, y, p)), real(3, 4), real(2, 4), gradient=False)
    check(
        gradients(lambda x, y: torch.cdist(x, y, p)),
        real(2, 3, 4),
        real(2, 2, 4),
        gradient=False,
        sizes=(2,),
        strided=False,
    )
