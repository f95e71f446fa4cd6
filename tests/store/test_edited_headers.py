"""Headers that were edited by hand: each change of a field ends in a named error or equal rows."""

from __future__ import annotations

import copy
import itertools
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardmap.errors import StoreError
from shardmap.store import open_store
from shardmap.store.manifest import JOURNAL, decode, encode
from tests.store import kinds

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 5, 7, 1 << 20, 1 << 40, 1 << 63, 1 << 70, -(1 << 63)),
    *(2.5, 1e30, float("nan"), float("inf")),
    *("", "x", "float32", "float64", "int8", "complex128", "bits4x2"),
    *([], [-1], [0], [2], [3, 5], [5, 3], [15], [1 << 40], [1 << 70], [1.5], ["3"], [None], [[3]]),
    *([1 << 31, 1 << 31], [3, -5], [True, 5], {}, {"a": 1}, [{}], [[]]),
)


def mutated(value: Any) -> Iterator[tuple[str, Any]]:
    """Every copy of nested data in which one field is another value, or gone."""
    places: list[tuple[Any, ...]] = []

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in list(children):
            places.append((*path, key))
            if isinstance(child, dict | list):
                walk(child, (*path, key))

    walk(value, ())
    for path in places:
        for new in (*VALUES, "removed"):
            data = copy.deepcopy(value)
            node = data
            for key in path[:-1]:
                node = node[key]
            if new == "removed":
                del node[path[-1]]
            elif type(node[path[-1]]) is type(new) and node[path[-1]] == new:
                continue
            else:
                node[path[-1]] = copy.deepcopy(new)
            yield f"{'.'.join(map(str, path))}={new!r}", data


def read_all(place: str) -> list[torch.Tensor]:
    """All that a user does with a store that a run has left behind."""
    store = open_store(place)
    assert repr(store)
    if store.missing():
        store.receipts()
        with pytest.raises(StoreError):
            store.finish()
        raise StoreError("some rows are not there")
    rows = [store.read(k, 0, store.header.samples) for k in range(len(store.header.outputs))]
    store.corrupt()
    for k in range(len(rows)):
        assert kinds.same(store.read(k, 0, 0), rows[k][:0])
    return rows


@pytest.fixture(autouse=True)
def _no_huge_allocation() -> Iterator[None]:
    """Nothing may ask for more than 4 GiB beyond what the process has mapped."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def run_cases(place: Path, file: Path, cases: Iterator[tuple[str, bytes]], rows: Any) -> int:
    """Put each text in place of the file; how many were refused by name."""
    good, refused = file.read_bytes(), 0
    wrong: list[str] = []
    for name, text in cases:
        file.write_bytes(text)
        try:
            found = read_all(str(place))
        except StoreError as error:
            refused += 1
            if not str(error):
                wrong.append(f"{name}: no words")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        else:
            same = len(found) == len(rows) and all(
                kinds.same(a, b) for a, b in zip(found, rows, strict=True)
            )
            if not same:
                wrong.append(f"{name}: other rows")
        finally:
            file.write_bytes(good)
    assert not wrong, f"{len(wrong)} of them:\n" + "\n".join(wrong[:40])
    return refused


@pytest.mark.parametrize("line", [0, 1])
@pytest.mark.parametrize("kind", kinds.FOLDERS)
def test_edited_manifests(kind: str, line: int, tmp_path: Path) -> None:
    """The header (line 0) or a receipt (line 1), with a checksum that agrees with the edit."""
    store, rows = kinds.written(kind, tmp_path / "store")
    del store
    file = tmp_path / "store" / JOURNAL
    lines = file.read_bytes().splitlines(keepends=True)
    entry = decode(lines[line])
    assert entry is not None
    entry.pop("crc", None)

    def cases() -> Iterator[tuple[str, bytes]]:
        step = 5 if kind == "zarr" else 1  # each takes zarr 20 ms
        for name, data in itertools.islice(mutated(entry), 0, None, step):
            edited = [*lines[:line], encode(data), *lines[line + 1 :]]
            yield name, b"".join(edited)

    assert run_cases(tmp_path / "store", file, cases(), rows) > 30


@pytest.mark.parametrize("array", ["", "loss", "grad_weight"])
def test_edited_zarr_metadata(array: str, tmp_path: Path) -> None:
    """The group's metadata, and each array's; every fifth change, for each takes 20 ms."""
    _, rows = kinds.written("zarr", tmp_path / "store")
    file = tmp_path / "store" / array / "zarr.json"
    entry = json.loads(file.read_text())
    cases = (
        (name, json.dumps(data).encode())
        for name, data in itertools.islice(mutated(entry), 0, None, 5)
    )
    run_cases(tmp_path / "store", file, cases, rows)


def test_edited_safetensors_headers(tmp_path: Path) -> None:
    """The JSON in front of the data, with a length that agrees with the edit."""
    _, rows = kinds.written("safetensors", tmp_path / "store")
    file = tmp_path / "store" / "unit-00000001.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    entry, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def cases() -> Iterator[tuple[str, bytes]]:
        for name, changed in mutated(entry):
            text = json.dumps(changed).encode()
            text += b" " * (-len(text) % 8)
            yield name, len(text).to_bytes(8, "little") + text + data
        for wrong in (0, 7, length - 1, length + 1, 1 << 30, 1 << 62, (1 << 64) - 1):
            yield f"length={wrong}", wrong.to_bytes(8, "little") + whole[8:]

    run_cases(tmp_path / "store", file, cases(), rows)


def test_edited_npy_headers(tmp_path: Path) -> None:
    """Each field of numpy's header, and each byte of its preamble."""
    _, rows = kinds.written("memmap", tmp_path / "store")
    (file, *_) = sorted((tmp_path / "store").glob("grad*.npy"))
    whole = file.read_bytes()
    end = 10 + int.from_bytes(whole[8:10], "little")
    text = whole[10:end].decode()

    def cases() -> Iterator[tuple[str, bytes]]:
        fields = {
            "'<u2'": ["'<f8'", "'|O'", "'<u8'", "'>u2'", "'x'", "3", "None", "[('a', '<u2')]"],
            "False": ["True", "1", "None"],
            "(11, 3, 5)": [
                *("(-11, 3, 5)", "(11,)", "()", "11", "(1 << 60, 3, 5)", "(99999999999999, 3, 5)"),
                *("(11, 5, 3)", "(12, 3, 5)", "None", "(11, 3, 5, 99999999999999999999999)"),
                *("('a',)", "(1.5, 3, 5)"),
            ],
            "'shape'": ["'size'", "3"],
            "'descr'": ["'dtype'"],
        }
        for old, options in fields.items():
            assert old in text, text
            for new in options:
                edited = text.replace(old, new).rstrip()
                edited = edited.ljust(end - 11) + "\n"
                yield f"{old} -> {new}", whole[:10] + edited.encode()[: end - 10] + whole[end:]
        for at in range(10):
            for value in (0, 1, 0x93, 255):
                yield f"byte {at} = {value}", whole[:at] + bytes([value]) + whole[at + 1 :]

    run_cases(tmp_path / "store", file, cases(), rows)
