"""Nested tensors inside a map: refused by name, in both layouts; padded ones are the loop's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import shardmap
from shardmap import errors
from tests.loop import loop
from tests.same import assert_same

Function = Callable[[Tensor], Tensor]

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"chunk_size": 2},
    "lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
}
LAYOUTS = {"strided": torch.strided, "jagged": torch.jagged}
PARTS = [torch.ones(2), torch.arange(3.0)]


def nested(parts: list[Tensor], layout: torch.layout) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=layout)


def padded(parts: list[Tensor]) -> Tensor:
    return pad_sequence(parts, batch_first=True)


def refused(layout: torch.layout) -> dict[str, Function]:
    given = nested(PARTS, layout)
    return {
        "of the sample": lambda r: torch.nested.to_padded_tensor(
            nested([r[:2], r], layout), 0.0
        ).sum(),
        "of constants": lambda r: torch.nested.to_padded_tensor(nested(PARTS, layout), 0.0).sum()
        * r,
        "captured": lambda r: torch.nested.to_padded_tensor(given, 0.0).sum() * r,
        "its parts": lambda r: given.unbind()[0].sum() * r,
        "an operator": lambda r: torch.nested.to_padded_tensor(given * 2, 0.0).sum() * r,
    }  # fmt: skip


REMEDIES: dict[str, Function] = {
    "of the sample": lambda r: padded([r[:2], r]).sum(),
    "of constants": lambda r: padded(PARTS).sum() * r,
    "one by one": lambda r: torch.stack([part.sin().sum() for part in (r[:2], r)]).sum(),
}


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, generator=g) for n in (5, 5, 3, 7)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nested_tensors_are_refused_by_name(layout: str, way: str) -> None:
    for function in refused(LAYOUTS[layout]).values():
        mapped = shardmap.vmap(function, **WAYS[way])
        for x in (*batches(), batches()[0].requires_grad_()):
            with pytest.raises(errors.UnsupportedOperatorError, match=r"nested.*pad_sequence"):
                mapped(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_and_padded_copies_are_the_loops(layout: str, way: str) -> None:
    given = nested(PARTS, LAYOUTS[layout])
    outside = torch.nested.to_padded_tensor(given, 0.0)
    functions: dict[str, Function] = {
        **REMEDIES,
        "its size": lambda r: r * given.size(0),
        "padded outside": lambda r: outside.sum() * r,
    }
    for name, function in functions.items():
        mapped = shardmap.vmap(function, **WAYS[way])
        for x in batches():
            assert_same(mapped(x), loop(function)(x), name)
