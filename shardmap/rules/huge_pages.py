"""Memory on huge pages for large results.

The per-sample gradients of a model are far larger than anything else in the program, and on CPU
filling fresh memory costs more than computing them: an outer product of 128 x 256 x 784 float32
took 39 ms into fresh memory and 6 ms into memory on huge pages. numpy's allocator asks the kernel
for those from 4 MiB on; torch's does only under an environment variable.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shardmap._torch import dispatch_depth, functorch

FROM_BYTES = 4 << 20
"""Bytes from which numpy's allocator requests huge pages."""
WORTHWHILE_PER_SAMPLE = 1 << 12
"""Least number of elements per sample for huge pages: with fewer, checking the size costs more than
it saves except in huge batches."""

_NUMPY = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.complex64: np.complex64,
}


def empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor | None:
    """Allocate memory on huge pages for a result.

    None if a plain call is better, or another mode has to see the allocation.
    """
    dtype = _NUMPY.get(like.dtype)
    if (
        dtype is None
        or math.prod(shape) * like.element_size() < FROM_BYTES
        or like.device.type != "cpu"
    ):
        return None
    if torch.is_grad_enabled() or dispatch_depth() or functorch.maybe_current_level() is not None:
        return None
    return torch.from_numpy(np.empty(tuple(shape), dtype))


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep memory that a chunk frees for the next one, from now on.

    glibc gives memory back to the system from a size on that it learns from the blocks that a
    process frees, up to 32 MiB. A process that has freed no large one yet fills fresh pages in each
    chunk: per-sample gradient norms of a small CNN took 60 us instead of 30.
    """
    np.empty(31 << 20, np.uint8)  # never written to; numpy's, as a torch mode may make fake tensors


@functools.cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None


def give_back() -> None:
    """Give memory that is free back to the system.

    Torch asks glibc for aligned blocks, and a hole that a block has left is too small for an
    aligned block of the same size: with anything small kept in between, 40 blocks of 25 MB, one
    after the other, grew a process by 900 MB instead of 50.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def whole(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for a stacked result of any dtype.

    It lies on huge pages if it is large and on the CPU.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < FROM_BYTES or dispatch_depth():
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(tuple(shape))


def bmm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`torch.bmm` into huge pages."""
    out = empty((x.shape[0], x.shape[1], y.shape[2]), x)
    return torch.bmm(x, y) if out is None else torch.bmm(x, y, out=out)


def mul(column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """`torch.mul` of `[B, m, 1]` and `[B, 1, n]` into huge pages."""
    out = empty(torch.broadcast_shapes(column.shape, row.shape), column)
    return torch.mul(column, row) if out is None else torch.mul(column, row, out=out)


def zeros(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`like.new_zeros(shape)` on huge pages."""
    out = empty(shape, like)
    return like.new_zeros(shape) if out is None else out.zero_()


def large(b: Any, *sample: int) -> bool:
    """True if a result of this sample shape may be worth huge pages.

    It is decided once, when the program is lowered.
    """
    return not b.grad and b.device_type == "cpu" and math.prod(sample) >= WORTHWHILE_PER_SAMPLE
