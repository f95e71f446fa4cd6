"""Units of a store are computed again and compared.

What differs is found, and nothing is written.
"""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

import shardmap
from shardmap.errors import StoreError, StoreMismatchError
from shardmap.store import Recompute, Recomputed, open_store, recompute
from shardmap.store.recompute import _difference, choose
from tests.store.kinds import DTYPES, SINKS, random

X = torch.linspace(-1, 1, 23 * 3).view(23, 3)


def function(row: torch.Tensor):
    return {"sine": row.sin(), "count": (row > 0).sum()}


def stored(sink: object, fn=function, x: torch.Tensor = X) -> shardmap.Store:
    return shardmap.vmap(fn, out=sink, chunk_size=4)(x)


def again(where: object, fn=function, x: torch.Tensor = X, **options) -> Recomputed:
    return shardmap.vmap(fn, out=Recompute(where, **options), resume=True)(x)


@pytest.mark.parametrize("kind", list(SINKS))
def test_what_is_computed_again_is_equal_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    sink = SINKS[kind](tmp_path / "out")
    store = stored(sink)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    found = again(sink.where, units=6)
    assert [(c.unit, c.start, c.stop, c.exact, c.agrees) for c in found.comparisons] == [
        (k, *store.header.rows(k), True, True) for k in range(6)
    ]
    assert str(found.comparisons[1]) == "unit 1 (rows 4 to 7): equal to the last bit"
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_number_that_was_changed_with_its_checksum_is_found(tmp_path: Path) -> None:
    store = stored(shardmap.ZarrSink(tmp_path / "out"))
    rows = store.read_unit(2)
    rows[0][3, 1] += 0.5
    store.commit(store.write(2, rows))
    assert store.corrupt() == []
    found = again(store.url, units=[1, 2, 5]).comparisons
    assert [(c.unit, c.exact, c.agrees) for c in found] == [
        (1, True, True),
        (2, False, False),
        (5, True, True),
    ]
    assert (found[1].output, found[1].difference) == ("sine", pytest.approx(0.5))


def test_only_the_chosen_units_are_computed(tmp_path: Path) -> None:
    from shardmap.run.base import ChunkDone, listen

    store, events = stored(shardmap.MemmapSink(tmp_path / "out")), []
    with listen(lambda event: events.append(event) if isinstance(event, ChunkDone) else None):
        again(store.url, units=[1, 4])
    assert [(e.start, e.stop) for e in events] == [(4, 8), (16, 20)]


def test_draws_of_a_part_are_those_of_the_whole(tmp_path: Path) -> None:
    def noisy(row: torch.Tensor) -> torch.Tensor:
        return row + torch.rand(3)

    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        mapped = shardmap.vmap(
            noisy,
            randomness="different",
            chunk_size=4,
            out=Recompute(tmp_path / "out", [5, 2])
            if (tmp_path / "out").exists()
            else shardmap.MemmapSink(tmp_path / "out"),
            resume=True,
        )
        if seed == 4:
            with pytest.raises(StoreMismatchError, match="program: the function"):
                mapped(X)
        else:
            found = mapped(X)
    assert [c.exact for c in found.comparisons] == [True, True]


@pytest.mark.parametrize(
    ("fn", "x", "said"),
    [(torch.cos, X, "program: the function"), (torch.sin, X + 1, "data: the samples")],
)
def test_another_call_is_refused_in_words(fn, x: torch.Tensor, said: str, tmp_path: Path) -> None:
    stored(shardmap.MemmapSink(tmp_path / "out"), torch.sin)
    with pytest.raises(
        StoreMismatchError, match=f"cannot be compared, it holds another run: {said}"
    ):
        again(tmp_path / "out", fn, x)


def test_where_there_is_no_store_and_without_resume_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nothing there"):
        again(tmp_path / "out")
    stored(shardmap.MemmapSink(tmp_path / "out"))
    with pytest.raises(StoreError, match="pass resume=True"):
        shardmap.vmap(function, out=Recompute(tmp_path / "out"))(X)


def test_the_choice_depends_on_the_seed_and_leaves_out_what_is_missing_or_damaged(
    tmp_path: Path,
) -> None:
    store = stored(shardmap.MemmapSink(tmp_path / "out"))
    store.discard(3)
    store = open_store(store.url)
    assert choose(store, 100, damaged=[0]) == [1, 2, 4, 5]
    assert choose(store, 2, 7) == choose(store, 2, 7)
    assert len({tuple(choose(store, 2, seed)) for seed in range(30)}) > 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_differences_of_every_dtype(dtype: torch.dtype) -> None:
    old = random((5,), dtype)
    one, two = (
        torch.ones(5).to(dtype),
        torch.tensor([1, 1, 1, 0 if dtype == torch.bool else 8, 1]).to(dtype),
    )
    difference, allowed = _difference(one, two)
    assert difference == (1 if dtype == torch.bool else 7)
    assert difference > allowed
    assert _difference(two, one)[0] == difference
    if dtype.is_floating_point or dtype.is_complex:
        assert _difference(old, old)[0] == 0


def test_rounding_is_told_from_other_numbers() -> None:
    old = torch.tensor([1.0, 1000.0, torch.nan, torch.inf])
    for change, agrees in ((1e-3, True), (1e-2, False)):
        difference, allowed = _difference(old, old + torch.tensor([change, 0, 0, 0]))
        assert difference == pytest.approx(change, rel=1e-3)
        assert (difference <= allowed) is agrees
    for changed in (torch.nan, torch.inf, -torch.inf):
        new = old.clone()
        new[0] = changed
        difference, allowed = _difference(old, new)
        assert not difference <= allowed
    large = torch.tensor([2**60])
    difference, allowed = _difference(large, large + 1)
    assert not difference <= allowed


def test_the_example_in_its_docstring() -> None:
    result = doctest.testmod(recompute)
    assert result.attempted > 0
    assert result.failed == 0
