"""Columns that samples are read from in stores.

They are zarr arrays, safetensors files, and stores that shardmap wrote.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch

from shardmap._extras import require
from shardmap.errors import SourceError, StoreError
from shardmap.store import elements
from shardmap.store.base import Store
from shardmap.store.columns import Column, numpy_column_dtype
from shardmap.store.manifest import find_manifest
from shardmap.store.opening import open_store
from shardmap.store.places import place_of


class ZarrColumn(Column):
    """A zarr array, of any format that zarr reads."""

    def __init__(self, array: Any):
        what = f"the zarr array {array.store_path}"
        if not array.shape:
            raise SourceError(
                f"{what} is a single number: its first dimension has to be that of samples"
            )
        self.array, self.travels = array, _travels(array.store)
        held = numpy_column_dtype(array.dtype, what)
        named = elements.dtype_named(str(array.attrs.get("torch_dtype", "")))
        bits = (
            named is not None and elements.numpy_dtype(named) == array.dtype
        )  # as ZarrSink stores dtypes that numpy lacks
        self.dtype = named if named is not None and bits else held
        self.rows, self.shape = array.shape[0], tuple(array.shape[1:])

    def __reduce__(self) -> tuple:
        return ZarrColumn, (self.array,)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows; missing chunks read as the array's fill value, as in zarr."""
        if start == stop or 0 in self.shape:
            return torch.empty((stop - start, *self.shape), dtype=self.dtype)
        try:
            return elements.as_tensor(self.array[start:stop], self.dtype)
        except Exception as error:  # codecs and clients raise errors of their own
            raise SourceError(
                f"{self.array.store_path}: rows {start} to {stop} cannot be read: {error}"
            ) from error


class SafetensorsColumn(Column):
    """One tensor by name, from one file or from several whose rows follow each other."""

    travels = True

    def __init__(
        self, files: Sequence[tuple[str, int]], key: str, shape: tuple[int, ...], dtype: torch.dtype
    ):
        self.files = tuple(files)
        """Paths of the files, and the number of rows in each."""
        self.key, self.shape, self.dtype = key, shape, dtype
        self.rows = sum(rows for _, rows in self.files)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows, copied from all files that hold them."""
        out, module, first = (
            torch.empty((stop - start, *self.shape), dtype=self.dtype),
            _safetensors(),
            0,
        )
        for path, rows in self.files:
            a, b = max(start, first), min(stop, first + rows)
            if a < b:
                try:
                    with module.safe_open(path, framework="pt") as f:
                        out[a - start : b - start] = f.get_slice(self.key)[a - first : b - first]
                except (OSError, module.SafetensorError) as error:
                    raise SourceError(
                        f"{path} cannot be read ({error}): it must be there, whole, on every "
                        "machine"
                    ) from error
            first += rows
        return out


class StoreColumn(Column):
    """An output of a store that shardmap wrote."""

    def __init__(self, store: Store, index: int):
        spec = store.header.outputs[index]
        self.store, self.index, self.travels = store, index, store.travels
        self.rows, self.shape, self.dtype = store.header.samples, spec.shape, spec.dtype

    def checksum(self) -> str:
        """Hash of the checksums with which the units were committed.

        The rows are not read, as a store may be very large.
        """
        digest = hashlib.blake2b(digest_size=16)
        for unit, receipt in sorted(self.store.receipts().items()):
            digest.update(f"{unit} {receipt.checksums[self.index]}\n".encode())
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows, all of which are committed."""
        return self.store.read(self.index, start, stop)


def from_store(store: Store) -> dict[str, Column]:
    """Make a column for each output.

    Raises:
        SourceError: Units are missing.
    """
    if missing := store.missing():
        raise SourceError(
            f"{store.url}: {len(missing)} of {store.header.units} units are missing: resume the "
            "run that writes them first"
        )
    return {spec.name: StoreColumn(store, i) for i, spec in enumerate(store.header.outputs)}


