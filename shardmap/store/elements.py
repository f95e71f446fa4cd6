"""Layout of tensors' elements in files, and their checksums."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

_NUMPY: dict[torch.dtype, str] = {
    torch.bool: "bool",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
    torch.uint64: "uint64",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}
_BITS: dict[torch.dtype, torch.dtype] = {
    torch.bfloat16: torch.uint16,
    torch.complex32: torch.uint32,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
}
"""For dtypes that numpy lacks: the unsigned integers that hold the same bits."""

_NAMES = {str(t).removeprefix("torch."): t for t in (*_NUMPY, *_BITS)}
_FROM_NUMPY = {np.dtype(name): t for t, name in _NUMPY.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as `"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype | None:
    """The dtype of this name, or None if results cannot have it."""
    return _NAMES.get(name)


def storable(dtype: torch.dtype) -> bool:
    """True if files can hold this dtype.

    That is so for all but quantized ones and those of fewer than eight bits.
    """
    return dtype in _NUMPY or dtype in _BITS


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself if numpy has it, otherwise the integers of the same bits."""
    return _BITS.get(dtype, dtype)


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The numpy dtype of arrays that hold elements of `dtype`."""
    return np.dtype(_NUMPY[bits_of(dtype)])


def torch_dtype(dtype: np.dtype) -> torch.dtype | None:
    """The torch dtype for a numpy dtype in any byte order, or None.

    Extension types that jax and ml_dtypes register with numpy (`bfloat16`, `float8_e4m3fn`) are
    known by their names.
    """
    known = _FROM_NUMPY.get(dtype.newbyteorder("="))
    return known if known is not None else dtype_named(dtype.name)


def as_numpy(t: torch.Tensor) -> np.ndarray:
    """The tensor's elements as an array, without a copy if it is contiguous.

    They are the bits if numpy lacks the dtype.
    """
    dense = t.detach().resolve_conj().resolve_neg().contiguous()
    return dense.view(bits_of(dense.dtype)).numpy()


def as_tensor(a: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Convert an array to a tensor of `dtype`.

    Memory is shared if it is writable, aligned, and in the machine's byte order.

    Args:
        a: Of `numpy_dtype(dtype)`, in any byte order, or of an extension type with the name of
            `dtype`.
        dtype: Of the result.
    """
    native = numpy_dtype(dtype)
    if torch_dtype(a.dtype) is dtype and a.dtype.newbyteorder("=") != native:
        a = np.ascontiguousarray(a).view(native)  # an extension type holds the same bits
    a = np.asarray(a, dtype=native)
    # Torch has no negative strides, and crashes on complex128 that numpy aligned to 8 bytes.
    if (
        not a.flags.writeable
        or any(s < 0 for s in a.strides)
        or a.__array_interface__["data"][0] % native.itemsize
    ):
        a = a.copy()
    return torch.from_numpy(a).view(dtype)


def raw(t: torch.Tensor) -> memoryview:
    """The tensor's bytes, row by row, without a copy if it is contiguous."""
    return as_numpy(t).reshape(-1).view(np.uint8).data


_Hash = Callable[[memoryview], Any]
_HASHES: dict[str, _Hash] = {
    "sha256": hashlib.sha256,
    "blake2b": functools.partial(hashlib.blake2b, digest_size=16),
}


@functools.cache
def fastest_hash() -> str:
    """The faster of the two collision-safe hashes on this processor.

    It is SHA-256 if the processor has instructions for it (2.0 GiB/s against blake2b's 1.4 on an
    EPYC), otherwise blake2b (about 1 GiB/s against 0.4). A checksum carries the name of its hash,
    so workers on different processors may differ.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().replace("\n", " ").split(" ")
    except OSError:
        flags = []
    accelerated = (
        "sha_ni" in flags
        or "sha2" in flags
        or (platform.system(), platform.machine()) == ("Darwin", "arm64")
    )
    return "sha256" if accelerated else "blake2b"


def checksum(t: torch.Tensor, name: str | None = None) -> str:
    """Hash a tensor's raw bytes to 128 bits, for example `"sha256:1f0c..."`."""
    name = name or fastest_hash()
    return f"{name}:{_HASHES[name](raw(t)).hexdigest()[:32]}"


def checksums(tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """The checksum of each tensor."""
    return tuple(checksum(t) for t in tensors)


def agrees(t: torch.Tensor, expected: str) -> bool:
    """True if a tensor has the checksum; False if its hash function is unknown here."""
    name = expected.partition(":")[0]
    return name in _HASHES and checksum(t, name) == expected
