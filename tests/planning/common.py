"""Helpers for tests of the planner: random memory models, and batches of distinct samples."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shardmap.planning.memory import (
    Level,
    MemoryModel,
    envelope,
)
from shardmap.trace.recording import flat_tensors

QUICK = settings(deadline=None, max_examples=300)
counts = st.integers(0, 1 << 34)
levels = st.builds(Level, counts, st.integers(0, 1 << 26))
models = st.builds(
    MemoryModel,
    counts,
    st.lists(levels, min_size=1, max_size=5).map(envelope),
    st.one_of(st.just(1.0), st.floats(0.75, 4.0)),
)


def batch_of(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(
        dtype
    )


class Peak(TorchDispatchMode):
    """The most bytes that operators had made and not freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata for t in flat_tensors((*args, *(kwargs or {}).values()))
        }
        out = func(*args, **(kwargs or {}))
        for t in flat_tensors(out if isinstance(out, tuple | list) else (out,)):
            storage = t.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out
