"""Full disks, limits, missing rights: said in words, and no half of a file is left."""

from __future__ import annotations

import ctypes
import errno
import http.server
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from shardmap.errors import StoreError
from shardmap.store import MemmapSink, OutputSpec, Receipt, Store, ZarrSink, open_store, source
from shardmap.store.places import LocalPlace, place_of
from tests.store.kinds import FOLDERS, SINKS, fill, header, rows_of, same, unit_of

ROOT = Path(__file__).parents[2]


def temporaries(folder: str | Path) -> list[Path]:
    return [
        p
        for p in Path(folder).rglob("*")
        if p.name.endswith((".tmp", ".partial")) or p.name.startswith(".")
    ]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, where this process may mount one."""
    if sys.platform != "linux":
        pytest.skip("mounts a tmpfs")
    libc = ctypes.CDLL(None, use_errno=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=1m"):
        pytest.skip(f"nothing can be mounted here: {os.strerror(ctypes.get_errno())}")
    yield disk
    libc.umount2(str(disk).encode(), 2)


def take_all_room(disk: Path) -> None:
    with open(disk / "ballast", "wb", buffering=0) as f:
        for _ in range(1000):
            try:
                f.write(bytes(4096))
            except OSError:
                return
    raise AssertionError("the disk is not full")


def commit_often(store: Store, receipt: Receipt) -> None:
    for _ in range(100):  # some lines fit into what is left of the manifest's last block
        store.commit(receipt)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_full_disk(kind: str, tiny_disk: Path) -> None:
    h = header(4, 1, (OutputSpec("x", (100_000,), torch.float32),))  # 400 KB per unit: two fit
    rows = rows_of(h)
    store = SINKS[kind](tiny_disk / "out").create(h)
    fill(store, rows, [0, 1])
    with pytest.raises(
        StoreError,
        match=f"{store.url}: writing unit 2 failed: No space left on device .*; free space there.* "
        "then resume",
    ):
        store.write(2, unit_of(h, rows, 2))
    assert not temporaries(store.url)
    assert store.missing() == [2, 3]
    assert store.corrupt() == []
    take_all_room(tiny_disk)
    receipt = store.receipts()[0]
    before = (tiny_disk / "out" / "manifest.jsonl").read_bytes()
    with pytest.raises(StoreError, match="No space left"):
        commit_often(store, receipt)
    assert (tiny_disk / "out" / "manifest.jsonl").read_bytes().startswith(before)
    assert not ctypes.CDLL(None).mount(
        b"", str(tiny_disk).encode(), None, 32, b"size=4m"
    )  # MS_REMOUNT
    again = SINKS[kind](tiny_disk / "out").create(h, resume=True)
    assert again.missing() == [2, 3]
    fill(again, rows, [2, 3])
    again.finish()
    assert same(again.read(0, 0, 4), rows[0])


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_disk_too_full_for_a_store(kind: str, tiny_disk: Path) -> None:
    take_all_room(tiny_disk)
    with pytest.raises(StoreError, match="No space left on device"):
        SINKS[kind](tiny_disk / "out").create(header())
    assert not temporaries(tiny_disk)


LIMITED = """
import pickle, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store, tensors = pickle.load(sys.stdin.buffer)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from shardmap.errors import StoreError
try:
    store.write(1, tensors)
except StoreError as error:
    sys.stdout.write(str(error))
