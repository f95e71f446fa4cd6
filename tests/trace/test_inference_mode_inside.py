"""Derivatives in forward mode inside of a map that is called under `torch.inference_mode()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import functional
from torch.fx.experimental.proxy_tensor import make_fx

import shardmap
from shardmap import errors

Tensor = torch.Tensor
W = torch.randn(2, 3, dtype=torch.float64)
X = torch.randn(5, 3, dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)


def layer(z: Tensor) -> Tensor:
    return (W @ z).tanh()


def linearized(row: Tensor) -> Tensor:
    out, slope = torch.func.linearize(layer, row)
    return out + slope(ONES)


def vectorized(row: Tensor) -> Tensor:
    found = functional.jacobian(layer, row, vectorize=True, strategy="forward-mode")
    assert isinstance(found, Tensor)
    return found


OPTIONS = [{}, {"chunk_size": 2}, {"trace": "once"}, {"trace": "each"}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("function", [linearized, vectorized])
def test_what_torch_cannot_derive_there_is_refused(
    function: Callable[[Tensor], Tensor], options: dict
) -> None:
    mapped = shardmap.vmap(function, **options)
    for _ in range(2):
        with (
            torch.inference_mode(),
            pytest.raises(errors.TransformError, match=r"under torch\.no_grad\(\)"),
        ):
            mapped(X)
        with torch.no_grad():
            torch.testing.assert_close(mapped(X), torch.stack([function(row) for row in X]))


SERVED: dict[str, Callable[[Tensor], Any]] = {
    "jvp": lambda row: torch.func.jvp(layer, (row,), (ONES,))[1],
    "jacfwd": lambda row: torch.func.jacfwd(layer)(row),
    "functional.jvp": lambda row: functional.jvp(layer, row, ONES)[1],
    "make_fx": lambda row: make_fx(layer)(row)(row * 2),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_what_it_can_is_the_loops(name: str, options: dict) -> None:
    mapped = shardmap.vmap(SERVED[name], **options)
    with torch.inference_mode():
        expected = torch.stack([SERVED[name](row) for row in X])
        for _ in range(4):
            torch.testing.assert_close(mapped(X), expected)
