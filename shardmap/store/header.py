"""The header of a store, and the receipt for a unit, as frozen data.

The header describes the rows; a receipt confirms one unit that was written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap.errors import StoreError
from shardmap.store import elements

IDENTITY = {
    "program": "the function, or a tensor that it captures, has changed",
    "data": "the samples have changed",
    "plan": "the batch is cut into other units",
}
"""The hashes that identify a run, and the cause of a difference in each."""

MOST_UNITS = 1 << 24
"""Most units of a store: each is a line of the manifest, and a file of some kinds."""
MOST_BYTES = (1 << 63) - 1
"""Most bytes of one output: the largest size of a file."""

_RESERVED: tuple[str, ...] = ("manifest", "manifest.jsonl", "zarr.json")


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One column of rows: an output of a map, or a column of a source."""

    name: str
    shape: tuple[int, ...]
    """Shape of one row."""
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {elements.dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Header:
    """The description of a store's rows, and the identity of its run.

    Raises:
        StoreError: Names are empty or given twice, a dtype cannot be stored, an identity is
            missing, attributes cannot be JSON.
    """

    samples: int
    """Number of rows of every output."""
    unit: int
    """Rows per storage unit: unit k holds the rows from k * unit to (k + 1) * unit, the last one
    the remainder."""
    outputs: tuple[OutputSpec, ...]
    identity: dict[str, str]
    """Hashes named "program", "data" and "plan"."""
    attributes: dict[str, Any]
    """Any JSON data: versions, names, the configuration's hash. Not compared when a run is
    resumed."""

    def __post_init__(self) -> None:
        if not _is_count(self.samples) or not _is_count(self.unit) or self.unit < 1:
            raise StoreError(
                f"a store of {self.samples!r} samples in units of {self.unit!r}: at least 0 "
                "samples, and 1 per unit, as whole numbers"
            )
        if self.units > MOST_UNITS:
            raise StoreError(
                f"a store of {self.samples} samples in units of {self.unit} has {self.units} "
                f"units, more than {MOST_UNITS}: write more samples per unit"
            )
        if not self.outputs:
            raise StoreError("a store needs at least one output")
        _check_names([spec.name for spec in self.outputs])
        for spec in self.outputs:
            if not all(map(_is_count, spec.shape)) or self.samples * spec.row_bytes > MOST_BYTES:
                raise StoreError(
                    f"output {spec.name!r}: rows of shape {list(spec.shape)!r}: sizes are "
                    f"whole numbers of at least 0, and all rows at most {MOST_BYTES} bytes together"
                )
            if not elements.storable(spec.dtype):
                raise StoreError(
                    f"output {spec}: files cannot hold {spec.dtype}; convert it inside the mapped "
                    "function"
                )
        if not isinstance(self.identity, dict) or not isinstance(self.attributes, dict):
            raise StoreError(
                f"identity={self.identity!r} and attributes={self.attributes!r}: each is a dict"
            )
        if missing := [key for key in IDENTITY if not isinstance(self.identity.get(key), str)]:
            raise StoreError(
                f"identity has no hash for {', '.join(missing)}: it takes one each for "
                f"{', '.join(IDENTITY)}"
            )
        try:
            plain = json.loads(json.dumps(self.attributes))
        except (TypeError, ValueError) as error:
            raise StoreError(f"attributes cannot be written as JSON: {error}") from error
        object.__setattr__(self, "attributes", plain)  # as they are read back: tuples become lists

    @property
    def units(self) -> int:
        """Number of units that the rows make."""
        return -(-self.samples // self.unit)

    def rows(self, unit: int) -> tuple[int, int]:
        """The first row of a unit, and one past its last.

        Raises:
            StoreError: There is no such unit.
        """
        if not 0 <= unit < self.units:
            raise StoreError(f"unit {unit} is none of the {self.units} units of this store")
        return unit * self.unit, min((unit + 1) * self.unit, self.samples)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all outputs."""
        return sum(spec.row_bytes for spec in self.outputs)

    @property
    def files(self) -> tuple[str, ...]:
        """A name for each output that is safe in files and URLs.

        It is unique even if upper and lower case are not distinguished.
        """
        return file_names([spec.name for spec in self.outputs])

    def index(self, output: str | int) -> int:
        """The position of an output given by name or position.

        Raises:
            StoreError: There is no such output.
        """
        names = [spec.name for spec in self.outputs]
        if isinstance(output, str):
            if output not in names:
                raise StoreError(
                    f"no output is named {output!r}; there are {', '.join(map(repr, names))}"
                )
            return names.index(output)
        if not -len(names) <= output < len(names):
            raise StoreError(f"no output has the position {output}; there are {len(names)}")
        return output % len(names)

    def to_json(self) -> dict[str, Any]:
        """The header as JSON data."""
        outputs = [
            {"name": s.name, "shape": list(s.shape), "dtype": elements.dtype_name(s.dtype)}
            for s in self.outputs
        ]
        return {
            "samples": self.samples,
            "unit": self.unit,
            "outputs": outputs,
            "identity": dict(self.identity),
            "attributes": self.attributes,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Header:
        """Make the header from the data of `to_json`.

        Raises:
            StoreError: Data are missing or cannot be understood.
        """
        try:
            outputs = []
            for o in data["outputs"]:
                dtype = elements.dtype_named(o["dtype"])
                if dtype is None:
                    raise ValueError(f"unknown dtype {o['dtype']!r}")
                if not isinstance(o["shape"], list):
                    raise TypeError(f"shape {o['shape']!r} is no list")
                outputs.append(OutputSpec(o["name"], tuple(o["shape"]), dtype))
            return Header(
                data["samples"], data["unit"], tuple(outputs), data["identity"], data["attributes"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"the header cannot be understood ({error!r}): it may be of another version of "
                "shardmap"
            ) from error


@dataclass(frozen=True, slots=True)
class Receipt:
    """A worker's confirmation of a unit that it has written.

    The unit counts only when the driver has committed it.
    """

    unit: int
    start: int
    stop: int
    """One past the last row."""
    bytes: int
    """Bytes of all outputs in memory."""
    checksums: tuple[str, ...]
    """Hash of each output's raw bytes, with the name of the hash function."""

    def to_json(self) -> dict[str, Any]:
        """The receipt as JSON data."""
        return {
            "unit": self.unit,
            "start": self.start,
            "stop": self.stop,
            "bytes": self.bytes,
            "checksums": list(self.checksums),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Receipt:
        """Make the receipt from the data of `to_json`; KeyError or TypeError for other data."""
        unit, start, stop, size = (data[key] for key in ("unit", "start", "stop", "bytes"))
        checksums = data["checksums"]
        if not all(map(_is_count, (unit, start, stop, size))) or not isinstance(checksums, list):
            raise TypeError("a receipt holds four whole numbers and a list of checksums")
        if not all(isinstance(text, str) for text in checksums):
            raise TypeError("a checksum is a text")
        return Receipt(unit, start, stop, size, tuple(checksums))

    def misfit(self, header: Header) -> str | None:
        """Sentence on the first field that no unit of a store with this header has, or None."""
        if not 0 <= self.unit < header.units:
            return f"unit is {self.unit}, and there are {header.units} units"
        start, stop = header.rows(self.unit)
        expected = {
            "start": (self.start, start),
            "stop": (self.stop, stop),
            "bytes": (self.bytes, (stop - start) * header.row_bytes),
            "number of checksums": (len(self.checksums), len(header.outputs)),
        }
        for field, (found, wanted) in expected.items():
            if found != wanted:
                return f"{field} is {found}, and unit {self.unit} of the header has {wanted}"
        return None


def differences(stored: Header, wanted: Header) -> list[str]:
    """Sentences on the differences between two runs; none if one can be resumed as the other."""
    out = [
        f"{key}: {meaning} ({stored.identity[key][:12]} is stored, {wanted.identity[key][:12]} is "
        "wanted)"
        for key, meaning in IDENTITY.items()
        if stored.identity[key] != wanted.identity[key]
    ]
    if stored.samples != wanted.samples:
        out.append(f"samples: {stored.samples} are stored, {wanted.samples} are wanted")
    if stored.unit != wanted.unit:
        out.append(f"unit: {stored.unit} rows are stored together, {wanted.unit} are wanted")
    before, now = [s.name for s in stored.outputs], [s.name for s in wanted.outputs]
    if before != now:
        return [*out, f"outputs: {', '.join(before)} are stored, {', '.join(now)} are wanted"]
    for a, b in zip(stored.outputs, wanted.outputs, strict=True):
        if a.shape != b.shape:
            out.append(f"shape of {a.name}: {list(a.shape)} is stored, {list(b.shape)} is wanted")
        if a.dtype != b.dtype:
            out.append(
                f"dtype of {a.name}: {elements.dtype_name(a.dtype)} is stored, "
                f"{elements.dtype_name(b.dtype)} is wanted"
            )
    return out


def _is_count(value: Any) -> bool:
    """True if a value is an integer from 0 to the largest size of a file."""
    return type(value) is int and 0 <= value <= MOST_BYTES


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(name, str) or not name:
            raise StoreError(
                f"an output is named {name!r}: names are texts of at least one character"
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise StoreError(
            f"several outputs are named {', '.join(map(repr, twice))}: give each a name of its own"
        )


def file_names(names: Sequence[str]) -> tuple[str, ...]:
    """Safe and unique file names for outputs.

    Characters other than ASCII letters, digits, `.`, `-` and `_` become `_`; equal names get
    numbers.
    """
    taken = set(_RESERVED)
    out = []
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100].lstrip(".")
        if safe.startswith("__") or not safe:  # zarr reserves names that begin so
            safe = "x" + safe
        number, unique = 1, safe
        while unique.casefold() in taken:
            number += 1
            unique = f"{safe}-{number}"
        taken.add(unique.casefold())
        out.append(unique)
    return tuple(out)
