"""Sources that samples are read from, by workers if possible."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils.data import IterableDataset, TensorDataset

from shardmap.errors import SourceError
from shardmap.store import datasets, elements, stored
from shardmap.store.base import Store
from shardmap.store.columns import Column, TensorColumn, from_array, from_npy
from shardmap.store.header import OutputSpec
from shardmap.store.places import LocalPlace, place_of

_BLOCK_BYTES = 16 << 20
"""Bytes that are read at a time for a digest."""


class Source(ABC):
    """Samples as columns with one row each.

    It can be pickled, cheaply if `travels` is true.
    """

    specs: tuple[OutputSpec, ...]
    """Name, shape and dtype of a row of each column."""
    _digest: str | None = None

    @property
    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """Arguments of a mapped function, one per column: `shardmap.vmap(fn)(*source.columns)`."""

    def __getitem__(self, name: str) -> Column:
        """The column of that name: `shardmap.vmap(fn)(source["image"], source["label"])`.

        Raises:
            SourceError: There is no such column.
        """
        names = [spec.name for spec in self.specs]
        if name not in names:
            raise SourceError(
                f"there is no column {name!r}; there are {', '.join(map(repr, names))}"
            )
        return self.columns[names.index(name)]

    def __iter__(self) -> NoReturn:
        """Refuse to be read sample by sample.

        Raises:
            SourceError: Always; python would ask for the columns 0, 1 and so on.
        """
        raise SourceError(
            "a source has no loop over its samples; map over source.columns, or over one of them, "
            f"source[{self.specs[0].name!r}], or read a store by store.read(output, start, stop)"
        )

    @property
    @abstractmethod
    def travels(self) -> bool:
        """True if workers can read the samples by themselves; otherwise rows are sent.

        Files must exist at the same path on the workers.
        """

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def _read(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """Read rows of each column, at least one."""

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """Read rows of each column.

        Args:
            start: The first row.
            stop: One past the last.

        Returns:
            One tensor per column, `[stop - start, *shape]`. They must not be written to: they may
            share memory with the data.

        Raises:
            SourceError: Rows are out of range, or cannot be read.
        """
        if not 0 <= start <= stop <= len(self):
            raise SourceError(f"rows {start} to {stop} are out of range: there are {len(self)}")
        if start == stop:
            return tuple(torch.empty((0, *spec.shape), dtype=spec.dtype) for spec in self.specs)
        return self._read(start, stop)

    def digest(self) -> str:
        """Hash of all rows, their shapes and dtypes: equal for equal data, whatever holds it.

        It reads all rows once.

        blake2b on every machine, because it identifies runs, also when another machine
        resumes them.
        """
        if self._digest is None:
            hashes = [hashlib.blake2b(digest_size=16) for _ in self.specs]
            step = max(1, _BLOCK_BYTES // max(1, sum(spec.row_bytes for spec in self.specs)))
            for start in range(0, len(self), step):
                for column, one in zip(
                    self.read(start, min(start + step, len(self))), hashes, strict=True
                ):
                    one.update(elements.raw(column.cpu()))
            whole = hashlib.blake2b(digest_size=16)
            for spec, one in zip(self.specs, hashes, strict=True):
                whole.update(
                    f"{elements.dtype_name(spec.dtype)} {len(self)} {list(spec.shape)} "
                    f"{one.hexdigest()}\n".encode()
                )
            self._digest = whole.hexdigest()
        return self._digest

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows of {', '.join(map(str, self.specs))})"


class Columns(Source):
    """Columns that are read independently of each other."""

    def __init__(self, columns: Mapping[str, Column]):
        self._columns = tuple(columns.values())
        self.specs = tuple(OutputSpec(name, c.shape, c.dtype) for name, c in columns.items())
        lengths = {name: c.rows for name, c in columns.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name}: {rows}" for name, rows in lengths.items())
            raise SourceError(
                f"columns have different numbers of rows ({told}): select those that belong "
                "together with names=, or cut them"
            )

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns, which are read independently of each other."""
        return self._columns

    @property
    def travels(self) -> bool:
        """True if each column can be read by others."""
        return all(column.travels for column in self._columns)

    def __len__(self) -> int:
        return self._columns[0].rows

    def _read(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        return tuple(column.read(start, stop) for column in self._columns)


class DatasetSource(Source):
    """A map-style dataset, read in order, collated by `torch.utils.data.default_collate`."""

    def __init__(self, dataset: Any, names: Sequence[str] | None):
        self.dataset, self._what = dataset, f"the dataset {type(dataset).__name__}"
        self._travels: bool | None = None
        self._block: tuple[int, int] | None = None
        self._waiting: dict[int, torch.Tensor] = {}
        """Rows of the items read last that other columns have not requested yet."""
        if not len(dataset):
            raise SourceError(
                f"{self._what} is empty, so that nothing tells the shapes of its items: give "
                "tensors of no rows instead"
            )
        first, named = datasets.fetch(dataset, 0, 1, self._what)
        self._keys = _chosen(tuple(first), named, names)
        """Keys of the items, by column."""
        shown = self._keys if names is None else tuple(names)
        self.specs = tuple(
            OutputSpec(n, tuple(first[k].shape[1:]), first[k].dtype)
            for n, k in zip(shown, self._keys, strict=True)
        )

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns, which share the read items: an item is fetched once for all columns."""
        return tuple(ItemColumn(self, i) for i in range(len(self.specs)))

    @property
    def travels(self) -> bool:
        """True if workers can import its class and its pickle is small."""
        if self._travels is None:
            self._travels = datasets.importable(self.dataset)
        return self._travels

    def __len__(self) -> int:
        return len(self.dataset)

    def part(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Read one column's rows; those of the others are kept for their requests."""
        if self._block != (start, stop) or index not in self._waiting:
            self._waiting = dict(enumerate(self.read(start, stop)))
            self._block = (start, stop)
        return self._waiting.pop(index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_block": None, "_waiting": {}}

    def _read(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        batch, _ = datasets.fetch(self.dataset, start, stop, self._what)
        out = tuple(batch[key] for key in self._keys)
        for t, spec in zip(out, self.specs, strict=True):
            if (tuple(t.shape[1:]), t.dtype) != (spec.shape, spec.dtype):
                raise SourceError(
                    f"{self._what}: items {start} to {stop - 1} are {t.dtype} {list(t.shape[1:])}, "
                    f"the first is {spec}"
                )
        return out


class ItemColumn(Column):
    """One part of a dataset's items."""

    def __init__(self, dataset: DatasetSource, index: int):
        spec = dataset.specs[index]
        self.dataset, self.index = dataset, index
        self.rows, self.shape, self.dtype = len(dataset), spec.shape, spec.dtype

    @property
    def travels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  asked for late: finding out pickles the dataset
        """True if workers can read the dataset by themselves."""
        return self.dataset.travels

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows; the items are kept until each column has read its part."""
        return self.dataset.part(self.index, start, stop)


def source(obj: Any, *, names: Sequence[str] | None = None) -> Source:
    """Make columns that can be read row by row from any holder of samples.

    Args:
        obj: A tensor or array (a column whose first dimension is that of samples); a tuple, list or
            dict of them, of `.npy` paths or of zarr arrays; the path of a `.npy` or `.safetensors`
            file, or a list of `.safetensors` files whose rows follow each other; the path or URL of
            a zarr array, a zarr group, or a store that shardmap wrote; an open one of these; a
            map-style `torch.utils.data.Dataset`, whose items are tensors, numbers, or a tuple or
            dict of them.
        names: The columns to take, in order, if they have names (dict, zarr group,
            safetensors, store, dataset of dicts); otherwise their names.

    Returns:
        The source. `np.memmap` arrays and files are mapped by each process that reads them; no
        pickle is ever loaded from data.

    Raises:
        SourceError: The kind is unknown, a path does not exist, columns are of unequal length, or
            of a dtype that tensors cannot have.

    Examples:
        >>> import torch, shardmap
        >>> pairs = shardmap.source({"x": torch.arange(6.).reshape(3, 2), "y": torch.ones(3)})
        >>> len(pairs), pairs.read(1, 3)
        (3, (tensor([[2., 3.],
                [4., 5.]]), tensor([1., 1.])))

        Its columns are arguments of mapped functions, read as they are needed, by the workers of a
        cluster themselves:

        >>> shardmap.vmap(lambda x, y: x.sum() * y)(*pairs.columns)
        tensor([1., 5., 9.])
    """
    if isinstance(obj, Source):
        return obj
    if isinstance(obj, TensorDataset):
        obj = obj.tensors
    if isinstance(obj, IterableDataset):
        raise SourceError(
            f"{type(obj).__name__} can only be read from its beginning: a map-style dataset is "
            "needed, with len() and items by number"
        )
    found = _columns(obj)
    if found is None:
        if not (hasattr(obj, "__getitem__") and hasattr(obj, "__len__")) or isinstance(
            obj, str | bytes | os.PathLike | Mapping | Sequence
        ):
            raise SourceError(
                f"samples cannot be read from {_described(obj)}; see shardmap.source for what can "
                "be given"
            )
        return DatasetSource(obj, names)
    columns, named = found
    keys = _chosen(tuple(columns), named, names)
    return Columns(dict(zip(names or keys, (columns[key] for key in keys), strict=True)))


def _columns(obj: Any) -> tuple[dict[str, Column], bool] | None:
    """Columns by name, and True if the names are the data's own; None for a possible dataset."""
    if isinstance(obj, Store):
        return stored.from_store(obj), True
    if stored.is_zarr(obj):
        return stored.from_zarr(obj)
    if isinstance(obj, str | os.PathLike):
        return _at_path(os.fspath(obj))
    if isinstance(obj, torch.Tensor | np.ndarray | Column):
        return {"0": _one(obj, "what was given")}, False
    if isinstance(obj, Mapping) or (isinstance(obj, tuple | list) and obj):
        if isinstance(obj, tuple | list) and all(
            isinstance(p, str | os.PathLike) and os.fspath(p).endswith(".safetensors") for p in obj
        ):
            return stored.from_safetensors([_existing(os.fspath(p)) for p in obj]), True
        pairs = obj.items() if isinstance(obj, Mapping) else enumerate(obj)
        columns = {str(key): _one(value, f"column {key!r}") for key, value in pairs}
        return (columns, isinstance(obj, Mapping)) if columns else None
    return None


def _one(obj: Any, what: str) -> Column:
    """Make one column of a tuple, list or dict."""
    if isinstance(obj, Column):
        return obj
    if isinstance(obj, torch.Tensor):
        return TensorColumn(obj, what)
    if isinstance(obj, np.ndarray):
        return from_array(obj, what)
    if isinstance(obj, str | os.PathLike) or stored.is_zarr(obj):
        found = _columns(obj)
        if found is not None and len(found[0]) == 1:
            return next(iter(found[0].values()))
        raise SourceError(f"{what} has several columns: give it alone, and select with names=")
    raise SourceError(
        f"{what} is {_described(obj)}, where a tensor, an array, a `.npy` path or a zarr array is "
        "needed"
    )


def _at_path(text: str) -> tuple[dict[str, Column], bool]:
    if text.endswith((".npy", ".safetensors")):
        path = _existing(text)
        return (
            ({"0": from_npy(path)}, False)
            if text.endswith(".npy")
            else (stored.from_safetensors([path]), True)
        )
    store = stored.store_at(text)
    if store is not None:
        return stored.from_store(store), True
    place = place_of(text)
    if isinstance(place, LocalPlace):
        path = _existing(text)
        if not any(place.exists(name) for name in ("zarr.json", ".zarray", ".zgroup")):
            raise SourceError(
                f"{path} is nothing that samples can be read from: neither a `.npy` or "
                "`.safetensors` file, nor a zarr array or group, nor "
                "a store of shardmap (load other files yourself, and give the tensors or arrays)"
            )
    return stored.from_zarr(stored.open_zarr(place.url))


def _existing(text: str) -> str:
    place = place_of(text)
    if not isinstance(place, LocalPlace):
        raise SourceError(
            f"{text}: files of this kind are read from folders only: mount the place, or use zarr"
        )
    if not place.exists(""):
        raise SourceError(
            f"{place.url} is not there: check the path, and that it is mounted on this machine"
        )
    return place.url


def _chosen(keys: tuple[str, ...], named: bool, names: Sequence[str] | None) -> tuple[str, ...]:
    """The columns that `names` selects, or all of them if `names` renames them."""
    if names is None:
        return keys
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise SourceError(f"names={names!r}: a list of different names is needed, of at least one")
    if named:
        if absent := [name for name in names if name not in keys]:
            raise SourceError(
                f"there is no column {', '.join(map(repr, absent))}; there are "
                f"{', '.join(map(repr, keys))}"
            )
        return tuple(names)
    if len(names) != len(keys):
        raise SourceError(f"names={names!r}: there are {len(keys)} columns, and each needs a name")
    return keys


def _described(obj: Any) -> str:
    return (
        f"{obj!r:.60}"
        if isinstance(obj, str | os.PathLike | int | float | bool) or obj is None
        else f"a {type(obj).__name__}"
    )
