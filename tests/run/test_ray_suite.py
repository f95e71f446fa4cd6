"""The suite of the local executor, on Ray's workers.

The loop's values, draws and reductions, whatever the chunks and dimensions.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from shardmap.run import combine, driver
from shardmap.run.base import ChunkDone, RunStarted, listen
from shardmap.store.stored import StoreColumn
from tests import oracle
from tests.on_ray import TWO, local_ray
from tests.reduce.expected import DTYPES, batch_of, exact, permitted
from tests.reduce.test_reduce_outputs import (
    TREES,
    several,
    unchanged_outputs_count_for_each_sample,
)
from tests.run.subjects import SUBJECTS, setting, values
from tests.run.test_local import DRAWS

pytestmark = [pytest.mark.ray, pytest.mark.rotating]

CHUNKS: tuple[Any, ...] = ("auto", None, 1, 5, 1000)


@pytest.fixture(scope="module", autouse=True)
def _local_ray() -> Iterator[None]:
    with local_ray():
        yield


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_map_equals_the_loop(name: str) -> None:
    """Values, dtypes, structure, memory of its own, and contiguous as torch.stack makes it."""
    what = SUBJECTS[name]
    dims = itertools.cycle(
        [
            tuple(0 for _ in what.shapes),
            tuple(len(s) for s in what.shapes),
            tuple(-1 for _ in what.shapes),
        ]
    )
    for (samples, chunk_size), dtype in zip(
        itertools.product((0, 1, 3, 13), CHUNKS), itertools.cycle(what.dtypes), strict=False
    ):
        call = {
            "name": name, "dtype": dtype, "samples": samples, "in_dims": next(dims), "out_dim":
            -(samples % 2), "devices": TWO, "chunk_size": chunk_size, "output_device": None,
            "remat": False, "trace": "once" if samples == 3 else "each",
        }  # fmt: skip
        verdict = oracle.compare(
            setting(call, False), shardmap.vmap, oracle.Checks(gradient=False, refusals=())
        )
        assert verdict.kind == "right", (call, verdict.detail)
        built = setting(call, False)()
        assert all(t.is_contiguous() for t in pytree.tree_leaves(built.run(shardmap.vmap))), call


@pytest.mark.parametrize("reduce", [None, "max", "sum"])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_those_of_the_local_executor(name: str, reduce: Any) -> None:
    """Bit for bit, whichever worker makes them; sums to rounding."""
    batch = values(1, 13, 5, dtype=torch.float32)
    torch.manual_seed(5)
    want = pytree.tree_leaves(
        shardmap.vmap(DRAWS[name], randomness="different", reduce=reduce)(batch)
    )
    for chunk_size in CHUNKS:
        torch.manual_seed(5)
        mapped = shardmap.vmap(
            DRAWS[name], randomness="different", devices=TWO, chunk_size=chunk_size, reduce=reduce
        )
        for got, one in zip(pytree.tree_leaves(mapped(batch)), want, strict=True):
            tolerance = (
                {"rtol": 1e-6, "atol": 1e-6} if reduce == "sum" else {"rtol": 0.0, "atol": 0.0}
            )
            torch.testing.assert_close(got, one, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_named_reductions_equal_torchs_of_the_stack(name: str, dtype: torch.dtype) -> None:
    for samples in (1, 3, 101):
        batch = batch_of(dtype, samples, 2, 3)
        for chunk_size in CHUNKS:
            mapped = shardmap.vmap(
                lambda x: x.flip(0), reduce=name, chunk_size=chunk_size, devices=TWO
            )
            if not permitted(name, dtype):
                with pytest.raises(errors.OptionError, match=f"reduce='{name}'.*{dtype}"):
                    mapped(batch)
                continue
            oracle.assert_same(
                mapped(batch),
                exact(name, oracle.loop(lambda x: x.flip(0))(batch)),
                f"{samples}, {chunk_size}",
            )


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("samples", [53, 101])
def test_large_reduced_outputs_are_put_together_by_workers(
    name: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of eight tasks, the last one of fewer.

    The same bits however often, in whatever order tasks end.
    """
    combined: list[int] = []
    take = combine.Combiner.take
    monkeypatch.setattr(
        combine.Combiner, "take", lambda self, ref: combined.append(1) or take(self, ref)
    )
    batch = batch_of(torch.float32, samples, 200)
    mapped = shardmap.vmap(
        lambda x: (torch.outer(x, x), x.sum()), reduce=(name, None), chunk_size=2, devices=TWO
    )
    results = [mapped(batch) for _ in range(3)]
    stacked = torch.stack([torch.outer(x, x) for x in batch])
    torch.testing.assert_close(results[0][0], exact(name, stacked), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], batch.sum(1))
    assert all(torch.equal(r[0], results[0][0]) for r in results)
    tasks = math.ceil(samples / 2)
    assert len(combined) == 3 * math.ceil(tasks / combine.FAN)


