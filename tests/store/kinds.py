"""The kinds of stores and the rows that are written to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from shardmap.store import Header, MemmapSink, OutputSpec, SafetensorsSink, Sink, Store, ZarrSink
from shardmap.store.elements import storable

IDENTITY = {"program": "0123456789abcdef", "data": "fedcba9876543210", "plan": "00ff00ff00ff00ff"}
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
assert all(storable(dtype) for dtype in DTYPES)


def in_memory(folder: Path, overwrite: bool = False) -> Sink:
    """A zarr store in the memory of this process, of its own for each folder."""
    return ZarrSink(f"memory://shardmap-tests{folder}", overwrite=overwrite)


SINKS: dict[str, Callable[..., Sink]] = {
    "zarr": ZarrSink,
    "safetensors": SafetensorsSink,
    "memmap": MemmapSink,
    "memory": in_memory,
}
FOLDERS = ("zarr", "safetensors", "memmap")


def header(
    samples: int = 11, unit: int = 4, outputs: tuple[OutputSpec, ...] | None = None, **identity: str
) -> Header:
    """A header of two outputs, one of them of single numbers."""
    outputs = outputs or (
        OutputSpec("loss", (), torch.float32),
        OutputSpec("grad/weight", (3, 5), torch.bfloat16),
    )
    return Header(
        samples,
        unit,
        outputs,
        {**IDENTITY, **identity},
        {"versions": {"torch": torch.__version__}, "shape": (1, 2)},
    )


def bits(t: torch.Tensor) -> torch.Tensor:
    """All bytes: equality of bits, also for NaN and -0.0."""
    return (
        t.contiguous().flatten().view(torch.uint8)
        if t.numel()
        else torch.empty(0, dtype=torch.uint8)
    )


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bits, but 0 and 1 for bool."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.Size(shape).numel() * dtype.itemsize
    return (
        torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).reshape(shape)
        if size
        else torch.empty(shape, dtype=dtype)
    )


def rows_of(h: Header) -> list[torch.Tensor]:
    """All rows of each output."""
    return [random((h.samples, *spec.shape), spec.dtype) for spec in h.outputs]


def unit_of(h: Header, rows: list[torch.Tensor], unit: int) -> list[torch.Tensor]:
    """The rows of one unit."""
    start, stop = h.rows(unit)
    return [t[start:stop] for t in rows]


def fill(store: Store, rows: list[torch.Tensor], units: list[int] | None = None) -> None:
    """Write and commit units, all of them if none are named, the last first."""
    for unit in reversed(range(store.header.units) if units is None else units):
        store.commit(store.write(unit, unit_of(store.header, rows, unit)))


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal in shape, dtype and bits."""
    return (
        got.shape == wanted.shape
        and got.dtype == wanted.dtype
        and torch.equal(bits(got), bits(wanted))
    )


def written(kind: str, folder: Path) -> tuple[Store, list[torch.Tensor]]:
    """A store of `header()` with all of its rows, and the rows."""
    store = SINKS[kind](folder).create(header(), resume=False)
    rows = rows_of(store.header)
    fill(store, rows)
    store.finish()
    return store, rows
