"""The manifest of a store: a header, and an entry for each committed unit.

It alone decides which units count as done.

A folder has `manifest.jsonl`, a line per entry, appended and synced to the disk. Where files cannot
be appended to (object stores) each entry is a small object under `manifest/`. Entries carry
a CRC-32 of their text: it detects a changed digit at no cost (the data have hashes of their own),
and a line that a crash cut short.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from shardmap.errors import StoreDamagedError, StoreError
from shardmap.store.header import Header, Receipt
from shardmap.store.places import LocalPlace, Place

FORMAT = 1
JOURNAL = "manifest.jsonl"
FOLDER = "manifest"
_HEAD = f"{FOLDER}/header.json"
_ENTRY = re.compile(r"unit-\d+\.json")
_REMEDY = "restore it from a copy, or write the results anew to another place"


@dataclass(frozen=True, slots=True)
class Head:
    """The first entry: the kind of the store, and its header."""

    kind: str
    header: Header

    def to_json(self) -> dict[str, Any]:
        """The entry as JSON data."""
        return {"shardmap": {"format": FORMAT, "kind": self.kind}, **self.header.to_json()}

    @staticmethod
    def from_json(data: dict[str, Any], url: str) -> Head:
        """Make the entry from the data of `to_json`.

        Raises:
            StoreError: It is of a later version, or no such entry.
        """
        about = data.get("shardmap")
        if not isinstance(about, dict) or type(about.get("format")) is not int:
            raise StoreError(f"{url}: its manifest is none of shardmap's")
        if about["format"] < 1 or not isinstance(about.get("kind"), str):
            raise StoreError(
                f"{url}: its manifest says shardmap={about!r}, which no version writes; {_REMEDY}"
            )
        if about["format"] > FORMAT:
            raise StoreError(
                f"{url}: written by a later version of shardmap (format {about['format']}, here "
                f"{FORMAT}): upgrade shardmap"
            )
        try:
            header = Header.from_json(data)
        except StoreError as error:
            raise StoreError(f"{url}: its header: {error}; {_REMEDY}") from error
        return Head(about["kind"], header)


def encode(entry: dict[str, Any]) -> bytes:
    """Encode an entry as one line of JSON that ends with its CRC-32."""
    body = json.dumps(entry, separators=(",", ":")).encode()[:-1]
    return body + b',"crc":"%08x"}\n' % zlib.crc32(body)


def decode(line: bytes) -> dict[str, Any] | None:
    """Decode a line; None if it differs from what `encode` wrote."""
    body, mark, rest = line.rstrip(b"\n").rpartition(b',"crc":"')
    if not mark or rest != b'%08x"}' % zlib.crc32(body):
        return None
    return json.loads(body + b"}")


class Manifest(ABC):
    """Base of manifests: the record of one store's committed units."""

    def __init__(self, place: Place):
        self.place = place

    @abstractmethod
    def head(self) -> Head:
        """The kind of the store, and its header."""

    @abstractmethod
    def receipts(self) -> dict[int, Receipt]:
        """The units that are committed now, by number."""

    @abstractmethod
    def known(self) -> dict[int, Receipt]:
        """The committed units at the last reading, without a new one."""

    @abstractmethod
    def commit(self, receipt: Receipt) -> None:
        """Record that a unit is done."""

    @abstractmethod
    def withdraw(self, unit: int) -> None:
        """Record that a unit is not done any more."""

    @abstractmethod
    def start(self, head: Head) -> None:
        """Begin a manifest with this header and no units, replacing any other."""


@dataclass(slots=True)
class _State:
    """The content of a journal at its last reading."""

    signature: Any
    head: Head
    receipts: dict[int, Receipt]
    valid: int
    """Number of bytes in complete lines; a crash cut the rest short."""


class Journal(Manifest):
    """The manifest `manifest.jsonl`, which one process appends to."""

    def __init__(self, place: Place):
        super().__init__(place)
        self._state: _State | None = None

    def head(self) -> Head:
        """The kind of the store, and its header."""
        return self._load().head

    def receipts(self) -> dict[int, Receipt]:
        """The units that are committed now, by number."""
        return dict(self._load().receipts)

    def known(self) -> dict[int, Receipt]:
        """The committed units at the last reading, without a new one."""
        return (self._state or self._load()).receipts

    def start(self, head: Head) -> None:
        """Begin a manifest with this header and no units, replacing any other."""
        self._local()
        self.place.write(JOURNAL, encode(head.to_json()))
        self._state = None

    def commit(self, receipt: Receipt) -> None:
        """Append a line, and wait until it is on the disk."""
        self._append(receipt.to_json())
        self.known()[receipt.unit] = receipt

    def withdraw(self, unit: int) -> None:
        """Append a line that withdraws a commit."""
        self._append({"withdrawn": unit})
        self.known().pop(unit, None)

    def _local(self) -> LocalPlace:
        if not isinstance(self.place, LocalPlace):
            raise StoreError(
                f"{self.place.url}: the store was copied there from a folder and can only be read; "
                "write to a copy in a folder"
            )
        return self.place

    def _load(self) -> _State:
        signature = self.place.signature(JOURNAL)
        if self._state is None or signature is None or signature != self._state.signature:
            self._state = _parse(self.place.read(JOURNAL), signature, self.place.url)
        return self._state

    def _append(self, entry: dict[str, Any]) -> None:
        place, state, line = self._local(), self._load(), encode(entry)
        with place.explained(f"appending to {JOURNAL}"):
            handle = os.open(place.path(JOURNAL), os.O_WRONLY)
            try:
                os.ftruncate(handle, state.valid)  # a line that a crash cut short is removed
                try:
                    _write_all(handle, line, state.valid)
                    os.fsync(handle)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(handle, state.valid)
                    raise
            finally:
                os.close(handle)
        state.valid += len(line)
        state.signature = place.signature(JOURNAL)