@pytest.mark.parametrize("reduce", TREES)
@pytest.mark.parametrize("chunk_size", ["auto", 3])
def test_each_output_has_its_reduction(reduce: Any, chunk_size: Any) -> None:
    batch = batch_of(torch.float64, 7, 3)
    got = shardmap.vmap(several, 0, -1, reduce=reduce, chunk_size=chunk_size, devices=TWO)(batch)
    here = shardmap.vmap(several, 0, -1, reduce=reduce)(batch)
    for i, (g, w) in enumerate(zip(pytree.tree_leaves(got), pytree.tree_leaves(here), strict=True)):
        oracle.assert_same(g, w, f"output {i}")
        assert g.is_contiguous()


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_an_output_that_no_sample_changes_counts_once_for_each(chunk_size: Any) -> None:
    unchanged_outputs_count_for_each_sample(chunk_size=chunk_size, devices=TWO)


@pytest.mark.parametrize("samples", [1, 2, 7, 13])
@pytest.mark.parametrize("chunk_size", ["auto", 1, 3])
def test_a_fold_keeps_the_order_of_the_samples(samples: int, chunk_size: Any) -> None:
    batch = batch_of(torch.float64, samples, 2, 2)
    got = shardmap.vmap(
        lambda m: m / 2,
        reduce=shardmap.reduce.fold(torch.matmul),
        chunk_size=chunk_size,
        devices=TWO,
    )(batch)
    torch.testing.assert_close(got, functools.reduce(torch.matmul, (batch / 2).unbind(0)))


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("samples", [0, 1, 13])
def test_every_sample_is_computed_once(chunk_size: Any, samples: int) -> None:
    events: list[Any] = []
    with listen(events.append):
        shardmap.vmap(torch.sin, devices=TWO, chunk_size=chunk_size)(torch.zeros(samples))
    done = [e for e in events if isinstance(e, ChunkDone)]
    assert sorted(i for e in done for i in range(e.start, e.stop)) == list(range(samples))
    if isinstance(chunk_size, int):
        assert max(e.stop - e.start for e in done) <= chunk_size
    assert [e.samples for e in events if isinstance(e, RunStarted)] == [samples]


@pytest.mark.parametrize("reduce", ["max", "min", (torch.add, None)])
def test_reductions_of_no_samples_are_refused(reduce: Any) -> None:
    with pytest.raises(errors.EmptyBatchError):
        shardmap.vmap(torch.sin, devices=TWO, reduce=reduce)(torch.zeros(0, 3))


