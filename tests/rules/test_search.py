"""Rules for positions in flattened tensors, sorted sequences and distances, against the loop."""

from __future__ import annotations

import math

import pytest
import torch

from tests.rules.against_loop import below, check, distinct, real
from tests.rules.everywhere import everywhere
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


@pytest.mark.parametrize("p", [0.0, 1.0, 1.5, 2.0, 3.0, math.inf])
def test_pairs_of_rows(p: float) -> None:
    everywhere(lambda x: torch.pdist(x, p), real(4, 3))


def test_pairs_of_equal_rows_and_of_one_row() -> None:
    everywhere(lambda x: torch.pdist(torch.cat([x, x])), real(2, 3))
    everywhere(lambda x: torch.pdist(x), real(1, 3))


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("invert", [False, True])
def test_membership(count: int, invert: bool) -> None:
    everywhere(
        lambda x, e: torch.isin(x, e, invert=invert), below(60, 4, 5), below(60, count),
        gradient=False,
    )  # fmt: skip


def test_membership_of_missing_numbers() -> None:
    for count in (2, 40):
        everywhere(
            lambda x, e: torch.isin(x.masked_fill(x > 0, math.nan), e.masked_fill(e > 0, math.nan)),
            real(5), real(count), gradient=False,
        )  # fmt: skip


def test_membership_of_one_number() -> None:
    everywhere(lambda x: torch.isin(x, 3), below(9, 5), gradient=False)
    everywhere(lambda x: torch.isin(3, x, invert=True), below(9, 2, 5), gradient=False)


@pytest.mark.parametrize("size", [0, 3, 9])
def test_positions_of_a_fixed_number(size: int) -> None:
    everywhere(
        lambda x: torch.nonzero_static(x > 0, size=size, fill_value=7), real(3, 2), gradient=False
    )


def test_putting_into_a_transposed_matrix() -> None:
    everywhere(
        lambda x, i, s: x.t().mul(1).put_(i, s, accumulate=True),
        real(4, 3), distinct(12, 2), real(2),
    )  # fmt: skip


def test_parts_of_a_largest_norm() -> None:
    everywhere(lambda x: torch.renorm(x, 2, 1, 1.0), real(4, 3))
    everywhere(lambda x: x.sin().renorm_(1, 0, 0.5), real(4, 3))
