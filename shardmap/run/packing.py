"""Pack tensors for other processes: plain bytes with their strides beside them.

Pickling a torch tensor would send its whole storage, copied twice, where numpy's buffers go to
shared memory as they are and are read there without a copy.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import numpy as np
import torch

from shardmap.program.schema import span

_ALIGNMENT = 64
"""Bytes: torch's allocator and Ray's object store both align to this."""


class Packed(NamedTuple):
    """A packed tensor: its distinct elements and their layout in memory."""

    data: np.ndarray | None
    """The elements as bytes, row by row; None for a tensor on the meta device, which has none."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Strides in elements; recorded views depend on them. Dimensions of stride 0 are sent once."""
    dtype: torch.dtype
    misalignment: int
    """Bytes from the last multiple of 64 to the first element on the CPU. Kernels add up in another
    order where it differs, so that without it a chunk would differ in the last bits from the same
    chunk computed in the driver's process."""


def _repeated(shape: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    return [d for d, (n, s) in enumerate(zip(shape, stride, strict=True)) if s == 0 and n > 1]


def pack(t: torch.Tensor) -> Packed:
    """Pack the elements of `t`, without the rest of its storage.

    Args:
        t: Any strided tensor, on any device. Bytes are shared where it is dense, so send them
            before `t` changes.
    """
    t = t.detach()
    shape, stride = tuple(t.shape), t.stride()
    if t.device.type == "meta":
        return Packed(None, shape, stride, t.dtype, 0)
    misalignment = t.data_ptr() % _ALIGNMENT if t.device.type == "cpu" else 0
    for d in _repeated(shape, stride):
        t = t.narrow(d, 0, 1)
    dense = t.cpu().resolve_conj().resolve_neg().contiguous()
    return Packed(
        dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy(),
        shape,
        stride,
        t.dtype,
        misalignment,
    )


def unpack(p: Packed, device: torch.device) -> torch.Tensor:
    """Unpack the tensor on `device`, with the strides that it was packed with.

    On the CPU a dense tensor shares the bytes of `p`, which must not be written to.
    """
    if p.data is None:
        return torch.empty_strided(p.shape, p.stride, dtype=p.dtype, device="meta")
    repeated = _repeated(p.shape, p.stride)
    kept = tuple(1 if d in repeated else n for d, n in enumerate(p.shape))
    t = _tensor_of(p.data)
    in_place = device.type == "cpu" and t.data_ptr() % _ALIGNMENT == p.misalignment
    t = t.view(p.dtype).view(kept)
    if t.numel() and not (in_place and t.stride() == p.stride):
        t = _empty(kept, p.stride, p.dtype, p.misalignment, device).copy_(t)
    return t.to(device).expand(p.shape)


def _empty(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    misalignment: int,
    device: torch.device,
) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    memory = torch.empty(span(shape, stride) + _ALIGNMENT // dtype.itemsize, dtype=dtype)
    return memory.as_strided(
        shape, stride, (misalignment - memory.data_ptr()) % _ALIGNMENT // dtype.itemsize
    )


def _tensor_of(data: np.ndarray) -> torch.Tensor:
    if not data.flags.writeable:
        _accept_read_only_memory()
    return torch.from_numpy(data)


@functools.cache
def _accept_read_only_memory() -> None:
    """Suppress torch's warning, once per process, about tensors in memory that is read-only.

    The memory is only read.
    """
    data = np.zeros(1, np.uint8)
    data.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(data)