def from_zarr(node: Any) -> tuple[dict[str, Column], bool]:
    """Make the columns of a zarr group, by name in alphabetical order; of an array, itself.

    Also returns True if the names are the group's own.

    Args:
        node: A `zarr.Array` or `zarr.Group`.
    """
    zarr = _zarr()
    if isinstance(node, zarr.Array):
        return {"0": ZarrColumn(_absolute(node))}, False
    found: dict[str, Column] = {
        name: ZarrColumn(_absolute(array)) for name, array in sorted(node.arrays())
    }
    if not found:
        raise SourceError(f"the zarr group {node.store_path} has no arrays")
    return found, True


def open_zarr(url: str) -> Any:
    """The zarr array or group at a URL or path.

    Raises:
        SourceError: There is no zarr array or group.
    """
    zarr = _zarr()
    try:
        return zarr.open(url, mode="r")
    except Exception as error:
        raise SourceError(
            f"{url} is no zarr array or group that can be opened: {type(error).__name__}: {error}"
        ) from error


def is_zarr(node: Any) -> bool:
    """True if `node` is an array or group of zarr, which is not imported for this."""
    return type(node).__module__.partition(".")[0] == "zarr" and type(node).__name__ in (
        "Array",
        "Group",
    )


def from_safetensors(paths: Sequence[str]) -> dict[str, Column]:
    """Make a column for each tensor by name.

    The rows of several files follow each other in the order of the files.

    Raises:
        SourceError: A file cannot be read, or the files do not have the same tensors.
    """
    module = _safetensors()
    columns: dict[str, SafetensorsColumn] = {}
    for number, path in enumerate(map(os.path.abspath, paths)):
        try:
            with module.safe_open(path, framework="pt") as f:
                found = {}
                for key in f.keys():
                    shape = tuple(f.get_slice(key).get_shape())
                    if not shape:
                        raise SourceError(
                            f"{path}: {key} is a single number: its first dimension has to be that "
                            "of samples"
                        )
                    found[key] = SafetensorsColumn(
                        [(path, shape[0])], key, shape[1:], f.get_slice(key)[0:0].dtype
                    )
        except (OSError, module.SafetensorError) as error:
            raise SourceError(f"{path} is no safetensors file that can be read: {error}") from error
        if number == 0:
            columns = found
            continue
        for key in sorted(columns.keys() | found.keys()):
            a, b = columns.get(key), found.get(key)
            if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
                raise SourceError(
                    f"{path} does not continue {paths[0]}: {key} is in one only, or has another "
                    "shape or dtype"
                )
            columns[key] = SafetensorsColumn([*a.files, *b.files], key, a.shape, a.dtype)
    if not columns:
        raise SourceError(f"{', '.join(paths)}: no tensors are in there")
    return dict(columns)


def _absolute(array: Any) -> Any:
    """The array with an absolute path, so that it is found from any working directory."""
    storage = _zarr().storage
    if isinstance(array.store, storage.LocalStore) and not array.store.root.is_absolute():
        root = storage.LocalStore(array.store.root.absolute(), read_only=True)
        return _zarr().open_array(root, path=array.path, mode="r")
    return array


def _travels(store: Any) -> bool:
    storage = _zarr().storage
    if isinstance(store, storage.FsspecStore):
        files = getattr(store.fs, "sync_fs", store.fs)
        return "memory" not in (
            (files.protocol,) if isinstance(files.protocol, str) else files.protocol
        )
    return isinstance(store, storage.LocalStore)


def _zarr() -> Any:
    return require("zarr", extra="run", purpose="to read zarr arrays")


def _safetensors() -> Any:
    return require("safetensors", extra="run", purpose="to read safetensors files")


def store_at(url: str) -> Store | None:
    """The store at a place, or None if there is none."""
    try:
        place = place_of(url)
        return open_store(url) if find_manifest(place) is not None else None
    except StoreError as error:
        raise SourceError(str(error)) from error
