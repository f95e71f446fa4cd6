"""Samples come back as they are, whatever holds them, here and in another process."""

from __future__ import annotations

import doctest
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file
from torch.utils.data import IterableDataset, Subset

import shardmap
from shardmap.errors import SourceError, StoreError
from shardmap.store import (
    MemmapSink,
    SafetensorsSink,
    Source,
    ZarrSink,
    source,
)
from tests.store.kinds import DTYPES, fill, header, random, rows_of, same
from tests.store.source_kinds import (
    KINDS,
    Batched,
    N,
    Squares,
    make_npy,
    make_store,
    make_zarr,
    x_of,
)


@pytest.fixture(params=list(KINDS))
def given(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Source, torch.Tensor, bool]:
    """A source of each kind, the rows that it holds, and whether it travels."""
    travels, make, options = KINDS[request.param]
    t = x_of()
    return source(make(tmp_path, t), **options), t, travels


def test_every_kind_gives_its_rows(given: tuple[Source, torch.Tensor, bool]) -> None:
    s, t, travels = given
    assert len(s) == N
    assert s.travels is travels
    assert [(spec.shape, spec.dtype) for spec in s.specs] == [((2, 3), torch.float32)]
    assert s.specs[0].name in ("0", "x")
    for start in range(N + 1):
        for stop in range(start, N + 1):
            (rows,) = s.read(start, stop)
            assert same(rows, t[start:stop])
    for start, stop in ((-1, 2), (3, 2), (0, N + 1)):
        with pytest.raises(SourceError, match="out of range: there are 13"):
            s.read(start, stop)


def test_every_kind_has_the_digest_of_its_rows(given: tuple[Source, torch.Tensor, bool]) -> None:
    s, t, _ = given
    assert s.digest() == source(t).digest()
    changed = t.clone()
    changed[7, 1, 1] += 1
    assert s.digest() != source(changed).digest()


def test_every_kind_is_pickled(given: tuple[Source, torch.Tensor, bool], tmp_path: Path) -> None:
    s, t, travels = given
    s.read(0, 3)
    data = pickle.dumps(s)
    if travels:
        assert len(data) < 3000
    if "memory" not in repr(s.__dict__):
        assert same(pickle.loads(data).read(2, 9)[0], t[2:9])


READER = """
import pickle, sys
sources = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps([s.read(3, 8)[0].clone() for s in sources]))
"""


def test_what_travels_is_read_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    t = x_of()
    sources = []
    for number, (travels, make, options) in enumerate(KINDS.values()):
        if travels:
            folder = Path(str(number))  # relative: the reader has another working directory
            folder.mkdir()
            sources.append(source(make(folder, t), **options))
    sources += [source(Squares("tensor")), source(Batched("tensor"))]
    assert all(s.travels for s in sources)
    data = pickle.dumps(sources)
    root = str(Path(__file__).parents[2])
    read = pickle.loads(
        subprocess.run(
            [sys.executable, "-c", READER], input=data, capture_output=True, check=True, cwd=root
        ).stdout
    )
    assert all(same(rows, t[3:8]) for rows in read[:-2])
    assert all(
        same(rows, torch.arange(3.0, 8.0)[:, None] * torch.arange(4.0)) for rows in read[-2:]
    )


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    t = random((N, 3), dtype)
    digest = source(t).digest()
    for sink in (ZarrSink, SafetensorsSink, MemmapSink):
        (tmp_path / sink.__name__).mkdir()
        url = make_store(sink, tmp_path / sink.__name__, t)
        assert same(source(url).read(1, 9)[0], t[1:9])
        assert source(url).digest() == digest
    array = zarr.open_group(tmp_path / "ZarrSink" / "run", mode="r")["x"]
    assert same(
        source(array).read(0, N)[0], t
    )  # the attribute torch_dtype is honoured without the manifest
    if dtype not in (torch.complex32, torch.complex128, torch.float8_e8m0fnu):
        save_file({"x": t}, tmp_path / "x.safetensors")
        assert same(source(tmp_path / "x.safetensors").read(0, N)[0], t)


def test_extension_dtypes_of_numpy_are_known_by_name() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    t = torch.randn(N, 3).bfloat16()
    a = t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    assert same(source(a).read(2, 7)[0], t[2:7])


