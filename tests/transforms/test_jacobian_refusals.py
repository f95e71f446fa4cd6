"""Tests of refused derivatives: each error names the argument and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import shardmap
from shardmap import errors
from tests.transforms.functions import PAIRS

X = torch.ones(3, 2)


REFUSED: list[tuple[dict[str, Any], Callable[..., Any], tuple[Any, ...], str]] = [
    ({"argnums": 1}, torch.sin, (X,), "argnums=1 is out of range"),
    ({"argnums": -2}, torch.sin, (X,), "argnums=-2 is out of range"),
    ({"argnums": (0, -1)}, torch.sin, (X,), "names an argument twice"),
    ({}, lambda x: x.float(), (X.long(),), r"argument 0 is of dtype torch.int64"),
    (
        {},
        lambda x: x,
        (X.to(torch.complex64),),
        r"argument 0 is of dtype torch.complex64.*view_as_real",
    ),
    ({"argnums": 1}, lambda x, y: x * y, (X, 2.0), "argument 1 holds 2.0, a float"),
    ({}, lambda x: 3.0, (X,), "result holds 3.0, a float"),
    ({}, lambda x: x > 0, (X,), "result is of dtype torch.bool"),
    ({}, lambda x: torch.complex(x, x), (X,), "result is of dtype torch.complex64"),
    ({"has_aux": True}, torch.sin, (X,), "has_aux=True and the function returned a Tensor"),
    ({"has_aux": True}, lambda x: (x, "text"), (X,), "aux holds 'text'"),
]


@pytest.mark.parametrize("transform", PAIRS)
@pytest.mark.parametrize(("options", "function", "batch", "message"), REFUSED)
def test_what_cannot_be_differentiated_is_refused(
    transform: str,
    options: dict[str, Any],
    function: Callable[..., Any],
    batch: tuple[Any, ...],
    message: str,
) -> None:
    if transform == "hessian" and "has_aux" in options:
        options = {"argnums": 7}
        message = "argnums=7 is out of range"
    with pytest.raises(errors.TransformError, match=message) as caught:
        PAIRS[transform][0](function, **options)(*batch)
    assert str(caught.value).startswith(f"shardmap.{transform}(")


@pytest.mark.parametrize("transform", PAIRS)
def test_bad_values_are_refused_when_the_transform_is_made(transform: str) -> None:
    ours = PAIRS[transform][0]
    for argnums in (1.0, "0", None, True, (0, "1"), ()):
        with pytest.raises(errors.TransformError, match="argnums="):
            ours(torch.sin, argnums)
    for size in (0, -1, 2.5, "some", True):
        with pytest.raises(
            errors.OptionError, match=r"seed_chunk_size=.*pass a positive int, 'auto', or None"
        ):
            ours(torch.sin, seed_chunk_size=size)
    with pytest.raises(errors.OptionError, match="not a function"):
        ours(3)
    with pytest.raises(errors.OptionError, match="chunk_size"):
        ours(torch.sin, chunk_size=0)
    if transform == "jacobian":
        for method in ("backward", None, 3, ["reverse"]):
            with pytest.raises(errors.OptionError, match="method="):
                shardmap.jacobian(torch.sin, method=method)


@pytest.mark.parametrize("transform", PAIRS)
def test_inference_mode_is_refused(transform: str) -> None:
    with torch.inference_mode(), pytest.raises(errors.TransformError, match="inference_mode"):
        PAIRS[transform][0](torch.sin)(torch.ones(3, 2))


@pytest.mark.parametrize("transform", [shardmap.hessian, shardmap.jacfwd])
def test_tangents_within_forward_mode_are_refused_and_the_remedy_works(transform):
    def function(row):
        return (row**3).sum() + row.prod()

    x, tangent = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    second = transform is shardmap.hessian
    own = torch.func.jacrev(torch.func.jacrev(function)) if second else torch.func.jacrev(function)
    remedy = shardmap.jacrev(torch.func.jacrev(function) if second else function)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        with pytest.raises(shardmap.errors.TransformError, match=r"shardmap\.jacrev"):
            transform(function)(dual)
        found = forward_ad.unpack_dual(remedy(dual)).tangent
        either = forward_ad.unpack_dual(shardmap.jacobian(function)(dual)).tangent
    step = 1e-6
    for row, t, got in zip(x, tangent, found, strict=True):
        wanted = (own(row + step * t) - own(row - step * t)) / (2 * step)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert either is not None
    torch.testing.assert_close(transform(function)(x), torch.stack([own(row) for row in x]))
