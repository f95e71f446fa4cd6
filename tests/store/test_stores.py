"""Tests that every kind of store must pass.

Rows come back bit for bit, and nothing is there that is not committed.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shardmap.errors import StoreDamagedError, StoreError
from shardmap.store import OutputSpec, Sink, open_store
from tests.store.kinds import DTYPES, FOLDERS, SINKS, fill, header, rows_of, same, unit_of


@pytest.fixture(params=list(SINKS))
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Sink:
    """A sink of each kind, on an empty place."""
    return SINKS[request.param](tmp_path / "out")


@pytest.fixture(params=FOLDERS)
def in_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Sink:
    """A sink of each kind that writes to a folder."""
    return SINKS[request.param](tmp_path / "out")


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (1, 2, 3)], ids=str)
def test_rows_come_back_bit_for_bit_in_every_dtype(sink: Sink, shape: tuple[int, ...]) -> None:
    h = header(7, 3, tuple(OutputSpec(str(dtype), shape, dtype) for dtype in DTYPES))
    rows = rows_of(h)
    store = sink.create(h)
    fill(store, rows)
    store.finish()
    again = open_store(store.url)
    assert again.header == h
    assert again.missing() == again.corrupt() == []
    for i, (spec, t) in enumerate(zip(h.outputs, rows, strict=True)):
        assert same(again.read(spec.name, 0, 7), t), spec
        assert same(again.read(i, 2, 5), t[2:5]), spec
        assert same(again.read_unit(2)[i], t[6:7]), spec


@pytest.mark.parametrize(
    ("samples", "unit"), [(0, 5), (1, 1), (1, 1000), (13, 13), (13, 1), (29, 7), (31, 30)]
)
def test_sizes(sink: Sink, samples: int, unit: int) -> None:
    h = header(samples, unit)
    rows = rows_of(h)
    store = sink.create(h)
    assert store.missing() == list(range(-(-samples // unit)))
    fill(store, rows)
    store.finish()
    assert sum(r.stop - r.start for r in store.receipts().values()) == samples
    assert sum(r.bytes for r in store.receipts().values()) == samples * h.row_bytes
    for i, t in enumerate(rows):
        for start in range(0, samples + 1, 3):
            for stop in range(start, samples + 1, 5):
                assert same(store.read(i, start, stop), t[start:stop])


def test_only_what_is_committed_is_there(sink: Sink) -> None:
    h = header()
    rows = rows_of(h)
    store = sink.create(h)
    receipt = store.write(1, unit_of(h, rows, 1))  # the driver stops here
    assert store.missing() == [0, 1, 2]
    with pytest.raises(StoreError, match="rows 4 to 7 are not committed"):
        store.read(0, 5, 7)
    with pytest.raises(StoreError, match="3 of 3 units are missing .0-2.: resume"):
        store.finish()
    again = sink.create(h, resume=True)
    assert again.missing() == [0, 1, 2]
    assert again.write(1, unit_of(h, rows, 1)) == receipt
    again.commit(receipt)
    assert again.missing() == [0, 2]
    assert same(store.read(0, 5, 7), rows[0][5:7])  # another process's commit is seen
    with pytest.raises(StoreError, match="rows 0 to 3, 8 to 10 are not committed"):
        store.read(0, 0, 11)
    fill(again, rows, again.missing())
    again.finish()
    assert store.missing() == store.corrupt() == []


def test_a_unit_is_written_again_with_other_rows(sink: Sink) -> None:
    h = header()
    store = sink.create(h)
    fill(store, rows_of(h))
    rows = rows_of(h)
    fill(store, rows)
    assert all(same(store.read(i, 0, 11), rows[i]) for i in range(2))
    assert open_store(store.url).corrupt() == []


def test_a_discarded_unit_is_missing(sink: Sink) -> None:
    h = header()
    rows = rows_of(h)
    store = sink.create(h)
    fill(store, rows)
    store.discard(1)
    store.discard(1)
    assert store.missing() == open_store(store.url).missing() == [1]
    with pytest.raises(StoreError, match="rows 4 to 7"):
        store.read(1, 0, 11)
    with pytest.raises(StoreError, match="units 1 are not committed"):
        store.corrupt([0, 1])
    with pytest.raises(StoreError, match="unit 3 is none of the 3"):
        store.discard(3)
    fill(store, rows, [1])
    assert sink.create(h, resume=True).missing() == []


def test_pickles_are_small_and_work(sink: Sink) -> None:
    h = header()
    rows = rows_of(h)
    store = sink.create(h)
    fill(store, rows)
    store.read(0, 0, 3)
    data = pickle.dumps(store)
    assert len(data) < 1500
    other = pickle.loads(data)
    assert same(other.read(1, 1, 9), rows[1][1:9])
    assert other.header == h
    assert pickle.loads(pickle.dumps(sink)) == sink


def test_tensors_of_any_layout_are_written_as_they_are(sink: Sink) -> None:
    h = header(4, 4, tuple(OutputSpec(n, (2, 3), torch.complex64) for n in "abcd"))
    t = torch.randn(4, 3, 2, dtype=torch.complex64, requires_grad=True)
    turned = t.mT
    tensors = [
        turned,
        turned.conj(),
        torch.randn(1, 2, 3, dtype=torch.complex64).expand(4, 2, 3),
        turned,
    ]
    store = sink.create(h)
    store.commit(store.write(0, tensors))
    for got, wanted in zip(store.read_unit(0), tensors, strict=True):
        assert same(got, wanted.detach().resolve_conj())


def test_negative_zeros_and_nan_payloads_stay(sink: Sink) -> None:
    h = header(6, 2, (OutputSpec("f", (), torch.float32), OutputSpec("c", (), torch.complex64)))
    f = torch.tensor([-0.0, -0.0, 0.0, 0.0, float("nan"), -float("nan")])
    c = torch.complex(f, f.flip(0))
    c[:2] = torch.complex(torch.tensor([-0.0, 0.0]), torch.tensor([0.0, -0.0]))
    store = sink.create(h)
    fill(store, [f, c])
    assert same(store.read("f", 0, 6), f)
    assert same(store.read("c", 0, 6), c)
    assert store.corrupt() == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(4)], "given 1 tensors for 2 outputs"),
        (
            [torch.zeros(4), torch.zeros(4, 3, 5)],
            "output grad/weight: got torch.float32 .4, 3, 5., declared was torch.bfloat16",
        ),
        (
            [torch.zeros(3), torch.zeros(4, 3, 5).bfloat16()],
            r"output loss: got torch.float32 \[3\], declared was torch.float32 \[4\]",
        ),
        (
            [torch.zeros(4, device="meta"), torch.zeros(4, 3, 5).bfloat16()],
            "a dense tensor on the CPU is needed",
        ),
        (
            [torch.zeros(4).to_sparse(), torch.zeros(4, 3, 5).bfloat16()],
            "a dense tensor on the CPU is needed",
        ),
    ],
)
def test_tensors_that_were_not_declared_are_refused(
    sink: Sink, tensors: list[torch.Tensor], message: str
) -> None:
    store = sink.create(header())
    with pytest.raises(StoreError, match=message):
        store.write(0, tensors)


def test_units_rows_and_names_that_are_not_there_are_refused(sink: Sink) -> None:
    h = header()
    rows = rows_of(h)
    store = sink.create(h)
    fill(store, rows)
    for unit in (-1, 3):
        with pytest.raises(StoreError, match=f"unit {unit} is none of the 3 units"):
            store.write(unit, [])
    for start, stop in ((-1, 2), (3, 2), (0, 12)):
        with pytest.raises(StoreError, match="out of range: there are 11"):
            store.read(0, start, stop)
    with pytest.raises(
        StoreError, match="no output is named 'los'; there are 'loss', 'grad/weight'"
    ):
        store.read("los", 0, 1)
    with pytest.raises(StoreError, match="no output has the position 2"):
        store.read(2, 0, 1)
    receipt = store.receipts()[2]
    with pytest.raises(StoreError, match="is not of this store"):
        store.commit(type(receipt)(2, 8, 12, receipt.bytes, receipt.checksums))


def files_of(folder: str, unit: int) -> list[Path]:
    """The files that hold the second output of a unit."""
    root = Path(folder)
    found = [
        root / f"unit-{unit:08d}.safetensors",
        root / "grad_weight" / f"c.{unit}.0.0",
        root / "grad_weight.npy",
    ]
    return [path for path in found if path.exists()]


def test_a_flipped_bit_is_found(in_folder: Sink) -> None:
    h = header()
    rows = rows_of(h)
    store = in_folder.create(h)
    fill(store, rows)
    (path,) = files_of(store.url, 1)
    data = bytearray(path.read_bytes())
    at = bytes(data).index(rows[1][5].view(torch.uint8).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert store.corrupt() == open_store(store.url).corrupt() == [1]
    assert store.corrupt([0, 2]) == []
    assert store.corrupt([2, 1]) == [1]
    for unit in store.corrupt():
        store.discard(unit)
    again = in_folder.create(h, resume=True)
    assert again.missing() == [1]
    fill(again, rows, [1])
    assert again.corrupt() == []


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_files_cut_short_or_gone_are_found(in_folder: Sink, harm: str) -> None:
    h = header()
    rows = rows_of(h)
    store = in_folder.create(h)
    fill(store, rows)
    (path,) = files_of(store.url, 2)
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -1 if path.suffix == ".npy" else -31])
    assert store.corrupt() == ([0, 1, 2] if harm == "gone" and path.suffix == ".npy" else [2])
    with pytest.raises(StoreDamagedError, match="discard those units and resume"):
        store.read(1, 8, 11)
    for unit in store.corrupt():
        store.discard(unit)
    again = in_folder.create(h, resume=True)
    fill(again, rows, again.missing())
    assert again.corrupt() == []
    assert same(again.read(1, 0, 11), rows[1])


@pytest.mark.parametrize(
    ("kind", "left"),
    [("zarr", "loss/c.0123.partial"), ("safetensors", ".unit-00000001.safetensors.7-ab.tmp")],
)
def test_writers_that_were_killed_leave_nothing_for_long(
    kind: str, left: str, tmp_path: Path
) -> None:
    h = header()
    sink = SINKS[kind](tmp_path / "out")
    store = sink.create(h)
    fill(store, rows_of(h))
    path = tmp_path / "out" / left
    path.write_bytes(b"half")
    store.finish()
    assert not path.exists()
    path.write_bytes(b"half")
    sink.create(h, resume=True)
    assert not path.exists()
    assert store.corrupt() == []


WRITER = """
import pickle, sys
store, rows, units = pickle.load(sys.stdin.buffer)
receipts = []
for unit in units:
    start, stop = store.header.rows(unit)
    for _ in range(3):
        receipt = store.write(unit, [t[start:stop] for t in rows])
    receipts.append(receipt)
