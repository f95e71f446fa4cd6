"""Sinks create, resume, replace and refuse stores."""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.util
import logging
import re
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
import torch
import zarr

from shardmap.errors import MissingExtraError, StoreDamagedError, StoreError, StoreMismatchError
from shardmap.store import (
    MemmapSink,
    OutputSpec,
    SafetensorsSink,
    Sink,
    ZarrSink,
    open_store,
)
from tests.store.kinds import FOLDERS, IDENTITY, SINKS, fill, header, rows_of, same


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
def test_urls_that_nothing_opens_are_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
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
