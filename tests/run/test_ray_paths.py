"""Samples that go different ways on a real Ray of this machine: every sample against the loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.call import into_store
from tests import oracle
from tests.call.paths import batch, expected
from tests.call.test_path_draws import loops, on_both
from tests.call.test_paths import branch, branch_in_a_branch, masked_values, newton
from tests.on_ray import TWO, local_ray

Tensor = torch.Tensor
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _local_ray() -> Iterator[None]:
    with local_ray():
        yield


@pytest.fixture(autouse=True)
def _nothing_looped() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", shardmap.SlowLoopWarning)
        yield


@pytest.mark.parametrize("chunk", [7, "auto"])
@pytest.mark.parametrize("function", [branch, branch_in_a_branch, masked_values, newton])
def test_stored(function: Any, chunk: Any, tmp_path: Path) -> None:
    x = batch(131)
    want = expected(function, x)
    for name in ("first", "second"):
        sink = shardmap.MemmapSink(tmp_path / name)
        store = shardmap.vmap(function, devices=TWO, out=sink, chunk_size=chunk)(x)
        torch.testing.assert_close(torch.as_tensor(store.read("result", 0, 131)), want)


def test_a_store_is_written_a_few_units_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(into_store, "WINDOW_BYTES", 300)
    x = batch(61)
    sink = shardmap.ZarrSink(tmp_path / "rows")
    store = shardmap.vmap(branch, devices=TWO, out=sink, chunk_size=5)(x)
    oracle.assert_same(torch.as_tensor(store.read("result", 0, 61)), expected(branch, x), "stored")


def test_a_store_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a run that was killed, units that are there are not computed again."""
    monkeypatch.setattr(into_store, "WINDOW_BYTES", 300)
    x, sink = batch(61), shardmap.MemmapSink(tmp_path / "rows")
    options: dict[str, Any] = {"devices": TWO, "out": sink, "chunk_size": 5}
    whole, windows = into_store.groups_into_store, 0

    def killed(job: Any, opts: Any, structure: Any, cluster: Any, compute: Any) -> Any:
        def few(start: int, stop: int) -> list[Tensor]:
            nonlocal windows
            windows += 1
            if windows == 2:
                raise KeyboardInterrupt
            return compute(start, stop)

        return whole(job, opts, structure, cluster, few)

    monkeypatch.setattr("shardmap.call.forked.groups_into_store", killed)
    with pytest.raises(KeyboardInterrupt):
        shardmap.vmap(branch, **options)(x)
    left = len(list(shardmap.open_store(sink.where).missing()))
    assert 0 < left < 13
    store = shardmap.vmap(branch, resume=True, **options)(x)
    assert windows > 2
    oracle.assert_same(torch.as_tensor(store.read("result", 0, 61)), expected(branch, x), "stored")
    scaled = lambda r: branch(r) * 1.0 if r.sum() > 0 else r.cos() * 2
    with pytest.raises(errors.StoreError, match="another"):
        shardmap.vmap(scaled, resume=True, **options)(x)


def test_one_way_is_written_by_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unused(*_: object) -> None:
        raise AssertionError("the results were gathered here")

    monkeypatch.setattr("shardmap.call.forked.groups_into_store", unused)
    x = batch(61).abs()
    sink = shardmap.MemmapSink(tmp_path / "rows")
    store = shardmap.vmap(branch, devices=TWO, out=sink, chunk_size=7)(x)
    oracle.assert_same(torch.as_tensor(store.read("result", 0, 61)), expected(branch, x), "stored")


@pytest.mark.parametrize("function", [on_both, loops])
def test_draws_are_those_of_any_other_device(function: Any, tmp_path: Path) -> None:
    x, found = batch(131), []
    ways: list[dict[str, Any]] = [{}, {"devices": TWO, "chunk_size": 7}, {"devices": TWO}]
    for options in ways:
        torch.manual_seed(1)
        found.append(shardmap.vmap(function, randomness="different", **options)(x))
    sink = shardmap.MemmapSink(tmp_path / "rows")
    torch.manual_seed(1)
    mapped = shardmap.vmap(function, randomness="different", devices=TWO, out=sink, chunk_size=7)
    found.append(torch.as_tensor(mapped(x).read("result", 0, 131)))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("reduce", [None, "sum"])
def test_ragged_samples(reduce: str | None) -> None:
    x = shardmap.Ragged([r[: k % 3 + 1] for k, r in enumerate(batch(61))])
    function = lambda r: r.sum() * 2 if r[0] > 0 else r.cos().sum()
    want = torch.stack([function(r) for r in x])
    got = shardmap.vmap(function, devices=TWO, reduce=reduce)(x)
    torch.testing.assert_close(got, want if reduce is None else want.sum(0))


def test_a_plan_is_refused_and_its_remedies_work() -> None:
    x = batch(61)
    with pytest.raises(errors.OptionError, match="call the mapped function itself, or plan for"):
        shardmap.plan(branch, devices=TWO)(x)
    want = expected(branch, x)
    oracle.assert_same(shardmap.vmap(branch, devices=TWO)(x), want, "called")
    oracle.assert_same(shardmap.plan(branch, devices="auto")(x).run(), want, "planned")