"""


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_limit_on_the_size_of_files(kind: str, tmp_path: Path) -> None:
    h = header(3, 1, (OutputSpec("x", (100_000,), torch.float32),))
    rows = rows_of(h)
    store = SINKS[kind](tmp_path / "out").create(h)
    fill(store, rows)
    told = subprocess.run(
        [sys.executable, "-c", LIMITED],
        input=pickle.dumps((store, [torch.zeros(1, 100_000)])),
        capture_output=True,
        check=True,
        cwd=ROOT,
    ).stdout.decode()
    assert "writing unit 1 failed: File too large" in told
    assert "ulimit -f" in told
    assert not temporaries(store.url)
    assert store.corrupt() == []
    assert same(store.read(0, 0, 3), rows[0])  # the old ones are whole


@pytest.mark.parametrize("kind", ["zarr", "safetensors"])
def test_a_writer_that_stops_in_the_middle_leaves_the_old_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = header(3, 1, (OutputSpec("x", (10,), torch.float32),))
    rows = rows_of(h)
    store = SINKS[kind](tmp_path / "out").create(h)
    fill(store, rows)

    def stop(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", stop)
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(
        StoreError,
        match="writing unit 1 failed: Input/output error .on .*; check that the place can be "
        "reached",
    ):
        store.write(1, [torch.zeros(1, 10)])
    monkeypatch.undo()
    assert not temporaries(store.url)
    assert same(store.read(0, 0, 3), rows[0])


ENDLESS = """
import pickle, sys
store, tensors = pickle.load(sys.stdin.buffer)
while True:
    store.write(1, tensors)
    print(flush=True)
"""


@pytest.mark.parametrize("kind", ["zarr", "safetensors"])
def test_a_writer_that_is_killed_leaves_whole_rows(kind: str, tmp_path: Path) -> None:
    h = header(3, 1, (OutputSpec("x", (2_000_000,), torch.float32),))
    rows = rows_of(h)
    store = SINKS[kind](tmp_path / "out").create(h)
    fill(store, rows)
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(pickle.dumps((store, [rows[0][1:2]])))
        writer.stdin.close()
        for _ in range(7):
            writer.stdout.readline()
        writer.kill()
    again = SINKS[kind](tmp_path / "out").create(h, resume=True)
    assert again.corrupt() == again.missing() == []
    assert not temporaries(store.url)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "give this user the right"),
        (errno.EROFS, "mount it writable"),
        (errno.EDQUOT, "raise the quota"),
        (errno.ENOENT, "mounted on this machine"),
        (errno.ESTALE, "can be reached from this machine"),
    ],
)
def test_what_the_system_says_comes_with_a_remedy(
    number: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(
        StoreError,
        match=f"{tmp_path}/out: writing manifest.jsonl failed: {os.strerror(number)} .*; "
        f".*{remedy}",
    ):
        MemmapSink(tmp_path / "out").create(header())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_places_that_nobody_may_write_to() -> None:
    with pytest.raises(StoreError, match="/proc/shardmap: .* failed: "):
        ZarrSink("/proc/shardmap").create(header())


def test_our_own_bugs_are_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), place_of(tmp_path).explained("dividing"):
        _ = 1 / 0


def test_a_place_in_a_folder(tmp_path: Path) -> None:
    place = place_of(tmp_path / "new")
    assert isinstance(place, LocalPlace)
    assert place.names() == []
    place.write("a/b", b"x")
    assert place.read("a/b") == b"x"
    assert place.names() == ["a"]
    place.remove("a")
    place.remove("a")
    assert place.names() == []
    with pytest.raises(StoreError, match="reading c failed: No such file"):
        place.read("c")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """A web server of a folder, at a URL that fsspec opens with an asynchronous client."""
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_store_is_read_from_a_web_server(served: str, tmp_path: Path) -> None:
    h = header()
    rows = rows_of(h)
    fill(ZarrSink(tmp_path / "out").create(h), rows)
    store: Store = open_store(f"{served}/out")
    assert store.travels
    assert store.missing() == store.corrupt() == []
    assert same(pickle.loads(pickle.dumps(store)).read(1, 2, 11), rows[1][2:])
    assert source(f"{served}/out", names=["loss"]).travels
    assert same(source(f"{served}/out").read(3, 5)[0], rows[0][3:5])
    os.remove(tmp_path / "out" / "loss" / "c.1")
    assert store.corrupt() == [1]
    with pytest.raises(StoreError):
        store.discard(0)
    with pytest.raises(StoreError):
        ZarrSink(f"{served}/new").create(h)


def test_a_server_that_is_not_there() -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(StoreError, match=r"http://127.0.0.1:9/out: .*"):
        ZarrSink("http://127.0.0.1:9/out").create(header())
