"""Store of one safetensors file per unit: exact dtypes, readable by model tools."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap._extras import require
from shardmap.errors import StoreError
from shardmap.store import elements
from shardmap.store.base import Store
from shardmap.store.header import Header
from shardmap.store.places import TEMPORARY, Place, local_only, replacing, sweep
from shardmap.store.sink import PlaceSink

_REAL = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
"""Real dtypes for complex ones, which are stored as pairs: the format has none, or one of them in
late versions."""
_BITS = {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu}
"""Dtypes stored as uint8: only late versions of the format have them."""


@dataclass(frozen=True)
class SafetensorsSink(PlaceSink):
    """Write results to files `unit-00000042.safetensors`, each with all outputs of one unit.

    Dtypes are exact. Complex numbers are stored as pairs of reals in a last dimension of 2; the
    files' metadata says so.

    Args:
        folder: Folder of the files. Several machines need a folder that all of them see.
        overwrite: True to replace a store that is there already. Anything else that is
            there is never replaced.
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
        return SafetensorsStore(url, header)

    def _check(self, place: Place, header: Header) -> None:
        require("safetensors", extra="run", purpose="to write safetensors files")
        local_only(place, "SafetensorsSink")
        if any(spec.name == "__metadata__" for spec in header.outputs):
            raise StoreError(
                "an output is named '__metadata__', which safetensors keeps to itself: give it "
                "another name"
            )

    def _lay_out(self, store: Store) -> None:
        pass  # units share no file


class SafetensorsStore(Store):
    """Results in safetensors files."""

    kind = "safetensors"

    def _path(self, unit: int) -> str:
        return os.path.join(self.url, _name(unit))

    def _write(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        save = require(
            "safetensors.torch", extra="run", purpose="to write safetensors files"
        ).save_file
        start, stop = self.header.rows(unit)
        specs = self.header.outputs
        dtypes = {spec.name: elements.dtype_name(spec.dtype) for spec in specs}
        metadata = {
            "unit": str(unit),
            "start": str(start),
            "stop": str(stop),
            "torch_dtypes": json.dumps(dtypes),
        }
        plain: dict[str, torch.Tensor] = {}
        storages: set[int] = set()
        for t, spec in zip(tensors, specs, strict=True):
            t = _as_stored(t)
            storage = t.untyped_storage().data_ptr()
            plain[spec.name] = (
                t.clone() if storage in storages and t.numel() else t
            )  # the library refuses tensors that share memory
            storages.add(storage)
        with replacing(self._path(unit)) as temporary:
            try:
                save(plain, temporary, metadata=metadata)
            except _error() as error:
                raise _as_os_error(error) from error

    def _read(self, index: int, start: int, stop: int) -> torch.Tensor:
        module = require("safetensors", extra="run", purpose="to read safetensors files")
        spec, size = self.header.outputs[index], self.header.unit
        out = torch.empty((stop - start, *spec.shape), dtype=spec.dtype)
        into = _as_stored(
            out
            # the library's slices lie in the file's mapping, where torch crashes on complex128 (8
            # bytes
            # from 16)
        )
        for unit in range(start // size, -(-stop // size)):
            first, last = self.header.rows(unit)
            a, b = max(start, first), min(stop, last)
            try:
                with module.safe_open(self._path(unit), framework="pt") as f:
                    rows = f.get_slice(spec.name)[a - first : b - first]
            except FileNotFoundError:
                raise self._damaged(f"{_name(unit)} is gone") from None
            except _error() as error:
                raise self._damaged(
                    f"{_name(unit)} is no whole safetensors file ({error})"
                ) from error
            if rows.dtype != into.dtype or rows.shape != (b - a, *into.shape[1:]):
                raise self._damaged(
                    f"{_name(unit)} has other rows of {spec.name} than were written"
                )
            into[a - start : b - start] = rows
        return out

    def _files(self) -> list[str]:
        return [
            name for name in self._place.names() if re.fullmatch(r"unit-\d+\.safetensors", name)
        ]

    def _tidy(self) -> None:
        sweep(self.url, TEMPORARY)


def _name(unit: int) -> str:
    return f"unit-{unit:08d}.safetensors"


def _as_stored(t: torch.Tensor) -> torch.Tensor:
    if t.dtype in _REAL:
        return torch.view_as_real(t)
    return t.view(torch.uint8) if t.dtype in _BITS else t


def _error() -> type[Exception]:
    return require("safetensors", extra="run", purpose="to read safetensors files").SafetensorError


def _as_os_error(error: Exception) -> Exception:
    """Convert the library's error, whose text has the system's error number, to an OSError.

    Such a text is `I/O error: No space left on device (os error 28)`.
    """
    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    if found is None:
        return StoreError(f"safetensors cannot write: {error}")
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number))
