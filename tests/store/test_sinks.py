"""Creating, resuming, replacing and refusing; what files look like to others."""

from __future__ import annotations

import dataclasses
import importlib.abc
import logging
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import zarr
from safetensors import safe_open

from shardmap.errors import MissingExtraError, StoreDamagedError, StoreError, StoreMismatchError
from shardmap.store import (
    Header,
    MemmapSink,
    OutputSpec,
    SafetensorsSink,
    Sink,
    ZarrSink,
    open_store,
)
from shardmap.store.header import file_names
from tests.store.kinds import FOLDERS, IDENTITY, SINKS, fill, header, rows_of, same, unit_of


@pytest.fixture(params=list(SINKS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_store_that_is_there_is_not_touched(kind: str, tmp_path: Path) -> None:
    h = header()
    rows = rows_of(h)
    store = SINKS[kind](tmp_path / "out").create(h)
    fill(store, rows)
    with pytest.raises(
        StoreError,
        match="holds a store already: pass resume=True .* overwrite=True .* or name another place",
    ):
        SINKS[kind](tmp_path / "out").create(h)
    assert same(open_store(store.url).read(1, 0, 11), rows[1])


def test_overwrite_replaces_a_store_and_nothing_else(kind: str, tmp_path: Path) -> None:
    old = header(outputs=(OutputSpec("old", (2,), torch.int8),))
    store = SINKS[kind](tmp_path / "out").create(old)
    fill(store, rows_of(old))
    if kind != "memory":
        (tmp_path / "out" / "notes.txt").write_text("mine")
    h = header()
    rows = rows_of(h)
    again = SINKS[kind](tmp_path / "out", overwrite=True).create(h)
    assert again.missing() == [0, 1, 2]
    fill(again, rows)
    assert same(open_store(again.url).read(0, 0, 11), rows[0])
    if kind != "memory":
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
        assert not list((tmp_path / "out").glob("old*"))


@pytest.mark.parametrize("before", FOLDERS)
@pytest.mark.parametrize("now", FOLDERS)
def test_overwrite_replaces_a_store_of_another_kind(before: str, now: str, tmp_path: Path) -> None:
    h = header()
    fill(SINKS[before](tmp_path / "out").create(h), rows_of(h))
    if before != now:
        with pytest.raises(StoreMismatchError, match=f"holds a store of kind {before}, not {now}"):
            SINKS[now](tmp_path / "out").create(h, resume=True)
    store = SINKS[now](tmp_path / "out", overwrite=True).create(h)
    rows = rows_of(h)
    fill(store, rows)
    assert open_store(tmp_path / "out").kind == now
    assert store.corrupt() == []


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_store_is_refused(
    kind: str, tmp_path: Path, resume: bool, overwrite: bool
) -> None:
    sink = SINKS[kind](tmp_path / "out", overwrite=overwrite)
    place = (
        "memory://" + sink.where.removeprefix("memory://")
        if kind == "memory"
        else str(tmp_path / "out")
    )
    with fsspec.open(f"{place}/thesis.tex", "w", auto_mkdir=True) as f:
        f.write("years")
    with pytest.raises(
        StoreError,
        match=r"is not empty and no store of shardmap \(thesis.tex; no manifest\): nothing of it "
        r"is touched",
    ):
        sink.create(header(), resume=resume)
    with fsspec.open(f"{place}/thesis.tex", "r") as f:
        assert f.read() == "years"


def test_a_zarr_group_of_somebody_else_is_refused(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "out", mode="w").create_array("x", shape=(3,), dtype="f4")
    with pytest.raises(StoreError, match="no store of shardmap"):
        ZarrSink(tmp_path / "out", overwrite=True).create(header())


@pytest.mark.parametrize("sink", [ZarrSink, SafetensorsSink, MemmapSink])
def test_a_file_is_no_place(sink: type, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(StoreError, match="is a file, where a store needs a folder"):
        sink(tmp_path / "out").create(header())


def test_resume_makes_what_is_not_there(kind: str, tmp_path: Path) -> None:
    h = header()
    store = SINKS[kind](tmp_path / "out").create(h, resume=True)
    fill(store, rows_of(h))
    store.finish()


def test_resume_goes_on_with_what_is_stored(kind: str, tmp_path: Path) -> None:
    h = header()
    rows = rows_of(h)
    fill(SINKS[kind](tmp_path / "out").create(h), rows, [1])
    other = dataclasses.replace(h, attributes={"versions": "later"})
    store = SINKS[kind](tmp_path / "out").create(other, resume=True)
    assert store.missing() == [0, 2]
    assert store.header == h  # as it was written
    fill(store, rows, store.missing())
    assert same(store.read(0, 0, 11), rows[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"identity": {**IDENTITY, "program": "beef" * 4}},
            "program: the function, or a tensor that it captures, has changed .0123456789ab is",
        ),
        ({"identity": {**IDENTITY, "data": "beef" * 4}}, "data: the samples have changed"),
        ({"identity": {**IDENTITY, "plan": "beef" * 4}}, "plan: the batch is cut into other units"),
        ({"samples": 12}, "samples: 11 are stored, 12 are wanted"),
        ({"unit": 5}, "unit: 4 rows are stored together, 5 are wanted"),
        (
            {"outputs": (OutputSpec("loss", (), torch.float32),)},
            "outputs: loss, grad/weight are stored, loss are wanted",
        ),
    ],
)
def test_another_run_is_not_resumed(kind: str, tmp_path: Path, change: dict, message: str) -> None:
    h = header()
    rows = rows_of(h)
    fill(SINKS[kind](tmp_path / "out").create(h), rows)
    for overwrite in (False, True):
        with pytest.raises(
            StoreMismatchError,
            match=f"cannot be resumed: {message}.* name another place, or start anew with "
            "overwrite=True",
        ):
            SINKS[kind](tmp_path / "out", overwrite=overwrite).create(
                dataclasses.replace(h, **change), resume=True
            )
    assert open_store(SINKS[kind](tmp_path / "out").create(h, resume=True).url).corrupt() == []


def test_everything_that_differs_is_told(tmp_path: Path) -> None:
    h = header()
    MemmapSink(tmp_path / "out").create(h)
    a, b = h.outputs
    outputs = (dataclasses.replace(a, dtype=torch.float64), dataclasses.replace(b, shape=(5, 3)))
    with pytest.raises(StoreMismatchError) as caught:
        MemmapSink(tmp_path / "out").create(
            header(12, 3, outputs, program="b", data="c", plan="d"), resume=True
        )
    for part in (
        "program",
        "data",
        "plan",
        "samples",
        "unit",
        "dtype of loss: float32 is stored, float64 is wanted",
        r"shape of grad/weight: \[3, 5\]",
    ):
        assert re.search(part, str(caught.value))


@pytest.mark.parametrize("at", ["before files", "between files"])
def test_a_driver_that_stops_while_it_makes_a_store(
    kind: str, tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = SINKS[kind](tmp_path / "out")
    with monkeypatch.context() as patch:
        if at == "before files":
            patch.setattr(
                type(sink), "_lay_out", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                sink.create(header())
        else:
            sink.create(header())
            for name in ("loss", "loss.npy"):
                path = tmp_path / "out" / name
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                    missing_ok=True
                )
    store = sink.create(header(), resume=True)
    rows = rows_of(header())
    fill(store, rows)
    assert same(open_store(store.url).read("loss", 0, 11), rows[0])


@pytest.mark.parametrize("kind", ["zarr", "memmap"])
def test_files_of_committed_units_that_are_gone_stop_a_resume(kind: str, tmp_path: Path) -> None:
    h = header()
    store = SINKS[kind](tmp_path / "out").create(h)
    fill(store, rows_of(h), [0])
    path = tmp_path / "out" / ("loss" if kind == "zarr" else "loss.npy")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(StoreDamagedError, match="loss.* is gone; see corrupt"):
        SINKS[kind](tmp_path / "out").create(h, resume=True)
    store.discard(0)
    assert SINKS[kind](tmp_path / "out").create(h, resume=True).missing() == [0, 1, 2]


def test_nothing_and_something_else_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nothing there: name the folder or URL"):
        open_store(tmp_path / "out")
    with pytest.raises(StoreError, match="no manifest of shardmap there"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="nothing there"):
        open_store("memory://nowhere")
    with pytest.raises(StoreError, match="is no place"):
        open_store("")


@pytest.mark.parametrize("sink", [SafetensorsSink, MemmapSink])
def test_files_are_not_written_to_urls(sink: type) -> None:
    with pytest.raises(
        StoreError, match=f"{sink.__name__} writes to folders only: use ZarrSink for URLs"
    ):
        sink("memory://x").create(header())


def test_urls_of_files_are_folders(tmp_path: Path) -> None:
    for kind in FOLDERS:
        store = SINKS[kind](f"file://{tmp_path}/{kind}").create(header())
        assert store.url == str(tmp_path / kind)
        assert store.travels
    assert not ZarrSink("memory://travels-not").create(header(), resume=True).travels


@pytest.mark.parametrize("url", ["nosuch://x/y", "s3://bucket/run"])
def test_urls_that_nothing_opens_are_told(url: str) -> None:
    if url.startswith("s3"):
        try:
            import s3fs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("s3fs is installed")
    with pytest.raises(StoreError, match=f"{url}: fsspec cannot open this URL: .*"):
        ZarrSink(url).create(header())


def test_too_little_room_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    h = header(10**9, 10**6, (OutputSpec("x", (10**6,), torch.float32),))
    with caplog.at_level(logging.WARNING, "shardmap"):
        MemmapSink(tmp_path / "small").create(header())
        assert not caplog.records
        SafetensorsSink(tmp_path / "out").create(h)
    assert re.search(r"the results need 3814697265.6 MiB, and .* MiB are free", caplog.text)


# Headers.


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


@pytest.mark.parametrize(
    ("kind", "package"), [("zarr", "zarr"), ("safetensors", "safetensors"), ("memory", "fsspec")]
)
def test_packages_that_are_missing_are_named(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(package), *sys.meta_path])
    with pytest.raises(
        MissingExtraError, match=rf'{package} is needed to .*: pip install "shardmap\[run\]"'
    ):
        SINKS[kind](tmp_path / "out").create(header())
    assert not (tmp_path / "out").exists()


class Absent(importlib.abc.MetaPathFinder):
    """Makes a package look as if it were not installed."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_sinks_are_data() -> None:
    for sink in (ZarrSink, SafetensorsSink, MemmapSink):
        one: Sink = sink("out", overwrite=True)
        assert one == sink("out", True) != sink("out")
        assert hash(one) == hash(sink("out", True))
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.overwrite = False


def test_attributes_of_a_sink_are_kept_beside_those_of_the_run(tmp_path: Path) -> None:
    for name, sink in {
        "zarr": ZarrSink,
        "safetensors": SafetensorsSink,
        "memmap": MemmapSink,
    }.items():
        h = header()
        sink(tmp_path / name, attributes={"shape": [7], "owner": {"name": "me"}}).create(h)
        assert open_store(tmp_path / name).header.attributes == {
            **h.attributes,
            "shape": [7],
            "owner": {"name": "me"},
        }
        assert sink(tmp_path / name, attributes={"owner": "another"}).create(
            h, resume=True
        ).header.attributes["owner"] == {"name": "me"}


@pytest.mark.parametrize(
    ("attributes", "said"),
    [([1], r"attributes=\[1\] is a list"), ({"a": Path}, "cannot be written as JSON")],
)
def test_attributes_that_are_none_are_refused_before_anything_is_made(
    attributes: object, said: str, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=said):
        MemmapSink(tmp_path / "out", attributes=attributes).create(header())
    assert not (tmp_path / "out").exists()


def test_a_place_can_be_checked_before_the_run_is_known(kind: str, tmp_path: Path) -> None:
    sink = SINKS[kind](tmp_path / "out")
    assert sink.check() is None
    assert sink.check(resume=True) is None
    sink.create(header())
    with pytest.raises(StoreError, match="holds a store already"):
        sink.check()
    found = sink.check(resume=True)
    assert found is not None
    assert found.header == header()