def test_complex_numbers_that_numpy_aligns_to_eight_bytes(tmp_path: Path) -> None:
    t = torch.randn(N, 3, dtype=torch.complex128)
    buffer = bytearray(8) + bytearray(t.numpy().tobytes())
    for offset_by in (0, 8):
        data = bytearray(offset_by) + buffer[8:]
        a = np.frombuffer(data, np.complex128, offset=offset_by).reshape(N, 3)
        assert same(source(a).read(0, N)[0].clone(), t)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=str)
def test_no_rows_and_no_elements(shape: tuple[int, ...], tmp_path: Path) -> None:
    t = torch.empty(shape)
    np.save(tmp_path / "x.npy", t.numpy())
    zarr.open_array(
        tmp_path / "x.zarr",
        mode="w",
        shape=shape,
        chunks=tuple(max(1, n) for n in shape),
        dtype="f4",
    )
    save_file({"x": t}, tmp_path / "x.safetensors")
    for obj in (t, t.numpy(), tmp_path / "x.npy", tmp_path / "x.zarr", tmp_path / "x.safetensors"):
        s = source(obj)
        assert len(s) == shape[0]
        assert same(s.read(0, shape[0])[0], t)
        assert s.digest() == source(t).digest()


def test_columns_of_different_kinds(tmp_path: Path) -> None:
    x, y, z = x_of(), x_of(()), x_of((5,))
    s = source(
        {
            "x": make_npy(tmp_path, x.numpy()),
            "y": y,
            "z": zarr.open_array(make_zarr(tmp_path, z.numpy()), mode="r"),
        }
    )
    assert [str(spec) for spec in s.specs] == ["x float32[2, 3]", "y float32[]", "z float32[5]"]
    assert not s.travels
    assert all(same(a, b[2:9]) for a, b in zip(s.read(2, 9), (x, y, z), strict=True))
    assert s.digest() == source((x, y, z)).digest() != source((x, z, y)).digest()
    assert source([make_npy(tmp_path, x.numpy()), make_npy(tmp_path, y.numpy(), "y.npy")]).travels


def test_names_select_or_rename(tmp_path: Path) -> None:
    x, y = x_of(), x_of(())
    assert [spec.name for spec in source((x, y), names=["a", "b"]).specs] == ["a", "b"]
    s = source({"x": x, "y": y}, names=["y"])
    assert [spec.name for spec in s.specs] == ["y"]
    assert same(s.read(0, N)[0], y)
    assert source(x, names=["a"]).specs[0].name == "a"
    h = header()
    store = ZarrSink(tmp_path / "out").create(h)
    rows = rows_of(h)
    fill(store, rows)
    s = source(store, names=["grad/weight", "loss"])
    assert same(s.read(3, 7)[0], rows[1][3:7])
    for obj, names, message in (
        ((x, y), ["a"], "there are 2 columns, and each needs a name"),
        ((x, y), ["a", "a"], "a list of different names"),
        ((x, y), "ab", "a list of different names"),
        ({"x": x}, [], "of at least one"),
        ({"x": x}, ["z"], "there is no column 'z'; there are 'x'"),
        (store, ["los"], "there is no column 'los'; there are 'loss', 'grad/weight'"),
    ):
        with pytest.raises(SourceError, match=message):
            source(obj, names=names)


def test_tensors_lose_their_graph_and_keep_their_storage() -> None:
    big = torch.randn(1000, 100, requires_grad=True)
    s = source(big[:N] * 1)
    assert not s.read(0, 3)[0].requires_grad
    view = source(big.detach()[:N])
    assert view.read(0, 5)[0].data_ptr() == big.data_ptr()
    assert len(pickle.dumps(view)) < 8000
    expanded = source(torch.ones(1, 3).expand(N, 3))
    assert same(pickle.loads(pickle.dumps(expanded)).read(0, N)[0], torch.ones(N, 3))
    lazy = source(torch.randn(N, 3, dtype=torch.complex64).conj())
    assert lazy.digest() == source(lazy.read(0, N)[0].resolve_conj()).digest()


def test_a_source_is_a_source() -> None:
    s = source(x_of())
    assert source(s) is s
    assert repr(s) == "Columns(13 rows of 0 float32[2, 3])"


def test_a_digest_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    t = x_of()
    digest = source(t).digest()
    monkeypatch.setattr("shardmap.store.sources._BLOCK_BYTES", 50)
    assert source(t).digest() == digest
    assert source(t.reshape(N, 6)).digest() != digest
    assert source(t.view(torch.int32)).digest() != digest


