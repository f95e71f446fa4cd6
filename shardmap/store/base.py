"""The base of all stores.

A store holds results larger than memory, written unit by unit.

The driver creates a store from the user's sink and sends it to workers. A worker writes a unit and
returns a receipt; the driver commits it. Uncommitted units do not count, whatever files are
there, so that a run can be resumed wherever it stopped.
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import torch

from shardmap.errors import StoreDamagedError, StoreError
from shardmap.store import elements
from shardmap.store.header import Header, Receipt
from shardmap.store.manifest import Head, Manifest, find_manifest
from shardmap.store.places import Place, place_of

_SMALL_BYTES = 1 << 20
"""Bytes of a unit below which it is hashed in less time than it takes to start a thread."""

KINDS: dict[str, type[Store]] = {}
"""Store classes by their name in the manifest; each class with a name adds itself."""


class Store(ABC):
    """Rows of several outputs at one place, some of them committed.

    It is cheap to pickle: only the place and the header are sent. Any process may write units, each
    unit by one at a time; one process commits.
    """

    kind: ClassVar[str]
    """Name of the kind in the manifest."""

    def __init_subclass__(cls, known: bool = True) -> None:
        if known:
            assert cls.kind not in KINDS
            KINDS[cls.kind] = cls

    def __init__(self, url: str, header: Header):
        self.url = url
        self.header = header
        self._names = header.files
        """Names of the outputs that are safe in file names."""
        self._place: Place = place_of(url)
        self._manifest: Manifest | None = None

    def __reduce__(self) -> tuple:
        return type(self), (self.url, self.header)

    def __repr__(self) -> str:
        outputs = ", ".join(map(str, self.header.outputs))
        rows = f"{self.header.samples} rows of {outputs}, {self.header.unit} per unit"
        return f"{type(self).__name__}({self.url!r}: {rows})"

    @property
    def travels(self) -> bool:
        """True if other processes find the same store under its URL.

        That is so for all places but the memory of this process.
        """
        return self._place.travels

    # Methods for workers.

    def check_here(self) -> None:
        """Refuse to run in a process that does not see the store that the driver has made.

        Raises:
            StoreError: It is missing or another store: each machine would write to a disk of
                its own.
        """
        manifest = find_manifest(self._place)
        if manifest is None or manifest.head().header.identity != self.header.identity:
            raise StoreError(
                f"{self.url}: the store is not there on {platform.node()}: it must lie on a file "
                "system that all machines share, at the "
                "same path, or at a URL"
            )

    def write(self, unit: int, tensors: Sequence[torch.Tensor]) -> Receipt:
        """Write one unit: its files are replaced whole or stay as they were.

        A unit may be written again.

        Args:
            unit: Number of the unit.
            tensors: One per output, on the CPU, `[rows, *shape]` of the declared dtype. Contiguous
                ones are not copied.

        Returns:
            The receipt that the driver commits.

        Raises:
            StoreError: A tensor is not as declared, or the place cannot be written to.
        """
        start, stop = self.header.rows(unit)
        self._check(unit, stop - start, tensors)
        dense = [t.detach().resolve_conj().resolve_neg().contiguous() for t in tensors]
        size = sum(t.nbytes for t in dense)
        with self._place.explained(f"writing unit {unit}"):
            if size < _SMALL_BYTES:
                sums = elements.checksums(dense)
                self._write(unit, dense)
            else:  # neither hashing nor writing holds the interpreter's lock
                with ThreadPoolExecutor(1) as pool:
                    hashing = pool.submit(elements.checksums, dense)
                    self._write(unit, dense)
                    sums = hashing.result()
        return Receipt(unit, start, stop, size, sums)

    def _check(self, unit: int, rows: int, tensors: Sequence[torch.Tensor]) -> None:
        specs = self.header.outputs
        if len(tensors) != len(specs):
            raise StoreError(
                f"{self.url}: unit {unit} was given {len(tensors)} tensors for {len(specs)} outputs"
            )
        for t, spec in zip(tensors, specs, strict=True):
            if t.device.type != "cpu" or t.layout is not torch.strided:
                raise StoreError(
                    f"{self.url}: unit {unit}, output {spec.name}: a dense tensor on the CPU is "
                    f"needed, not {t.layout} on {t.device}"
                )
            if t.dtype != spec.dtype or tuple(t.shape) != (rows, *spec.shape):
                got, wanted = f"{t.dtype} {list(t.shape)}", f"{spec.dtype} {[rows, *spec.shape]}"
                raise StoreError(
                    f"{self.url}: unit {unit}, output {spec.name}: got {got}, declared was {wanted}"
                )

    # Methods for the driver.

    def missing(self) -> list[int]:
        """The units that are not committed, in order."""
        done = self._record.receipts()
        return [unit for unit in range(self.header.units) if unit not in done]

    def receipts(self) -> dict[int, Receipt]:
        """The units that are committed, by number."""
        return self._record.receipts()

    def commit(self, receipt: Receipt) -> None:
        """Record that a unit is done; called only in the driver's process.

        The record is on the disk when this returns.

        Raises:
            StoreError: The receipt is not one of this store, or the record cannot be written.
        """
        if (receipt.start, receipt.stop) != self.header.rows(receipt.unit) or len(
            receipt.checksums
        ) != len(self.header.outputs):
            raise StoreError(
                f"{self.url}: {receipt} is not of this store: its units have {self.header.unit} "
                "rows"
            )
        self._record.commit(receipt)

    def discard(self, unit: int) -> None:
        """Undo a commit: the unit is missing again, and resuming computes it.

        Raises:
            StoreError: There is no such unit.
        """
        self.header.rows(unit)
        if unit in self._record.receipts():
            self._record.withdraw(unit)

    def finish(self) -> None:
        """Close a run: remove the files that killed writers left behind.

        Raises:
            StoreError: Units are missing.
        """
        if missing := self.missing():
            raise StoreError(
                f"{self.url}: {len(missing)} of {self.header.units} units are missing "
                f"({_ranges(missing)}): resume the run to compute them"
            )
        self._tidy()

    # Methods for readers.

    def read(self, output: str | int, start: int, stop: int) -> torch.Tensor:
        """Read rows of one output.

        Args:
            output: The output's name or position.
            start: The first row.
            stop: One past the last.

        Returns:
            `[stop - start, *shape]`, in memory of its own.

        Raises:
            StoreError: Rows are out of range or not committed.
            StoreDamagedError: A file is gone, cut short, or cannot be decoded. Changed bytes are
                found by `corrupt` only.
        """
        index = self.header.index(output)
        spec = self.header.outputs[index]
        if not 0 <= start <= stop <= self.header.samples:
            raise StoreError(
                f"{self.url}: rows {start} to {stop} of {spec.name} are out of range: there are "
                f"{self.header.samples}"
            )
        self._check_committed(start, stop)
        if start == stop or not spec.row_bytes:
            return torch.empty((stop - start, *spec.shape), dtype=spec.dtype)
        with self._place.explained(f"reading rows {start} to {stop} of {spec.name}"):
            return self._read(index, start, stop)

    def read_unit(self, unit: int) -> list[torch.Tensor]:
        """Read all outputs of one unit; the errors are those of `read`."""
        start, stop = self.header.rows(unit)
        return [self.read(i, start, stop) for i in range(len(self.header.outputs))]

    def corrupt(self, units: Iterable[int] | None = None) -> list[int]:
        """Find the units whose data differ from what was written: changed, cut short or gone.

        Args:
            units: The committed units to read and hash; None for all of them.

        Returns:
            Their numbers, in order. `discard` them and resume to compute them again.

        Raises:
            StoreError: A unit is not committed, or the place cannot be reached.
        """
        receipts = self._record.receipts()
        checked = sorted(receipts) if units is None else sorted(set(units))
        if absent := [unit for unit in checked if unit not in receipts]:
            raise StoreError(
                f"{self.url}: units {_ranges(absent)} are not committed, so there is nothing to "
                "compare them with"
            )
        return [unit for unit in checked if not self._intact(receipts[unit])]

    def _intact(self, receipt: Receipt) -> bool:
        for index, expected in enumerate(receipt.checksums):
            try:
                rows = self.read(index, receipt.start, receipt.stop)
            except StoreDamagedError:
                return False
            if not elements.agrees(rows, expected):
                return False
        return True

    def _check_committed(self, start: int, stop: int) -> None:
        units = (
            range(start // self.header.unit, -(-stop // self.header.unit))
            if stop > start
            else range(0)
        )
        if all(unit in self._record.known() for unit in units):
            return
        done = self._record.receipts()
        if absent := [unit for unit in units if unit not in done]:
            rows = ", ".join(
                f"{a} to {b - 1}" for a, b in (self.header.rows(unit) for unit in absent[:8])
            )
            more = f" and {len(absent) - 8} more units" if len(absent) > 8 else ""
            raise StoreError(
                f"{self.url}: rows {rows}{more} are not committed: resume the run that writes them"
            )

    @property
    def _record(self) -> Manifest:
        if self._manifest is None:
            self._manifest = find_manifest(self._place)
        if self._manifest is None:
            raise StoreError(
                f"{self.url}: there is no manifest: the store was removed, or is not there on this "
                "machine"
            )
        return self._manifest

    def _damaged(self, what: str) -> StoreDamagedError:
        return StoreDamagedError(
            f"{self.url}: {what}; see corrupt() for what else is damaged, discard those units and "
            "resume the run"
        )

    # Methods that each kind implements.

    @abstractmethod
    def _write(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        """Write a unit's contiguous tensors, entirely or not at all, and sync them to the disk."""

    @abstractmethod
    def _read(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Read rows of an output that are committed, at least one row of at least one byte.

        Raises:
            StoreDamagedError: The rows' data are missing.
        """

    @abstractmethod
    def _files(self) -> list[str]:
        """The names of all data files and folders that the store has or may have."""

    def _tidy(self) -> None:  # noqa: B027 - most kinds need it, not all
        """Remove the files that killed writers left behind."""


def kind_of(head: Head, url: str) -> type[Store]:
    """The class of the store with this head.

    Raises:
        StoreError: This version of shardmap does not know its kind.
    """
    if head.kind not in KINDS:
        raise StoreError(
            f"{url}: a store of kind {head.kind!r} is unknown here ({', '.join(KINDS)}): upgrade "
            "shardmap"
        )
    return KINDS[head.kind]


def _ranges(units: Sequence[int]) -> str:
    """Format unit numbers: `[0, 1, 2, 5]` as `0-2, 5`, the first few."""
    out: list[tuple[int, int]] = []
    for unit in units:
        if out and out[-1][1] == unit - 1:
            out[-1] = out[-1][0], unit
        else:
            out.append((unit, unit))
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in out[:5])
    return text + (", ..." if len(out) > 5 else "")
