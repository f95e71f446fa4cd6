"""Columns that samples are read from, in memory or in a `.npy` file.

Rows are read by number, without loading the rest.
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from shardmap.errors import SourceError
from shardmap.store import elements
from shardmap.store.memmap import read_npy_header


class Column(ABC):
    """Rows of one shape and dtype. Cheap to pickle where `travels` is true."""

    rows: int
    shape: tuple[int, ...]
    """Shape of one row."""
    dtype: torch.dtype
    travels: bool
    """True if other processes can read the rows by themselves; otherwise rows are sent."""

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read existing rows, `[stop - start, *shape]`.

        They must not be written to: they may share memory with the data.
        """

    def rows_between(self, start: int, stop: int) -> torch.Tensor:
        """Read rows, perhaps none, as a dense tensor: all rows have the same layout in memory."""
        if start == stop:
            return torch.empty((0, *self.shape), dtype=self.dtype)
        return self.read(start, stop).contiguous()

    def checksum(self) -> str | None:
        """A hash of all rows that is known without reading them; None if there is none."""
        return None

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rows} rows of {self.dtype} {list(self.shape)})"


class TensorColumn(Column):
    """A tensor, on any device; rows are views of it."""

    travels = False

    def __init__(self, t: torch.Tensor, what: str):
        if t.layout is not torch.strided or not elements.storable(t.dtype):
            raise SourceError(
                f"{what} is a tensor of {t.dtype}, {t.layout}: give a dense one of a plain dtype"
            )
        if t.dim() == 0:
            raise SourceError(
                f"{what} is a single number: its first dimension has to be that of samples"
            )
        self.tensor = t.detach()
        self.rows, self.shape, self.dtype = t.shape[0], tuple(t.shape[1:]), t.dtype

    def __reduce__(self) -> tuple:
        t = self.tensor
        whole = t.untyped_storage().nbytes() == t.nbytes
        return TensorColumn, (
            t if whole else t.clone(),
            "",
        )  # a view would be pickled with all of its base

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows as a view."""
        return self.tensor[start:stop]


class ArrayColumn(Column):
    """A numpy array in memory."""

    travels = False

    def __init__(self, a: np.ndarray, what: str):
        self.dtype = numpy_column_dtype(a.dtype, what)
        if a.ndim == 0:
            raise SourceError(
                f"{what} is a single number: its first dimension has to be that of samples"
            )
        self.array = np.asarray(a)
        self.rows, self.shape = a.shape[0], tuple(a.shape[1:])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows, as a view if torch supports it."""
        return elements.as_tensor(self.array[start:stop], self.dtype)


class MappedColumn(Column):
    """An array in a file, mapped into memory by each process that reads it."""

    travels = True

    def __init__(
        self,
        path: str,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        dtype: np.dtype,
        stored: torch.dtype,
    ):
        self.path, self.offset, self.strides, self.layout, self.dtype = (
            path,
            offset,
            strides,
            dtype,
            stored,
        )
        self.rows, self.shape = shape[0], tuple(shape[1:])
        self._array: np.ndarray | None = None

    def __reduce__(self) -> tuple:
        return MappedColumn, (
            self.path,
            (self.rows, *self.shape),
            self.strides,
            self.offset,
            self.layout,
            self.dtype,
        )

    @property
    def array(self) -> np.ndarray:
        """The file's array, mapped on the first access.

        Raises:
            SourceError: The file is missing on this machine, or too short.
        """
        if self._array is None:
            shape = (self.rows, *self.shape)
            if not self.rows or 0 in self.shape:
                self._array = np.empty(shape, self.layout)
            else:
                try:
                    with open(self.path, "rb") as f:
                        memory = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
                    self._array = np.ndarray(shape, self.layout, memory, self.offset, self.strides)
                except (OSError, ValueError, TypeError) as error:
                    raise SourceError(
                        f"{self.path} cannot be read ({error}): it must be there, whole, on every "
                        "machine"
                    ) from error
        return self._array

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows as a copy."""
        return elements.as_tensor(np.array(self.array[start:stop]), self.dtype)


def numpy_column_dtype(dtype: np.dtype, what: str) -> torch.dtype:
    """The torch dtype for a column's numpy dtype.

    Raises:
        SourceError: Torch has no such dtype.
    """
    found = elements.torch_dtype(dtype)
    if found is None:
        why = "Python objects are never loaded" if dtype.hasobject else "torch has no such dtype"
        raise SourceError(
            f"{what} has dtype {dtype}, of which no tensor can be made ({why}): convert it first"
        )
    return found


def from_array(a: np.ndarray, what: str) -> Column:
    """Make the column of an array.

    A memory-mapped array is mapped again by each process instead of being sent.
    """
    if not isinstance(a, np.memmap) or not a.ndim or not a.size:
        return ArrayColumn(a, what)
    memory, filename = getattr(a, "_mmap", None), a.filename
    if (
        memory is None or filename is None or a.mode == "c"
    ):  # copy on write: writes are visible in this process only
        return ArrayColumn(a, what)
    dtype = numpy_column_dtype(a.dtype, what)
    a.flush()
    # A slice keeps the offset of its base, so that its position in the file is known from
    # its address only.
    begin = a.offset - a.offset % mmap.ALLOCATIONGRANULARITY
    mapped: Any = np.frombuffer(memory, np.uint8)
    offset = begin + a.__array_interface__["data"][0] - mapped.__array_interface__["data"][0]
    return MappedColumn(os.path.abspath(filename), a.shape, a.strides, offset, a.dtype, dtype)


def from_npy(path: str) -> Column:
    """Make the column of a `.npy` file.

    Raises:
        SourceError: It is no such file, is cut short, or holds data that no tensor can.
    """
    try:
        with open(path, "rb") as f:
            shape, fortran, dtype = read_npy_header(f)
            offset, length = f.tell(), os.fstat(f.fileno()).st_size
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is no .npy file that can be read: {error}") from error
    stored = numpy_column_dtype(dtype, path)
    if not shape:
        raise SourceError(
            f"{path} is a single number: its first dimension has to be that of samples"
        )
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if length < offset + size:
        raise SourceError(
            f"{path} is cut short: it has {length} bytes of {offset + size}; copy it again"
        )
    strides = (
        np.empty((0,), dtype).strides if not size else _strides(shape, dtype.itemsize, fortran)
    )
    return MappedColumn(os.path.abspath(path), shape, strides, offset, dtype, stored)


def _strides(shape: tuple[int, ...], itemsize: int, fortran: bool) -> tuple[int, ...]:
    order = range(len(shape)) if fortran else reversed(range(len(shape)))
    strides, step = [0] * len(shape), itemsize
    for d in order:
        strides[d], step = step, step * shape[d]
    return tuple(strides)