sys.stdout.buffer.write(pickle.dumps(receipts))
"""


@pytest.mark.parametrize("kind", FOLDERS)
def test_three_processes_write_at_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    h = header(101, 5, (OutputSpec("x", (37,), torch.float32), OutputSpec("y", (), torch.int64)))
    rows = rows_of(h)
    store = SINKS[kind]("out").create(
        h
    )  # a relative path: the writers have another working directory
    writers = []
    root = str(Path(__file__).parents[2])
    for i in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
        )
        assert process.stdin is not None
        process.stdin.write(
            pickle.dumps((store, rows, list(range(i, h.units, 3)) + [0]))
        )  # all three write unit 0
        process.stdin.close()
        writers.append(process)
    for process in writers:
        assert process.stdout is not None
        for receipt in pickle.loads(process.stdout.read()):
            store.commit(receipt)
        process.stdout.close()
        assert process.wait() == 0
    store.finish()
    assert store.corrupt() == []
    assert all(same(store.read(i, 0, 101), rows[i]) for i in range(2))


def test_threads_write_at_once(sink: Sink) -> None:
    h = header(101, 5)
    rows = rows_of(h)
    store = sink.create(h)
    with ThreadPoolExecutor(4) as pool:
        for receipt in pool.map(
            lambda unit: store.write(unit, unit_of(h, rows, unit)), range(h.units)
        ):
            store.commit(receipt)
    assert store.corrupt() == store.missing() == []
