"""Compute units of a store again, and compare; the store is only read."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardmap.errors import StoreError, StoreMismatchError
from shardmap.store import elements
from shardmap.store.base import Store
from shardmap.store.header import Header, Receipt, differences
from shardmap.store.opening import open_store
from shardmap.store.sink import Sink

ROUNDING = {1: 1, 2: 4, 4: 64}
"""Tolerance by bytes of a real number: units in the last place of an output's largest value in a
storage unit, by which numbers may differ that were summed in another order: other chunk sizes use
other kernels. Up to 6 in float32 for the runs in `configs`, in chunks of 1 to 100."""


@dataclass(frozen=True, slots=True)
class UnitComparison:
    """Comparison of one unit, computed again, with the stored one."""

    unit: int
    start: int
    stop: int
    """One past the last row."""
    exact: bool
    """True if all outputs are equal to the last bit."""
    agrees: bool
    """True if they are equal within rounding."""
    difference: float
    """The largest difference between two numbers; NaN if one of them is NaN or no number."""
    output: str
    """Name of the output with that difference."""

    def __str__(self) -> str:
        where = f"unit {self.unit} (rows {self.start} to {self.stop - 1})"
        return f"{where}: " + (
            "equal to the last bit"
            if self.exact
            else f"{self.output} differs by up to {self.difference:.3g}"
        )


def choose(store: Store, count: int, seed: int = 0, damaged: Sequence[int] = ()) -> list[int]:
    """A random sample of the committed units, in order.

    Args:
        store: The store of the units.
        count: Number of units to choose; all of them if there are fewer.
        seed: Seed of the choice.
        damaged: Units that cannot be compared.
    """
    there = sorted(set(store.receipts()) - set(damaged))
    return sorted(random.Random(seed).sample(there, min(count, len(there))))


@dataclass(frozen=True)
class Recompute(Sink):
    """Compare a random sample of a store's units with the results of the same call now.

    It is used as `vmap(fn, out=Recompute(url), resume=True)(*batch)`.

    The call returns a store whose `comparisons` hold the results. Function, captured tensors,
    samples and seed must be those of the call that was stored.

    Args:
        url: The store's folder or URL.
        units: Number of its committed units, or their numbers.
        seed: Seed of the choice.

    Example:
        >>> import tempfile, torch, shardmap
        >>> from shardmap.store import Recompute
        >>> x, folder = torch.ones(10, 3), tempfile.mkdtemp() + "/sines"
        >>> _ = shardmap.vmap(torch.sin, out=shardmap.MemmapSink(folder), chunk_size=4)(x)
        >>> again = shardmap.vmap(torch.sin, out=Recompute(folder, units=2), resume=True)
        >>> [c.exact for c in again(x).comparisons]
        [True, True]
    """

    url: str | os.PathLike[str]
    units: int | Sequence[int] = 3
    seed: int = 0

    @property
    def where(self) -> str:
        """The path or URL that the user gave."""
        return os.fspath(self.url)

    def create(self, header: Header, resume: bool = False) -> Store:
        """Make a store whose missing units are those that are compared.

        Args:
            header: Header of the present call.
            resume: Must be true: the batch is cut as it was when it was stored.

        Raises:
            StoreMismatchError: The call is another one; the message lists the differences.
            StoreError: There is no store.
        """
        stored = open_store(self.where)
        if not resume:
            raise StoreError(
                f"{stored.url}: pass resume=True with out=Recompute(...): units are compared as "
                "they were cut"
            )
        if differing := differences(stored.header, header):
            raise StoreMismatchError(
                f"{stored.url} cannot be compared, it holds another run: {'; '.join(differing)}. "
                "Make the call as it was made before"
            )
        chosen = (
            choose(stored, self.units, self.seed)
            if isinstance(self.units, int)
            else list(self.units)
        )
        return Recomputed(stored, chosen)


class Recomputed(Store, known=False):
    """A store that compares units written to it with the stored ones."""

    kind = "recomputed"

    def __init__(self, stored: Store, units: Sequence[int]):
        super().__init__(stored.url, stored.header)
        self.stored = stored
        self.comparisons: list[UnitComparison] = []
        self._left = sorted(units)

    def __reduce__(self) -> tuple:
        raise TypeError("units are compared in one process; `travels` says so")

    @property
    def travels(self) -> bool:
        """False: comparisons are kept in this process."""
        return False

    def missing(self) -> list[int]:
        """The units that are still to be compared."""
        return list(self._left)

    def write(self, unit: int, tensors: Sequence[torch.Tensor]) -> Receipt:
        """Compare a unit with the stored one.

        Args:
            unit: Number of the unit.
            tensors: As for `Store.write`.

        Raises:
            StoreDamagedError: The stored unit cannot be read.
        """
        start, stop = self.header.rows(unit)
        self._check(unit, stop - start, tensors)
        self.comparisons.append(_compare(self.stored, unit, tensors))
        return Receipt(unit, start, stop, 0, ("",) * len(tensors))

    def commit(self, receipt: Receipt) -> None:
        """Mark the unit as compared; the stored record is not changed."""
        self._left.remove(receipt.unit)

    def finish(self) -> None:
        """Sort the comparisons; nothing was written."""
        assert not self._left
        self.comparisons.sort(key=lambda c: c.unit)

    def _write(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        raise AssertionError("nothing is written")

    def _read(self, index: int, start: int, stop: int) -> torch.Tensor:
        return self.stored._read(index, start, stop)

    def _files(self) -> list[str]:
        return []


@dataclass(slots=True)
class _Worst:
    difference: float = 0.0
    output: str = ""
    exact: bool = True
    agrees: bool = True


def _compare(stored: Store, unit: int, tensors: Sequence[torch.Tensor]) -> UnitComparison:
    start, stop = stored.header.rows(unit)
    worst = _Worst()
    for index, (new, spec) in enumerate(zip(tensors, stored.header.outputs, strict=True)):
        old = stored.read(index, start, stop)
        if elements.raw(old) == elements.raw(new):
            continue
        difference, allowed = _difference(old, new)
        worst.exact = False
        worst.agrees &= difference <= allowed
        if not worst.output or not difference <= worst.difference:  # NaN is worse than any number
            worst.difference, worst.output = difference, spec.name
    return UnitComparison(
        unit, start, stop, worst.exact, worst.agrees, worst.difference, worst.output
    )


def _difference(old: torch.Tensor, new: torch.Tensor) -> tuple[float, float]:
    """The largest difference between two numbers, and the largest that rounding explains."""
    if not (old.is_floating_point() or old.is_complex()):
        return float(
            (new.to(torch.float64) - old.to(torch.float64)).abs().max()
        ), -1.0  # whole numbers are not rounded
    wide = torch.complex128 if old.is_complex() else torch.float64
    a, b = old.to(wide).flatten(), new.to(wide).flatten()
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    if not differ.any():
        return 0.0, 0.0  # signs of zero, or bits of NaN
    difference = float((a[differ] - b[differ]).abs().max())
    finite = a.abs()[a.isfinite()]
    if not len(finite):
        return difference, 0.0
    size = old.dtype.itemsize // (2 if old.is_complex() else 1)
    return difference, ROUNDING.get(size, ROUNDING[4]) * torch.finfo(old.dtype).eps * float(
        finite.max()
    )
