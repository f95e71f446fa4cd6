"""Headers, names, and the files of a store as other programs read them."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors import safe_open

from shardmap.errors import StoreError
from shardmap.store import (
    Header,
    MemmapSink,
    OutputSpec,
    SafetensorsSink,
    ZarrSink,
    open_store,
)
from shardmap.store.header import file_names
from tests.store.kinds import IDENTITY, SINKS, fill, header, rows_of, same, unit_of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": -1}, "at least 0 samples"),
        ({"unit": 0}, "1 per unit"),
        ({"outputs": ()}, "at least one output"),
        ({"outputs": (OutputSpec("a", (), torch.int8),) * 2}, "several outputs are named 'a'"),
        ({"outputs": (OutputSpec("", (), torch.int8),)}, "an output is named ''"),
        ({"outputs": (OutputSpec("q", (), torch.qint8),)}, "files cannot hold torch.qint8"),
        ({"identity": {"program": "x"}}, "identity has no hash for data, plan"),
        ({"attributes": {"x": torch.zeros(2)}}, "attributes cannot be written as JSON"),
    ],
)
def test_headers_that_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        dataclasses.replace(header(), **arguments)


def test_headers_come_back_from_json() -> None:
    h = header()
    assert Header.from_json(h.to_json()) == h
    with pytest.raises(StoreError, match="cannot be understood"):
        Header.from_json(
            {**h.to_json(), "outputs": [{"name": "x", "shape": [1], "dtype": "float7"}]}
        )
    with pytest.raises(StoreError, match="cannot be understood"):
        Header.from_json({})


def test_names_become_safe_and_stay_different() -> None:
    names = [
        "a/b",
        "a_b",
        "A_B",
        "a b",
        "..",
        "manifest",
        "zarr.json",
        "__init__",
        "größe",
        "/etc/passwd",
        "x" * 300,
        "x" * 301,
        "\0",
    ]
    files = file_names(names)
    assert len({f.casefold() for f in files}) == len(names)
    assert all(
        re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,110}", f) and not f.startswith("__")
        for f in files
    )
    assert files[:4] == ("a_b", "a_b-2", "A_B-3", "a_b-4")
    assert not {"manifest", "zarr.json"} & set(files)
    assert file_names(names) == files


def test_names_that_look_alike_are_kept_apart(kind: str, tmp_path: Path) -> None:
    h = header(
        5,
        2,
        tuple(
            OutputSpec(n, (), torch.int64)
            for n in ("a/b", "a_b", "A_B", "manifest", "../../x", "zarr.json")
        ),
    )
    rows = rows_of(h)
    store = SINKS[kind](tmp_path / "deep" / "er" / "out").create(h)
    fill(store, rows)
    assert all(
        same(open_store(store.url).read(s.name, 0, 5), t)
        for s, t in zip(h.outputs, rows, strict=True)
    )
    assert kind == "memory" or os.listdir(tmp_path) == ["deep"]


# What others read.


def test_zarr_is_read_without_us(tmp_path: Path) -> None:
    h = header(
        7,
        3,
        (
            OutputSpec("loss", (), torch.float32),
            OutputSpec("g", (2, 3), torch.bfloat16),
            OutputSpec("z", (2,), torch.complex64),
        ),
    )
    rows = rows_of(h)
    rows[0][:] = torch.arange(7)
    rows[2][:3] = 0  # a chunk of fill values
    store = ZarrSink(tmp_path / "out").create(h)
    fill(store, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(tmp_path / "out", mode="r")
        found = dict(group.arrays())
    assert set(found) == {"loss", "g", "z"}
    assert np.array_equal(found["loss"][:], rows[0].numpy())
    assert found["g"].dtype == np.uint16
    assert found["g"].attrs["torch_dtype"] == "bfloat16"
    assert np.array_equal(found["g"][:], rows[1].view(torch.uint16).numpy())
    assert found["z"].chunks == (3, 2)
    assert found["z"].metadata.zarr_format == 3
    assert not found["z"].compressors
    assert group.attrs["shardmap"]["identity"] == IDENTITY
    assert group.attrs["shardmap"]["attributes"]["versions"] == {"torch": torch.__version__}
    assert (tmp_path / "out" / "z" / "c.0.0").stat().st_size == 3 * 2 * 8


def test_zarr_takes_no_room_for_rows_that_are_not_there(tmp_path: Path) -> None:
    store = ZarrSink(tmp_path / "out").create(header(3, 1000))
    fill(store, rows_of(store.header))
    assert (tmp_path / "out" / "loss" / "c.0").stat().st_size == 3 * 4


def test_zarr_compresses_when_asked(tmp_path: Path) -> None:
    h = header(10_000, 5_000, (OutputSpec("x", (), torch.int64),))
    sink = ZarrSink(tmp_path / "out", compressors=zarr.codecs.ZstdCodec(level=1))
    store = sink.create(h)
    fill(store, [torch.arange(10_000) // 100])
    assert (tmp_path / "out" / "x" / "c.0").stat().st_size < 8_000
    assert store.corrupt() == []
    path = tmp_path / "out" / "x" / "c.1"
    path.write_bytes(path.read_bytes()[:100])
    assert store.corrupt() == [1]
    assert sink.create(h, resume=True).missing() == []


def test_safetensors_are_read_without_us(tmp_path: Path) -> None:
    h = header(
        7,
        3,
        (
            OutputSpec("a/b", (2,), torch.bfloat16),
            OutputSpec("z", (2,), torch.complex128),
            OutputSpec("e", (), torch.float8_e5m2),
        ),
    )
    rows = rows_of(h)
    fill(SafetensorsSink(tmp_path / "out").create(h), rows)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "manifest.jsonl",
        *(f"unit-0000000{i}.safetensors" for i in range(3)),
    ]
    with safe_open(tmp_path / "out" / "unit-00000001.safetensors", "pt") as f:
        assert same(f.get_tensor("a/b").clone(), rows[0][3:6])
        assert same(f.get_tensor("z").clone(), torch.view_as_real(rows[1][3:6]))
        assert same(f.get_tensor("e").clone(), rows[2][3:6])
        assert (
            f.metadata()["torch_dtypes"]
            == '{"a/b": "bfloat16", "z": "complex128", "e": "float8_e5m2"}'
        )
        assert (f.metadata()["start"], f.metadata()["stop"]) == ("3", "6")
    with pytest.raises(StoreError, match="safetensors keeps to itself"):
        SafetensorsSink(tmp_path / "other").create(
            header(outputs=(OutputSpec("__metadata__", (), torch.int8),))
        )
    assert not (tmp_path / "other").exists()


def test_memmaps_are_read_without_us_and_take_no_room_before(tmp_path: Path) -> None:
    h = header(
        1000, 10, (OutputSpec("x", (1000,), torch.float32), OutputSpec("b", (), torch.bfloat16))
    )
    store = MemmapSink(tmp_path / "out").create(h)
    info = (tmp_path / "out" / "x.npy").stat()
    assert info.st_size > 4_000_000
    assert info.st_blocks * 512 < 100_000
    rows = rows_of(h)
    store.write(7, unit_of(h, rows, 7))
    x, b = (np.load(tmp_path / "out" / f"{n}.npy", mmap_mode="r") for n in "xb")
    assert np.array_equal(x[70:80].view(np.uint32), rows[0][70:80].view(torch.uint32).numpy())
    assert np.array_equal(b[70:80], rows[1][70:80].view(torch.uint16).numpy())
    assert not x[:70].any()
    assert x.ctypes.data % 64 == 0