# Datasets.


@pytest.mark.parametrize("kind", [Squares, Batched])
@pytest.mark.parametrize(
    ("form", "names", "dtypes"),
    [
        ("tensor", ["0"], [torch.float32]),
        ("number", ["0"], [torch.int64]),
        ("tuple", ["0", "1"], [torch.float32, torch.int64]),
        ("named", ["0", "1"], [torch.float32, torch.int64]),
        ("list", ["0", "1"], [torch.float32, torch.float64]),
        ("dict", ["x", "label", "w"], [torch.float32, torch.int64, torch.bool]),
        ("numpy", ["0", "1"], [torch.float32, torch.int32]),
    ],
)
def test_datasets_are_read_in_order(
    kind: type[Squares], form: str, names: list[str], dtypes: list[torch.dtype]
) -> None:
    dataset = kind(form)
    s = source(dataset)
    assert len(s) == N
    assert s.travels
    assert [spec.name for spec in s.specs] == names
    assert [spec.dtype for spec in s.specs] == dtypes
    columns = s.read(2, 9)
    for i in range(2, 9):
        item = dataset[i]
        item = (
            list(item.values())
            if isinstance(item, dict)
            else list(item)
            if isinstance(item, tuple | list)
            else [item]
        )
        for column, value, dtype in zip(columns, item, dtypes, strict=True):
            assert torch.equal(column[i - 2], torch.as_tensor(value, dtype=dtype))
    assert all(len(c) == 0 and c.dtype == d for c, d in zip(s.read(4, 4), dtypes, strict=True))
    assert pickle.loads(pickle.dumps(s)).digest() == s.digest()
    assert s.digest() == source(s.read(0, N)).digest()


def test_columns_of_datasets_are_selected_or_renamed() -> None:
    s = source(Squares("dict"), names=["label", "x"])
    assert [spec.name for spec in s.specs] == ["label", "x"]
    assert torch.equal(s.read(3, 5)[0], torch.tensor([3, 4]))
    assert [spec.name for spec in source(Squares("tuple"), names=["a", "b"]).specs] == ["a", "b"]
    with pytest.raises(SourceError, match="there is no column 'y'"):
        source(Squares("dict"), names=["y"])


def test_which_datasets_travel() -> None:
    class Local(Squares):
        pass

    assert not source(Local("tensor")).travels
    assert not source(
        Squares("tensor", weight=torch.zeros(5 << 20))
    ).travels  # 20 MiB would go to every worker
    assert source(Subset(Squares("tensor"), [3, 1, 2])).travels
    assert not source(Subset(Local("tensor"), [1])).travels
    held: Any = Squares("tensor")
    held.weight = (i for i in range(3))  # cannot be pickled
    assert not source(held).travels
    assert torch.equal(
        source(Subset(Squares("number"), [3, 1, 2])).read(0, 3)[0], torch.tensor([3, 1, 2])
    )


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            "text",
            "gives list for '1': items have to be tensors, numbers, or one tuple or dict of "
            "them|gives tuple for '1'",
        ),
        ("nested", "for '1': items have to be tensors"),
        ("none", "items 0 to 0 cannot be put side by side"),
    ],
)
def test_datasets_whose_items_are_no_columns(form: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        source(Squares(form))


def test_datasets_whose_items_differ() -> None:
    with pytest.raises(SourceError, match="items 3 to 5 cannot be put side by side"):
        source(Squares("ragged")).read(3, 6)
    with pytest.raises(
        SourceError, match=r"items 6 to 7 are torch.float64 \[2\], the first is 0 float32\[2\]"
    ):
        source(Squares("drift")).read(6, 8)
    with pytest.raises(SourceError, match="is empty, so that nothing tells the shapes"):
        source(Squares("tensor", 0))


# Refusals.


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (None, "samples cannot be read from None"),
        (3, "samples cannot be read from 3"),
        ([], "samples cannot be read from a list"),
        ({}, "samples cannot be read from a dict"),
        ([1, 2], "column 0 is 1, where a tensor"),
        ([torch.zeros(2), "x.txt"], "x.txt is not there"),
        ({"a": {"b": torch.zeros(2)}}, "column 'a' is a dict, where a tensor"),
        (torch.tensor(1.0), "is a single number: its first dimension"),
        (np.array(1.0), "is a single number"),
        (torch.zeros(3).to_sparse(), "give a dense one"),
        (np.array(["a", "b"]), "has dtype <U1, of which no tensor can be made"),
        (np.array([None, 1]), "Python objects are never loaded"),
        (np.array(["2020-01-01"], "M8[D]"), "torch has no such dtype"),
        (
            {"x": torch.zeros(3), "y": torch.zeros(4)},
            "different numbers of rows .x: 3, y: 4.: select those",
        ),
        ("no/such/place", "/no/such/place is not there: check the path"),
        ("no/such/x.npy", "x.npy is not there"),
        (["a.safetensors", "b.safetensors"], "a.safetensors is not there"),
        ("memory://x.npy", "files of this kind are read from folders only"),
        ("memory://nothing", "no zarr array or group that can be opened"),
        (Endless(), "Endless can only be read from its beginning"),
    ],
)
def test_what_is_refused(obj: Any, message: str) -> None:
    with pytest.raises((SourceError, StoreError), match=message):
        source(obj)


