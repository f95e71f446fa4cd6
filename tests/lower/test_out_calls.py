"""Calls with `out=` whose operands all samples share, into memory that differs by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from tests.same import assert_same

torch.manual_seed(0)
M, V = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
B, ROW = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
AT = torch.tensor([[0], [2], [1]])

Made = Callable[..., Tensor]
CALLS: dict[str, Callable[[Made], Any]] = {
    "mm, one row": lambda o: torch.mm(ROW, M, out=o(1, 3)),
    "mm": lambda o: torch.mm(M, M, out=o(3, 3)),
    "mv": lambda o: torch.mv(M, V, out=o(3)),
    "dot": lambda o: torch.dot(V, V, out=o()),
    "bmm": lambda o: torch.bmm(B, B, out=o(2, 3, 3)),
    "addmm": lambda o: torch.addmm(M, M, M, out=o(3, 3)),
    "addmv": lambda o: torch.addmv(V, M, V, out=o(3)),
    "addr": lambda o: torch.addr(M, V, V, out=o(3, 3)),
    "baddbmm": lambda o: torch.baddbmm(B, B, B, out=o(2, 3, 3)),
    "sum": lambda o: torch.sum(M, 1, out=o(3)),
    "cumsum": lambda o: torch.cumsum(M, 1, out=o(3, 3)),
    "amax": lambda o: torch.amax(M, 1, out=o(3)),
    "cat": lambda o: torch.cat([M, M], 1, out=o(3, 6)),
    "stack": lambda o: torch.stack([M, M], 1, out=o(3, 2, 3)),
    "gather": lambda o: torch.gather(M, 1, AT, out=o(3, 1)),
    "index_select": lambda o: torch.index_select(M, 1, AT[:2, 0], out=o(3, 2)),
    "where": lambda o: torch.where(M > 0, M, M * 2, out=o(3, 3)),
    "arange": lambda o: torch.arange(3.0, out=o(3)),
    "std": lambda o: torch.std(M, 1, out=o(3)),
    "norm": lambda o: torch.linalg.vector_norm(M, 2, out=o()),
    "max": lambda o: torch.max(M, 1, out=(o(3), torch.empty(3, dtype=torch.long)))[0],
    "topk": lambda o: torch.topk(M, 2, out=(o(3, 2), torch.empty(3, 2, dtype=torch.long)))[0],
    "add": lambda o: torch.add(M, 1, out=o(3, 3)),
}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks of two": {"chunk_size": 2},
    "lanes": {"devices": ["cpu", "cpu"]},
    "once": {"trace": "once"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_results_of_shared_operands(name: str, way: str) -> None:
    def function(r: Tensor) -> tuple[Tensor, Tensor]:
        def made(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64).add_(r.sum())

        memory: list[Tensor] = []
        found = CALLS[name](lambda *shape: memory.append(made(*shape)) or memory[0])
        return found * r.sum(), memory[0]

    mapped = shardmap.vmap(function, **WAYS[way])
    for size in (5, 1, 3):
        x = torch.randn(size, 2, dtype=torch.float64)
        wanted = [torch.stack(column) for column in zip(*map(function, x), strict=True)]
        for a, b in zip(mapped(x), wanted, strict=True):
            assert_same(a, b, name)
