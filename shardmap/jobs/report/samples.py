"""Read the outputs of a run within a bound on memory.

Small outputs are read whole; of large ones a spread of rows is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shardmap._extras import require
from shardmap.errors import SourceError, StoreError
from shardmap.planning.memory import MIB, format_bytes
from shardmap.store import Store, elements, open_store
from shardmap.store.columns import Column
from shardmap.store.stored import SafetensorsColumn, StoreColumn

READ_BYTES = 16 * MIB
"""Most bytes that are read of one output. Only one is in memory at a time, and its figures take
less than 256 MiB, beside one unit of a compressed store, which can only be decoded whole."""
STORE_RUNS, FILE_RUNS = 16, 64
"""Number of places where rows are read: each place in a store costs the decoding of a unit, one in
a file next to nothing."""


@dataclass(frozen=True)
class Output:
    """One output, before any of its rows is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    column: Column | Tensor
    """The column of its rows, or its value if it is a single number."""
    there: tuple[tuple[int, int], ...]
    """The rows that have been written, as ranges in order."""
    runs: int

    @property
    def bytes(self) -> int:
        """The size of all rows, written or not."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Sample:
    """The rows that were read of an output."""

    rows: Tensor
    """Rows `[rows, *shape of one]` on the CPU."""
    numbers: Sequence[int]
    """The numbers of these rows."""
    said: str
    """Text on the share of all rows; empty if these are all."""


@dataclass(frozen=True)
class Unread:
    """The reason why an output could not be read."""

    reason: str


def outputs_in(path: Path) -> list[Output]:
    """List the tensors of a safetensors file by name, in alphabetical order.

    Raises:
        SourceError: The file cannot be read.
    """
    module = require("safetensors", extra="run", purpose="to read outputs")
    found = []
    try:
        with module.safe_open(str(path), framework="pt") as f:
            for key in sorted(f.keys(), key=_by_number):
                shape = tuple(f.get_slice(key).get_shape())
                if shape:
                    dtype = f.get_slice(key)[0:0].dtype
                    column: Column | Tensor = SafetensorsColumn(
                        [(str(path), shape[0])], key, shape[1:], dtype
                    )
                else:
                    column = f.get_tensor(key)
                    dtype = column.dtype
                found.append(
                    Output(key, shape, dtype, column, ((0, shape[0] if shape else 1),), FILE_RUNS)
                )
    except (OSError, module.SafetensorError) as error:
        raise SourceError(
            f"{path.name} is no safetensors file that can be read: {error}"
        ) from error
    return found


def outputs_of(url: str) -> tuple[list[Output], Store]:
    """List the outputs of a store, with the rows that are committed.

    Raises:
        StoreError: There is no store, or it cannot be read.
    """
    store = open_store(url)
    header, there = store.header, list[tuple[int, int]]()
    for start, stop in map(header.rows, sorted(store.receipts())):
        if there and there[-1][1] == start:
            there[-1] = there[-1][0], stop
        else:
            there.append((start, stop))
    return [
        Output(
            spec.name,
            (header.samples, *spec.shape),
            spec.dtype,
            StoreColumn(store, index),
            tuple(there),
            STORE_RUNS,
        )
        for index, spec in enumerate(header.outputs)
    ], store


def read(output: Output) -> Sample | Unread:
    """Read rows of an output.

    All are read if they fit into `READ_BYTES`, otherwise runs of neighbours, evenly spaced from the
    first row to the last.
    """
    if isinstance(output.column, Tensor):
        return Sample(output.column.reshape(1), [0], "")
    rows, written = output.shape[0], sum(stop - start for start, stop in output.there)
    each = math.prod(output.shape[1:]) * output.dtype.itemsize
    most = written if not each else READ_BYTES // each
    if not most and written:
        return Unread(
            f"One row has {format_bytes(each)}, and no more than {format_bytes(READ_BYTES)} of an "
            "output are read for a preview."
        )
    places = _places(written, min(most, written), output.runs)
    try:
        # Rows are copied one by one into their places: pieces and their concatenation would take
        # twice the bound.
        numbers = [
            number for start, stop in places for number in _numbers(output.there, start, stop)
        ]
        into = torch.empty((len(numbers), *output.shape[1:]), dtype=output.dtype)
        at = 0
        for start, stop in _stretches(numbers):
            into[at : at + stop - start] = output.column.rows_between(start, stop)
            at += stop - start
    except (SourceError, StoreError) as error:
        return Unread(str(error))
    absent = "" if written == rows else f"{written:,} of {rows:,} rows are written"
    if len(numbers) == written:
        return Sample(into, numbers, absent)
    where = (
        f"{len(places)} evenly spaced runs of {places[0][1] - places[0][0]:,}"
        if len(places) < len(numbers)
        else "evenly spaced"
    )
    said = f"looked at {len(numbers):,} of {written:,} rows, {where}"
    return Sample(into, numbers, f"{absent}; {said}" if absent else said)


def blocks(rows: Tensor) -> Iterator[np.ndarray]:
    """The elements as real numbers in pieces of at most a million.

    Complex numbers become magnitudes, booleans 0 and 1.
    """
    flat = rows.reshape(-1)
    for start in range(0, len(flat), 1 << 20):
        yield real(flat[start : start + (1 << 20)])


def real(t: Tensor) -> np.ndarray:
    """Convert a tensor to an array of real numbers of a type that numpy computes with.

    Integers stay integers.
    """
    if t.dtype is torch.complex32:
        t = t.to(torch.complex64)
    if t.is_complex():
        return t.abs().numpy()
    if t.dtype is torch.bool:
        return t.to(torch.uint8).numpy()
    if elements.bits_of(t.dtype) is not t.dtype or t.dtype is torch.float16:
        return t.to(torch.float32).numpy()  # exact
    return elements.as_numpy(t)


def _by_number(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts `2` before `10`."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)
    ]


def _places(total: int, most: int, runs: int) -> list[tuple[int, int]]:
    """Ranges that hold at most `most` of `total` rows together."""
    if most >= total:
        return [(0, total)]
    runs = min(runs, most)
    length = most // runs
    last = total - length
    starts = [round(i * last / (runs - 1)) for i in range(runs)] if runs > 1 else [0]
    return [(start, start + length) for start in starts]


def _numbers(there: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[int]:
    """The numbers of the written rows from the `start`-th to the `stop`-th."""
    before = 0
    for first, end in there:
        a, b = max(start - before, 0), min(stop - before, end - first)
        yield from range(first + a, first + b)
        before += end - first


def _stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive rows joined into ranges."""
    out: list[tuple[int, int]] = []
    for number in numbers:
        if out and out[-1][1] == number:
            out[-1] = out[-1][0], number + 1
        else:
            out.append((number, number + 1))
    return out
