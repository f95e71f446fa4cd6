"""compile=True and "auto": the loop's values on every path, fallbacks with one warning."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap import errors
from shardmap.lower import cache, compiled, graphs
from shardmap.rules import registry
from shardmap.run import compiled as running
from tests.run.rows import assert_close, batch, loop

W = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))


def function(row: Tensor) -> tuple[Tensor, Tensor]:
    """Products, a scan, pointwise calls, and an outer product that ends as an output."""
    hidden = torch.tanh(row @ W)
    return hidden.cumsum(0) * row.sum(), torch.outer(hidden.sin(), torch.cat([row] * 8))


pytestmark = pytest.mark.rotating  # each compilation takes ten seconds


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of compiled programs for the tests of this file."""
    found = tmp_path_factory.mktemp("compiled")
    found.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDMAP_CACHE", str(found))
        yield found


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """A test fails if anything runs uncompiled without its asking for it."""
    cache.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.CompileWarning)
        yield


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each compiled graph that ran."""
    found: list[int] = []
    plain = compiled.Library.__call__

    def counting(self: compiled.Library, *tensors: Tensor) -> list[Tensor]:
        found.append(len(tensors))
        return plain(self, *tensors)

    monkeypatch.setattr(compiled.Library, "__call__", counting)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"devices": ["cpu", "cpu"]},
        {"trace": "once"},
        {"out_dims": (1, 0)},
        {"memory_budget": "1GiB"},
    ],
)
def test_chunks_of_the_planned_size_run_compiled(options: Any, runs: list[int]) -> None:
    x = batch(7)
    mapped = shardmap.vmap(function, compile=True, chunk_size=3, **options)
    first, second = loop(function, x)
    expected = [first.T if "out_dims" in options else first, second]
    for _ in range(3):
        assert_close(mapped(x), expected)
    if "devices" in options:
        assert runs  # lanes share the rest in smaller chunks
    else:
        assert len(runs) >= 6, "each call has two chunks of 3"


def test_samples_that_differ_from_the_compared_ones() -> None:
    mapped = shardmap.vmap(function, compile=True, chunk_size=3)
    for size in (3, 6, 17):
        assert_close(mapped(batch(size)), loop(function, batch(size)))


@pytest.mark.slow
def test_reduced_outputs() -> None:
    x = batch(7)
    expected = [t.sum(0) for t in loop(function, x)]
    mapped = shardmap.vmap(function, compile=True, chunk_size=3, reduce="sum")
    assert_close(mapped(x), expected)
    norms = shardmap.vmap(function, compile=True, chunk_size=3, reduce="max")
    assert_close(norms(x), [t.amax(0) for t in loop(function, x)])


def test_a_store(tmp_path: Path, runs: list[int]) -> None:
    x = batch(7)
    sink = shardmap.MemmapSink(tmp_path / "store")
    store = shardmap.vmap(function, compile=True, chunk_size=3, out=sink)(x)
    assert_close([store.read(k, 0, 7) for k in (0, 1)], loop(function, x))
    assert runs


@pytest.mark.slow
def test_an_empty_batch_and_a_single_sample() -> None:
    mapped = shardmap.vmap(function, compile=True)
    assert [t.shape for t in mapped(batch(0))] == [(0, 5), (0, 5, 40)]
    assert_close(mapped(batch(1)), loop(function, batch(1)))


def test_draws_are_those_of_the_eager_program(runs: list[int]) -> None:
    def dropped(row: Tensor) -> Tensor:
        return torch.nn.functional.dropout(row @ W, 0.5) * 2 + torch.rand_like(row)

    x, results = batch(7), []
    for compile in (False, True):
        torch.manual_seed(3)
        mapped = shardmap.vmap(dropped, randomness="different", compile=compile, chunk_size=4)
        results.append(mapped(x))
    assert runs
    assert torch.equal(results[0] == 0, results[1] == 0)
    torch.testing.assert_close(*results)
    text = shardmap.plan(dropped, randomness="different", compile=True, chunk_size=4)(x).explain()
    assert "chunks of 4 samples on cpu run compiled by Inductor; beside them run" in text
    assert "uniform" in text


def test_a_failed_factorisation_raises_as_it_does_uncompiled() -> None:
    def root(matrix: Tensor) -> Tensor:
        return torch.linalg.cholesky(matrix).sin() * 2

    x = torch.eye(3).expand(5, 3, 3).clone() + 0.1 * torch.arange(5.0)[:, None, None] * torch.eye(3)
    mapped = shardmap.vmap(root, compile=True, chunk_size=2)
    assert_close(mapped(x), loop(root, x))
    x[2] = -torch.eye(3)
    with pytest.raises(RuntimeError, match="positive-definite"):
        mapped(x)


def test_an_integer_divided_by_zero_raises() -> None:
    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return (a // b) * 2 + a

    a, b = torch.arange(12).view(4, 3), torch.arange(1, 13).view(4, 3)
    mapped = shardmap.vmap(ratio, compile=True, chunk_size=2)
    assert_close(mapped(a, b), loop(ratio, a, b))
    b[3, 1] = 0
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        mapped(a, b)


# -- what runs uncompiled, and says so


def warned(reason: str) -> Any:
    """One warning with this reason is expected."""
    return pytest.warns(errors.CompileWarning, match=f"runs uncompiled: .*{reason}")


def test_gradients_from_outside() -> None:
    x = batch(6).requires_grad_()
    mapped = shardmap.vmap(function, compile=True, chunk_size=3)
    with warned("under torch.no_grad"):
        found = mapped(x)
    (got,) = torch.autograd.grad(found[0].sum() + found[1].sum(), x)
    expected = loop(function, x)
    (want,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), x)
    torch.testing.assert_close(got, want)
    mapped(x)  # said once
    assert "under torch.no_grad" in shardmap.plan(function, compile=True)(x).explain()
    with torch.no_grad():
        assert_close(mapped(x), loop(function, x))


def test_transforms_around_the_call() -> None:
    x = batch(3)
    mapped = shardmap.vmap(function, compile=True)
    with warned("under torch.no_grad"):
        got = torch.func.jacrev(lambda t: mapped(t)[0].sum(0))(x)
    want = torch.func.jacrev(lambda t: torch.func.vmap(function)(t)[0].sum(0))(x)
    torch.testing.assert_close(got, want)


def test_writes_to_an_argument() -> None:
    x = batch(4)
    mapped = shardmap.vmap(lambda r: r.mul_(2).sin(), compile=True, chunk_size=2)
    expected = (2 * x).sin()
    with warned("writes in place to an argument"):
        found = mapped(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_number_that_changes(runs: list[int]) -> None:
    rate = 0.5

    def scaled(row: Tensor) -> Tensor:
        return torch.tanh(row @ W) * rate

    x, mapped = batch(6), shardmap.vmap(scaled, compile=True, chunk_size=3)
    assert_close(mapped(x), loop(scaled, x))
    ran = len(runs)
    rate = 0.25
    with warned("a number that the function reads has changed"):
        found = mapped(x)
    assert_close(found, loop(scaled, x))
    assert len(runs) == ran
    rate = 0.5
    assert_close(mapped(x), loop(scaled, x))
    assert len(runs) == ran + 2


def test_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compiled.Library.__call__

    def wrong(self: compiled.Library, *tensors: Tensor) -> list[Tensor]:
        found = plain(self, *tensors)
        found[0][-1] += 0.1  # of the last sample alone
        return found

    monkeypatch.setattr(compiled.Library, "__call__", wrong)
    mapped = shardmap.vmap(function, compile=True, chunk_size=3)
    with warned("output [01] differs from the uncompiled program's"):
        found = mapped(batch(7))
    assert_close(found, loop(function, batch(7)))
    assert_close(mapped(batch(6)), loop(function, batch(6)))


def test_an_error_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: graphs.Graphs, folder: Path) -> float:
        raise RuntimeError("no such processor\nand more")

    monkeypatch.setattr(graphs.Graphs, "compiled_into", broken)
    mapped = shardmap.vmap(lambda r: function(r)[0] + 1, compile=True)
    with warned("RuntimeError: no such processor$"):
        found = mapped(batch(6))
    assert_close(found, [loop(function, batch(6))[0] + 1])


def test_an_error_while_a_chunk_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = shardmap.vmap(function, compile=True, chunk_size=3)
    mapped(batch(6))

    def broken(self: compiled.Library, *tensors: Tensor) -> list[Tensor]:
        raise RuntimeError("the library is gone")

    monkeypatch.setattr(compiled.Library, "__call__", broken)
    with warned("a compiled chunk raised RuntimeError: the library is gone"):
        found = mapped(batch(7))
    assert_close(found, loop(function, batch(7)))


@pytest.mark.slow
def test_a_damaged_library_is_compiled_again(folder: Path, runs: list[int]) -> None:
    mapped = shardmap.vmap(function, compile=True, chunk_size=3)
    mapped(batch(6))
    for library in folder.glob("*/*.so"):
        whole = library.read_bytes()
        library.unlink()  # this process has the old one loaded
        library.write_bytes(whole[:1000])
    cache.clear()
    with pytest.warns(errors.CompileWarning, match="is damaged .*removed and compiled again"):
        found = mapped(batch(7))
    assert_close(found, loop(function, batch(7)))
    cache.clear()
    runs.clear()
    assert_close(mapped(batch(7)), loop(function, batch(7)))
    assert runs


@pytest.mark.slow
def test_a_folder_that_others_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("SHARDMAP_CACHE", str(tmp_path))
    mapped = shardmap.vmap(lambda r: function(r)[0] * 3, compile=True)
    with pytest.warns(errors.CompileWarning, match="other users can write to it"):
        found = mapped(batch(3))
    assert_close(found, [loop(function, batch(3))[0] * 3])
    assert list(tmp_path.iterdir()) == []


# -- in the background


@pytest.mark.slow
def test_auto_compiles_beside_a_run_and_switches(
    monkeypatch: pytest.MonkeyPatch, runs: list[int]
) -> None:
    def slow(row: Tensor) -> Tensor:
        return (torch.tanh(row @ W) + 1).cumsum(0)

    x, mapped = batch(9), shardmap.vmap(slow, compile="auto", chunk_size=2)
    assert_close(mapped(x), loop(slow, x))
    assert not runs, "a short run is not worth it"
    monkeypatch.setattr(running, "WORTH", 0)
    began = time.perf_counter()
    assert_close(mapped(x), loop(slow, x))
    assert not runs, "nobody waits"
    text = shardmap.plan(slow, compile="auto", chunk_size=2)(x).explain()
    assert "a process compiles it in the background" in text
    while not runs and time.perf_counter() - began < 400:
        time.sleep(0.5)
        assert_close(mapped(x), loop(slow, x))
    assert runs
    assert_close(mapped(x), loop(slow, x))


def test_auto_warns_of_an_error_of_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WORTH", 0)
    monkeypatch.setattr(running, "_settings", lambda: {"threads": -1})
    # another test may have registered rules, which the other process would lack
    monkeypatch.setattr(running, "_BUILT_IN", registry.version())
    x, mapped = batch(9), shardmap.vmap(lambda r: function(r)[0] - 1, compile="auto", chunk_size=2)
    expected = [loop(function, x)[0] - 1]
    assert_close(mapped(x), expected)
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")  # a file that another test has left open warns here as well
        warnings.simplefilter("always", errors.CompileWarning)
        while not seen and time.perf_counter() - began < 240:
            assert_close(mapped(x), expected)
            time.sleep(0.2)
    assert any("Error" in str(warning.message) for warning in seen)


# -- options


def test_wrong_values_of_the_options() -> None:
    with pytest.raises(errors.OptionError, match=r"compile='never'; pass True, False, or 'auto'"):
        shardmap.vmap(function, compile="never")


@pytest.mark.slow
def test_transforms_take_the_option() -> None:
    x = batch(6)

    def half(row: Tensor) -> Tensor:
        return function(row)[0]

    got = shardmap.jacrev(half, compile=True, chunk_size=3)(x)
    torch.testing.assert_close(got, torch.func.vmap(torch.func.jacrev(half))(x))


def test_values_that_the_first_chunk_did_not_show() -> None:
    """Inductor folds x * 0 and keeps halves in float unless told otherwise: NaN and inf were lost."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.half() * 0.01, (x * 0).sum(0), x.half() * 2.5, x.bfloat16().sum()

    mapped = shardmap.vmap(function, compile=True, chunk_size=5)
    batch = torch.randn(10, 5)
    mapped(batch)
    batch[7, 0], batch[3, 2], batch[4, 2] = 1e5, float("inf"), float("nan")
    found = mapped(batch)
    for n, row in enumerate(batch):
        for one, expected in zip(found, function(row), strict=True):
            assert torch.equal(one[n].nan_to_num(3, 4, 5), expected.nan_to_num(3, 4, 5))