def _write_all(handle: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(handle, data, at)
        data, at = data[written:], at + written


def _parse(data: bytes, signature: Any, url: str) -> _State:
    *lines, _ = data.split(
        b"\n"
    )  # after the last newline there is nothing, or a line that was cut short
    entries = [decode(line) for line in lines]
    if len(entries) > 1 and entries[-1] is None:
        entries.pop()  # a file may grow on disk before the data of its line are written
    if not entries or entries[0] is None:
        raise StoreError(f"{url}: the first line of {JOURNAL} is damaged; {_REMEDY}")
    head = Head.from_json(entries[0], url)
    receipts: dict[int, Receipt] = {}
    for number, entry in enumerate(entries[1:], start=2):
        if entry is not None and "withdrawn" in entry:
            unit = entry["withdrawn"]
            if type(unit) is not int:
                raise StoreError(
                    f"{url}: line {number} of {JOURNAL} withdraws {unit!r}, which is no unit; "
                    f"{_REMEDY}"
                )
            receipts.pop(unit, None)
            continue
        receipt = _receipt(entry)
        if receipt is None:
            raise StoreError(f"{url}: line {number} of {JOURNAL} is damaged; {_REMEDY}")
        _check_fits(receipt, head.header, f"{url}: line {number} of {JOURNAL}")
        receipts[receipt.unit] = receipt
    return _State(
        signature,
        head,
        receipts,
        sum(len(line) + 1 for line in lines[: len(entries)]),
    )


def _check_fits(receipt: Receipt, header: Header, where: str) -> None:
    """Refuse a receipt that does not belong to a store with this header."""
    misfit = receipt.misfit(header)
    if misfit is not None:
        raise StoreDamagedError(f"{where}: {misfit}; {_REMEDY}")


def _receipt(entry: dict[str, Any] | None) -> Receipt | None:
    try:
        return Receipt.from_json(entry) if entry is not None else None
    except (KeyError, TypeError, ValueError):
        return None


class Objects(Manifest):
    """A manifest of one small object per entry in `manifest/`, for places without appending."""

    def __init__(self, place: Place):
        super().__init__(place)
        self._seen: dict[str, Receipt] | None = None
        """Receipts read so far, by object name: an object is only ever rewritten with equal
        content."""

    def head(self) -> Head:
        """The kind of the store, and its header."""
        entry = decode(self.place.read(_HEAD))
        if entry is None:
            raise StoreError(f"{self.place.url}: {_HEAD} is damaged; {_REMEDY}")
        return Head.from_json(entry, self.place.url)

    def receipts(self) -> dict[int, Receipt]:
        """The units that are committed now, by number."""
        names = [name for name in self.place.names(FOLDER) if _ENTRY.fullmatch(name)]
        before = self._seen or {}
        fresh = [name for name in names if name not in before]
        read = dict(
            zip(fresh, self.place.read_many([f"{FOLDER}/{name}" for name in fresh]), strict=True)
        )
        self._seen = {
            name: before[name] if name in before else self._receipt(name, read[name])
            for name in names
        }
        return self._by_unit()

    def known(self) -> dict[int, Receipt]:
        """The committed units at the last reading, without a new one."""
        return self.receipts() if self._seen is None else self._by_unit()

    def start(self, head: Head) -> None:
        """Begin a manifest with this header and no units, replacing any other."""
        self.place.remove(FOLDER)
        self.place.write(_HEAD, encode(head.to_json()))
        self._seen = None

    def commit(self, receipt: Receipt) -> None:
        """Write the unit's object."""
        name = _entry_name(receipt.unit)
        self.place.write(f"{FOLDER}/{name}", encode(receipt.to_json()))
        if self._seen is not None:
            self._seen[name] = receipt

    def withdraw(self, unit: int) -> None:
        """Remove the unit's object."""
        name = _entry_name(unit)
        self.place.remove(f"{FOLDER}/{name}")
        if self._seen is not None:
            self._seen.pop(name, None)

    def _receipt(self, name: str, data: bytes) -> Receipt:
        receipt = _receipt(decode(data))
        if receipt is None:
            raise StoreError(
                f"{self.place.url}: {FOLDER}/{name} is damaged; remove it, and its unit is "
                "computed again"
            )
        _check_fits(receipt, self.head().header, f"{self.place.url}: {FOLDER}/{name}")
        return receipt

    def _by_unit(self) -> dict[int, Receipt]:
        assert self._seen is not None
        return {receipt.unit: receipt for receipt in self._seen.values()}


def _entry_name(unit: int) -> str:
    return f"unit-{unit:08d}.json"


def find_manifest(place: Place) -> Manifest | None:
    """The manifest of the store at a place, of either form; None if there is no store."""
    if place.exists(JOURNAL):
        return Journal(place)
    return Objects(place) if place.exists(_HEAD) else None


def new_manifest(place: Place) -> Manifest:
    """Make a manifest of the form that suits a place; `start` writes it."""
    return Objects(place) if place.remote else Journal(place)