def test_columns_of_sources_travel_or_are_read_by_the_workers(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a file are read where they are needed; those in memory are sent."""
    images, labels = values(1, 23, 2, 3, dtype=torch.float32), values(2, 23, dtype=torch.int64)
    np.save(tmp_path / "images.npy", images.numpy())
    columns = (
        shardmap.source(str(tmp_path / "images.npy")).columns[0],
        shardmap.source({"y": labels})["y"],
    )
    sent: list[tuple[bool, ...]] = []
    task = driver.Task
    monkeypatch.setattr(
        driver, "Task", lambda *a: sent.append(tuple(p is None for p in a[2])) or task(*a)
    )

    def function(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return x * y + z

    for chunk_size in ("auto", 1, 5):
        got = shardmap.vmap(function, devices=TWO, chunk_size=chunk_size)(*columns, labels)
        oracle.assert_same(
            got, oracle.loop(function)(images, labels, labels), f"chunk_size={chunk_size}"
        )
    assert set(sent) == {(True, False, False)}


def test_results_larger_than_the_budget_are_refused_with_the_remedy() -> None:
    x = torch.ones(600, 100, 100)
    with pytest.raises(
        errors.OverBudget,
        match=r"results need 22\.9 MiB on cpu, where they are gathered.*ZarrSink\(path\).*reduce=",
    ):
        shardmap.vmap(lambda m: m * 2, devices=TWO, memory_budget="16MiB")(x)
    small = shardmap.vmap(lambda m: m * 2, devices=TWO, memory_budget="16MiB", reduce="sum")(x)
    assert torch.equal(small, x.sum(0) * 2)


def test_one_sample_that_does_not_fit_on_a_worker_is_refused_in_words() -> None:
    with pytest.raises(
        errors.OverBudget,
        match=r"not even one sample fits.*\(samples \d to \d, ray:\d \(process \d+ on",
    ):
        shardmap.vmap(lambda v: torch.outer(v, v).sum(), devices=TWO, memory_budget="1MiB")(
            torch.ones(5, 2000)
        )


def test_workers_plan_their_own_chunks_within_the_budget() -> None:
    """A task of 40 samples would need 1.2 GiB at once."""
    x = values(3, 80, 2000, dtype=torch.float32)
    got = shardmap.vmap(
        lambda v: torch.outer(v, v).cumsum(0).sin().sum(),
        devices=TWO,
        memory_budget="128MiB",
        chunk_size="auto",
    )(x)
    want = torch.stack([torch.outer(v, v).cumsum(0).sin().sum() for v in x])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


def test_plans_have_a_lane_for_each_worker() -> None:
    x = values(1, 101, 5, dtype=torch.float32)
    plan = shardmap.plan(lambda v: v.outer(v), devices=TWO, chunk_size=7)(x)
    assert [(lane.name, lane.rows) for lane in plan.lanes] == [("ray:0", 51), ("ray:1", 50)]
    assert all(lane.budget_bytes and lane.peak_bytes > 0 for lane in plan.lanes)
    assert "ray:1" in str(plan)
    assert "ray:0" in plan.explain()
    assert torch.equal(plan.run(), shardmap.vmap(lambda v: v.outer(v), chunk_size=7)(x))
    over = shardmap.plan(lambda v: v.outer(v), devices=TWO, memory_budget="1KiB")(x)
    assert not over.fits
    with pytest.raises(errors.OverBudget, match="results need"):
        over.run()


def test_what_is_in_a_store_is_told_apart_by_its_checksums(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large store passes once through the workers, and not through the driver for the sake of a
    hash."""
    x = values(1, 23, 5, dtype=torch.float32)
    shardmap.vmap(lambda v: v * 2, chunk_size=4, out=shardmap.ZarrSink(tmp_path / "doubled"))(x)
    read: list[tuple[int, int]] = []
    rows = StoreColumn.read
    monkeypatch.setattr(
        StoreColumn, "read", lambda self, a, b: read.append((a, b)) or rows(self, a, b)
    )
    sink = shardmap.ZarrSink(tmp_path / "sines")

    def sines() -> shardmap.Store:
        (column,) = shardmap.source(str(tmp_path / "doubled")).columns
        return shardmap.vmap(torch.sin, devices=TWO, chunk_size=4, out=sink, resume=True)(column)

    assert torch.equal(sines().read(0, 0, 23), shardmap.vmap(torch.sin, chunk_size=4)(x * 2))
    assert set(read) == {(0, 3), (0, 1), (22, 23)}, "the rows that are recorded and tried"
    assert sines().missing() == []
    shardmap.vmap(
        lambda v: v * 3, chunk_size=4, out=shardmap.ZarrSink(tmp_path / "doubled", overwrite=True)
    )(x)
    with pytest.raises(errors.StoreMismatchError, match="the samples have changed"):
        sines()
