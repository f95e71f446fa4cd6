"""Store of one `.npy` file per output, which numpy maps into memory."""

from __future__ import annotations

import os
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch

from shardmap._threads import fork_safe_lock
from shardmap.store import elements
from shardmap.store.base import Store
from shardmap.store.header import Header
from shardmap.store.places import Place, local_only, replacing
from shardmap.store.sink import PlaceSink

_UNREADABLE = (ValueError, TypeError, OverflowError, SyntaxError, tokenize.TokenError)
"""Errors of numpy's header reader for text that is no header."""


_parsing = fork_safe_lock()
"""Held while numpy parses a header as python text, which threads of CPython 3.11 cannot do at once:
`ast` counts the depth of all of them together."""


@dataclass(frozen=True)
class MemmapSink(PlaceSink):
    """Write results to sparse files `<output>.npy` of their final size.

    `np.load(path, mmap_mode="r")` reads them. Dtypes that numpy lacks are stored as unsigned
    integers of the same bits (bfloat16 as uint16). A unit is written in its place, so it is
    complete only once it is committed.

    Args:
        folder: Folder of the files. Writers on several machines share files: a network file system
            must support that (Lustre, GPFS and NFS do); prefer ZarrSink if you are not sure.
        overwrite: True to replace a store that is there already. Anything else that is there is
            never replaced.
        attributes: Names and values that the store keeps with its header; anything that JSON can
            hold.
    """

    folder: str | os.PathLike[str]
    overwrite: bool = False
    attributes: Mapping[str, Any] | None = None

    @property
    def where(self) -> str:
        """The folder that the user gave."""
        return os.fspath(self.folder)

    def _store(self, url: str, header: Header) -> Store:
        return MemmapStore(url, header)

    def _lay_out(self, store: Store) -> None:
        assert isinstance(store, MemmapStore)
        header = store.header
        committed = max((receipt.stop for receipt in store.receipts().values()), default=0)
        for index, spec in enumerate(header.outputs):
            path = store._path(index)
            if os.path.exists(path):
                offset, length = store._offset(index), os.path.getsize(path)
                if length < offset + committed * spec.row_bytes:
                    raise store._damaged(f"{os.path.basename(path)} is cut short")
                if length < offset + header.samples * spec.row_bytes:
                    os.truncate(path, offset + header.samples * spec.row_bytes)
            elif committed and spec.row_bytes:
                raise store._damaged(f"{os.path.basename(path)} is gone")
            else:
                _allocate(path, (header.samples, *spec.shape), elements.numpy_dtype(spec.dtype))

    def _check(self, place: Place, header: Header) -> None:
        local_only(place, "MemmapSink")


class MemmapStore(Store):
    """Results in `.npy` files."""

    kind = "memmap"

    def _path(self, index: int) -> str:
        return os.path.join(self.url, f"{self._names[index]}.npy")

    def _write(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        # Written through the file, not the mapping: when a disk is full, a write to a mapping kills
        # the process (SIGBUS).
        start, _ = self.header.rows(unit)
        for index, t in enumerate(tensors):
            offset = self._offset(index) + start * self.header.outputs[index].row_bytes
            handle = os.open(self._path(index), os.O_WRONLY)
            try:
                _write_all(handle, elements.raw(t), offset)
                os.fsync(handle)
            finally:
                os.close(handle)

    def _read(self, index: int, start: int, stop: int) -> torch.Tensor:
        spec = self.header.outputs[index]
        path = self._path(index)
        offset = self._offset(index) + start * spec.row_bytes
        if os.path.getsize(path) < offset + (stop - start) * spec.row_bytes:
            raise self._damaged(f"{os.path.basename(path)} ends before row {stop}")
        out = torch.empty((stop - start, *spec.shape), dtype=spec.dtype)
        with open(path, "rb", buffering=0) as f:
            f.seek(offset)
            if _read_all(f, elements.raw(out)) < out.nbytes:
                raise self._damaged(f"{os.path.basename(path)} ends before row {stop}")
        return out

    def _offset(self, index: int) -> int:
        """Check the header of an output's file, and return the offset of its rows."""
        path, spec = self._path(index), self.header.outputs[index]
        name = os.path.basename(path)
        try:
            with open(path, "rb") as f:
                shape, fortran, dtype = read_npy_header(f)
                offset = f.tell()
        except FileNotFoundError:
            raise self._damaged(f"{name} is gone") from None
        except _UNREADABLE as error:
            raise self._damaged(f"{name} is no .npy file ({error})") from error
        if (
            shape != (self.header.samples, *spec.shape)
            or fortran
            or dtype != elements.numpy_dtype(spec.dtype)
        ):
            raise self._damaged(f"{name} has {dtype} {list(shape)}, not what this store declares")
        return offset

    def _files(self) -> list[str]:
        return [f"{name}.npy" for name in self._names]


def _allocate(path: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Make a sparse `.npy` file of zeros.

    `np.lib.format.open_memmap` refuses empty arrays, and leaves a partial file on failure.
    """
    with replacing(path) as temporary, open(temporary, "wb") as f:
        np.lib.format.write_array_header_1_0(
            f,
            {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape},
        )
        f.truncate(f.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)


def _write_all(handle: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(handle, data, at)  # at most 2 GiB at a time
        data, at = data[written:], at + written


def _read_all(f: IO[bytes], into: memoryview) -> int:
    """Fill `into` from a file, and return the number of bytes read."""
    done = 0
    while done < len(into):
        count = f.readinto(into[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def read_npy_header(f: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read a `.npy` file's shape, dtype, and True if it is in Fortran order.

    The file position is then at its elements.

    Raises:
        ValueError: It is no `.npy` file, or holds Python objects.
    """
    version = np.lib.format.read_magic(f)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version[0]}.{version[1]} of the format is unknown here")
    with _parsing:
        shape, fortran, dtype = readers[version](f)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    return shape, fortran, dtype
