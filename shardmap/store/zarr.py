"""Store in a zarr group.

It has an array per output and a chunk per unit, so that no two writers share a file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap._extras import require
from shardmap.store import elements
from shardmap.store.base import Store
from shardmap.store.header import Header
from shardmap.store.places import LocalPlace, Place, sweep, sync
from shardmap.store.sink import PlaceSink

_UNDECODABLE = (ValueError, TypeError, RuntimeError, LookupError, OverflowError)
"""Errors of zarr's codecs for a chunk that is cut short or damaged."""


@dataclass(frozen=True)
class ZarrSink(PlaceSink):
    """Write results to a zarr group (format 3) in a folder or at a URL.

    Each output is an array `[samples, *shape]` with chunks of one unit, which
    `zarr.open_group(url)` reads. Dtypes that numpy lacks are stored as unsigned integers of the
    same bits: bfloat16 as uint16, float8 as uint8; the attribute `torch_dtype` names them.

    Args:
        url: A folder, or a URL that fsspec opens, such as `s3://bucket/run`. Several machines need
            a folder that all of them see.
        overwrite: True to replace a store that is there already. Anything else that is
            there is never replaced.
        compressors: As for zarr's `create_array`; None stores plain bytes. Floats hardly get
            smaller and take long.
        attributes: Names and values that the store keeps with its header; anything that JSON can
            hold.
    """

    url: str | os.PathLike[str]
    overwrite: bool = False
    compressors: Any = None
    attributes: Mapping[str, Any] | None = None

    @property
    def where(self) -> str:
        """The path or URL that the user gave."""
        return os.fspath(self.url)

    def _store(self, url: str, header: Header) -> Store:
        return ZarrStore(url, header)

    def _check(self, place: Place, header: Header) -> None:
        _zarr()

    def _lay_out(self, store: Store) -> None:
        assert isinstance(store, ZarrStore)
        zarr = _zarr()
        header, committed = store.header, bool(store.receipts())
        group = zarr.open_group(
            store.url,
            mode="a",
            zarr_format=3,
            attributes={"shardmap": header.to_json()},
            use_consolidated=False,
        )
        rows = max(
            1, min(header.unit, header.samples)
        )  # zarr fills chunks up: one row in a unit of a thousand would take a thousand
        fresh = False
        for spec, name in zip(header.outputs, header.files, strict=True):
            if name in group:
                continue
            if committed and header.row_bytes:
                raise store._damaged(f"the array {name} is gone")
            group.create_array(
                name,
                shape=(header.samples, *spec.shape),
                chunks=(rows, *(max(1, n) for n in spec.shape)),
                dtype=elements.numpy_dtype(spec.dtype),
                fill_value=0,
                compressors=self.compressors,
                chunk_key_encoding={
                    "name": "default",
                    "separator": ".",
                },  # a file per unit in one folder, not a tree
                attributes={"output": spec.name, "torch_dtype": elements.dtype_name(spec.dtype)},
            )
            fresh = True
        if fresh:
            # zarr warns that this is no part of the format yet; readers that do not know it skip
            # it
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Without it zarr lists the folder, and warns readers of the manifest that it finds
                # there.
                zarr.consolidate_metadata(store.url)
            store._sync([f"{name}/zarr.json" for name in header.files] + ["zarr.json"])


class ZarrStore(Store):
    """Results in a zarr group."""

    kind = "zarr"

    def __init__(self, url: str, header: Header):
        super().__init__(url, header)
        self._opened: dict[str, list[Any]] = {}

    def _array(self, index: int, mode: str) -> Any:
        if mode not in self._opened:
            self._opened[mode] = self._arrays(mode)
        return self._opened[mode][index]

    def _arrays(self, mode: str) -> list[Any]:
        """Open all arrays, and compare each with the store's own header."""
        try:
            group = _zarr().open_group(self.url, mode=mode)
            # Otherwise zarr leaves out chunks that are equal to the fill value: it compares all
            # elements, treats -0.0 as 0.0 in complex numbers, and a lost chunk could not
            # be told from one of zeros.
            arrays = [group[n].with_config({"write_empty_chunks": True}) for n in self._names]
        except OSError:
            raise  # the system's own error says more
        except Exception as error:  # zarr lets errors of its parts through for damaged data
            raise self._damaged(
                f"zarr cannot open its arrays ({type(error).__name__}: {error})"
            ) from error
        rows = max(1, min(self.header.unit, self.header.samples))
        for array, name, spec in zip(arrays, self._names, self.header.outputs, strict=True):
            wanted = {
                "shape": (self.header.samples, *spec.shape),
                "chunks": (rows, *(max(1, n) for n in spec.shape)),
                "dtype": elements.numpy_dtype(spec.dtype),
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "torch_dtype": elements.dtype_name(spec.dtype),
            }
            found = {
                "shape": array.shape,
                "chunks": array.chunks,
                "dtype": array.dtype,
                "chunk_key_encoding": array.metadata.to_dict()["chunk_key_encoding"],
                "torch_dtype": array.attrs.get("torch_dtype"),
            }
            for field, value in wanted.items():
                if found[field] != value:
                    raise self._damaged(
                        f"{name}/zarr.json says {field} = {found[field]!r}, and the store's header "
                        f"{value!r}"
                    )
        return arrays

    def _key(self, index: int, unit: int) -> str:
        """The name of a chunk's file."""
        return f"{self._names[index]}/c." + ".".join(
            map(str, (unit, *(0 for _ in self.header.outputs[index].shape)))
        )

    def _write(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        start, stop = self.header.rows(unit)
        written = [i for i, t in enumerate(tensors) if t.numel()]
        for i in written:
            self._array(i, "r+")[start:stop] = elements.as_numpy(tensors[i])
        self._sync([self._key(i, unit) for i in written])

    def _read(self, index: int, start: int, stop: int) -> torch.Tensor:
        for unit in range(start // self.header.unit, -(-stop // self.header.unit)):
            key = self._key(index, unit)
            if not self._place.exists(key):  # zarr would return zeros
                raise self._damaged(f"the chunk {key} is gone")
        try:
            rows = self._array(index, "r")[start:stop]
        except _UNDECODABLE as error:
            raise self._damaged(
                f"rows {start} to {stop} of {self.header.outputs[index].name} cannot be decoded "
                f"({error})"
            ) from error
        return elements.as_tensor(rows, self.header.outputs[index].dtype)

    def _sync(self, names: Sequence[str]) -> None:
        if isinstance(self._place, LocalPlace):
            paths = [self._place.path(name) for name in names]
            for path in [*paths, *sorted({os.path.dirname(path) for path in paths})]:
                sync(path)

    def _files(self) -> list[str]:
        return [*self._names, "zarr.json"]

    def _tidy(self) -> None:
        if isinstance(self._place, LocalPlace):
            for name in self._names:
                sweep(self._place.path(name), ".partial")  # how zarr names files that it is writing


def _zarr() -> Any:
    return require("zarr", extra="run", purpose="to write and read zarr arrays")