def test_files_that_are_refused(tmp_path: Path) -> None:
    t = x_of()
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00nonsense")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    np.save(tmp_path / "objects.npy", np.array([{}, 1]), allow_pickle=True)
    np.save(tmp_path / "single.npy", np.array(1.0))
    whole = Path(make_npy(tmp_path, t.numpy(), "cut.npy"))
    whole.write_bytes(whole.read_bytes()[:-1])
    save_file({"x": t}, tmp_path / "a.safetensors")
    save_file({"x": t.double()}, tmp_path / "b.safetensors")
    save_file({"x": torch.tensor(1.0)}, tmp_path / "c.safetensors")
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    for obj, message in (
        ("folder", "is nothing that samples can be read from: neither a `.npy` or"),
        ("notes.txt", "is nothing that samples can be read from"),
        ("bad.npy", "is no .npy file that can be read"),
        ("objects.npy", "it holds Python objects, which are never loaded"),
        ("single.npy", "is a single number"),
        ("cut.npy", "is cut short: it has 439 bytes of 440"),
        ("bad.safetensors", "is no safetensors file that can be read"),
        ("c.safetensors", "x is a single number"),
        ("empty.zarr", "has no arrays"),
    ):
        with pytest.raises(SourceError, match=message):
            source(tmp_path / obj)
    with pytest.raises(
        SourceError,
        match="b.safetensors does not continue .*a.safetensors: x is in one only, or has another "
        "shape or dtype",
    ):
        source([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    group = zarr.open_group(tmp_path / "group", mode="w")
    for name in "ab":
        group.create_array(name, shape=(3,), dtype="f4")
    with pytest.raises(SourceError, match="column 0 has several columns: give it alone"):
        source([tmp_path / "group"])


def test_stores_that_are_not_finished_are_refused(tmp_path: Path) -> None:
    h = header()
    store = ZarrSink(tmp_path / "out").create(h)
    fill(store, rows_of(h), [1])
    for obj in (store, tmp_path / "out"):
        with pytest.raises(
            SourceError, match="2 of 3 units are missing: resume the run that writes them first"
        ):
            source(obj)


def test_files_that_go_later_are_told(tmp_path: Path) -> None:
    t = x_of()
    npy, cut = (
        source(make_npy(tmp_path, t.numpy())),
        source(make_npy(tmp_path, t.numpy(), "cut.npy")),
    )
    save_file({"x": t}, tmp_path / "x.safetensors")
    tensors = source(tmp_path / "x.safetensors")
    (tmp_path / "x.npy").unlink()
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    (tmp_path / "x.safetensors").unlink()
    for s in (npy, cut, tensors):
        with pytest.raises(SourceError, match="it must be there, whole, on every machine"):
            s.read(0, 3)


def test_the_example() -> None:
    result = doctest.testmod(sys.modules[source.__module__])
    assert result.attempted > 0
    assert result.failed == 0


def test_a_loop_over_a_source_is_refused_and_its_remedies_work() -> None:
    x = torch.arange(6.0).view(3, 2)
    columns_of = source({"x": x})
    with pytest.raises(SourceError, match=r"map over source\.columns.*source\['x'\]"):
        list(columns_of)
    for columns in (columns_of.columns, [columns_of["x"]]):
        torch.testing.assert_close(shardmap.vmap(torch.sin)(*columns), x.sin())
