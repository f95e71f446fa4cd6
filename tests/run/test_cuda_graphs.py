"""cuda_graphs=True, with pretended graphs; what a GPU shows is in test_gpu_graphs.py."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap import errors
from shardmap.run import graphed, lanes
from shardmap.run.capturable import Static
from tests.run.pretended_graphs import Pretended, W, function
from tests.run.rows import assert_close, batch, loop

# -- values


@pytest.mark.parametrize(
    "options",
    [{}, {"trace": "once"}, {"trace": "each"}, {"out_dims": (0, -1)}, {"memory_budget": "1GiB"}],
    ids=str,
)
def test_chunks_of_the_planned_size_are_replayed(options: Any, graphs: Pretended) -> None:
    mapped = shardmap.vmap(function, cuda_graphs=True, chunk_size=3, **options)
    for size in (7, 13, 3):
        first, second = loop(function, batch(size))
        expected = [first, second.movedim(0, -1) if "out_dims" in options else second]
        assert_close(mapped(batch(size)), expected)
    assert graphs.captures == [3], "captured once; the rest chunks run as they are"
    assert graphs.replays == 1 + 2 + 4 + 1


@pytest.mark.parametrize("size", [0, 1, 3, 11])
def test_small_maps_are_one_graph_for_each_size(size: int, graphs: Pretended) -> None:
    mapped = shardmap.vmap(lambda row: row.sin() * 2, cuda_graphs=True)
    for shift in (0, 1):
        x = batch(size) + shift
        expected = torch.stack([row.sin() * 2 for row in x]) if size else torch.empty(0, 5)
        torch.testing.assert_close(mapped(x), expected)
    assert graphs.captures == ([size] if size else [])


def test_two_lanes_reductions_and_stores(graphs: Pretended, tmp_path: Path) -> None:
    x = batch(13)
    expected = loop(function, x)
    options: dict[str, Any] = {"cuda_graphs": True, "chunk_size": 3}
    assert_close(shardmap.vmap(function, devices=["cpu", "cpu"], **options)(x), expected)
    assert_close(shardmap.vmap(function, reduce="sum", **options)(x), [t.sum(0) for t in expected])
    largest = [t.amax(0) for t in expected]
    assert_close(shardmap.vmap(function, reduce="max", **options)(x), largest)
    store = shardmap.vmap(function, out=shardmap.MemmapSink(tmp_path / "store"), **options)(x)
    assert_close([store.read(k, 0, 13) for k in (0, 1)], expected)
    assert len(graphs.captures) >= 3
    assert graphs.replays > 12


def test_results_stay_when_the_next_call_overwrites_the_graphs_memory(graphs: Pretended) -> None:
    mapped = shardmap.vmap(function, cuda_graphs=True)
    kept = [mapped(batch(7) + shift) for shift in range(3)]
    for shift, found in enumerate(kept):
        assert_close(found, loop(function, batch(7) + shift))
    assert graphs.captures == [7]


def test_samples_of_other_layouts(graphs: Pretended) -> None:
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(2))

    def of_table(table: Tensor) -> Tensor:
        return table.as_strided((2, 2), (table.stride(0), table.stride(1))) @ table[:2, :2]

    expected = torch.stack([of_table(t) for t in x])
    for rows in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[:1].expand(6, 5, 4)):
        wanted = torch.stack([of_table(t) for t in rows])
        mapped = shardmap.vmap(of_table, cuda_graphs=True, chunk_size=3)
        torch.testing.assert_close(mapped(rows), wanted)
    assert graphs.replays >= 9
    aside = shardmap.vmap(of_table, in_dims=2, cuda_graphs=True)
    torch.testing.assert_close(aside(x.permute(1, 2, 0).contiguous()), expected)
    chunked = shardmap.vmap(of_table, in_dims=2, cuda_graphs=True, chunk_size=2)
    with pytest.warns(errors.CompileWarning, match="move the mapped dimension to the front"):
        found = chunked(x.permute(1, 2, 0).contiguous())
    torch.testing.assert_close(found, expected)


def test_unmapped_outputs_and_arguments(graphs: Pretended) -> None:
    def both(row: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return row * weight.exp(), weight.exp() + W.sum()

    mapped = shardmap.vmap(both, in_dims=(0, None), cuda_graphs=True, chunk_size=3)
    for shift in range(4):
        weight = torch.ones(5) * shift
        expected = loop(lambda row, w=weight: both(row, w), batch(6))
        assert_close(mapped(batch(6), weight), expected)
    assert len(graphs.captures) <= 2


def test_threads_share_a_graph(graphs: Pretended) -> None:
    mapped = shardmap.vmap(function, cuda_graphs=True, chunk_size=3)
    mapped(batch(6))
    wrong: list[BaseException] = []

    def work(shift: int) -> None:
        try:
            for step in range(10):
                x = batch(9) + shift + step
                assert_close(mapped(x), loop(function, x))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(10 * k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert graphs.captures == [3]


# -- captured tensors, numbers, settings


def test_captured_tensors_are_read_where_they_are(graphs: Pretended) -> None:
    weight, x = W.clone(), batch(6)
    mapped = shardmap.vmap(lambda row: row @ weight, cuda_graphs=True, chunk_size=3)
    for _ in range(4):
        torch.testing.assert_close(mapped(x), torch.stack([row @ weight for row in x]))
        weight.mul_(-2)
    assert len(graphs.captures) == 1, "a write in place needs no other graph"
    weight.data = W.clone() + 1
    torch.testing.assert_close(mapped(x), torch.stack([row @ weight for row in x]))
    assert len(graphs.captures) == 2, "another address does"
    for step in range(5):  # from now on it is copied, whoever writes to it and how
        if step % 2:
            weight.data = weight * 2
        else:
            weight.data.add_(1)
        torch.testing.assert_close(mapped(x), torch.stack([row @ weight for row in x]))
    assert len(graphs.captures) == 2


def test_captured_tensors_that_are_replaced(graphs: Pretended) -> None:
    model, x = torch.nn.Linear(5, 2).requires_grad_(False), batch(6)
    mapped = shardmap.vmap(model, cuda_graphs=True, chunk_size=3, trace="once")
    torch.testing.assert_close(mapped(x), torch.stack([model(row) for row in x]))
    for step in range(4):
        model.weight = torch.nn.Parameter(torch.full((2, 5), 1.0 + step), requires_grad=False)
        gone = weakref.ref(model.weight)
        torch.testing.assert_close(mapped(x), torch.stack([model(row) for row in x]))
    assert len(graphs.captures) == 2, "once more by address, then it is copied"
    model.weight = torch.nn.Parameter(torch.zeros(2, 5), requires_grad=False)
    mapped(x)
    gc.collect()
    assert gone() is None, "a graph keeps no weights alive"


def test_a_copy_does_not_serve_a_tensor_that_the_caller_may_write_to() -> None:
    t = W.clone()
    once, always = Static.for_copies(t), Static.for_copies(t, always=True)
    for static in (once, always):
        static.load(t)
        assert static.memory is not None
        assert torch.equal(static.memory, t)
    assert once.serves(t, None)
    assert not once.serves(t, t)
    assert always.serves(t, t)
    assert not once.serves(t.t(), None)
    assert not once.serves(t.double(), None)


def test_values_made_of_captured_tensors_are_those_of_the_call(graphs: Pretended) -> None:
    weight, x = W.clone(), batch(6)
    mapped = shardmap.vmap(lambda row: row @ weight.exp().cumsum(0), cuda_graphs=True, chunk_size=3)
    for _ in range(4):
        wanted = torch.stack([row @ weight.exp().cumsum(0) for row in x])
        torch.testing.assert_close(mapped(x), wanted)
        weight.mul_(-1.5)
    assert len(graphs.captures) == 1


def test_numbers_are_those_of_the_call(graphs: Pretended) -> None:
    rate, x = 0.5, batch(6)
    mapped = shardmap.vmap(lambda row: row * rate, cuda_graphs=True, chunk_size=3, trace="each")
    for rate in (0.5, 2.0, 0.0):
        assert torch.equal(mapped(x), x * rate)
    rate = -0.0
    assert torch.equal(mapped(x).signbit(), (x * rate).signbit())
    assert graphs.captures == [3] * 4
    rate = 7.0
    with pytest.warns(errors.CompileWarning, match="changes from call to call"):
        assert torch.equal(mapped(x), x * rate)
    before = graphs.replays
    rate = 9.0
    assert torch.equal(mapped(x), x * rate)
    assert graphs.replays == before


def test_settings_of_torch_decide_the_kernels(graphs: Pretended) -> None:
    mapped = shardmap.vmap(function, cuda_graphs=True, chunk_size=3)
    assert_close(mapped(batch(6)), loop(function, batch(6)))
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        assert_close(mapped(batch(6)), loop(function, batch(6)))
    assert len(graphs.captures) == 2


# -- the option


def test_other_devices_have_no_graphs() -> None:
    for call in (shardmap.vmap, shardmap.plan, shardmap.compare):
        with pytest.raises(errors.OptionError, match=r"only CUDA devices have graphs.*'cuda:\*'"):
            call(torch.sin, cuda_graphs=True)(batch(3))
    wrong: dict[str, Any] = {"cuda_graphs": "yes"}
    with pytest.raises(errors.OptionError, match="cuda_graphs='yes'"):
        shardmap.vmap(torch.sin, **wrong)
    torch.testing.assert_close(
        shardmap.vmap(torch.sin, cuda_graphs=False)(batch(3)), batch(3).sin()
    )


def test_plans_say_it_and_count_the_pool(graphs: Pretended) -> None:
    def wide(row: Tensor) -> Tensor:
        return torch.outer(row, row).sin().sum(0)

    x = torch.randn(64, 300)
    plain = shardmap.plan(wide, chunk_size=8)(x)
    plan = shardmap.plan(wide, chunk_size=8, cuda_graphs=True)(x)
    assert "chunks of 8 samples are captured as a CUDA graph at their first run" in " ".join(
        plan.explain().split()
    )
    chunk = plain.lanes[0].memory.chunk_bytes(8)
    assert plan.lanes[0].memory.chunk_bytes(8) >= 2 * chunk
    torch.testing.assert_close(plan.run(), torch.stack([wide(row) for row in x]))
    assert "chunks of 8 samples on cpu are replayed as one graph" in plan.explain()
    assert graphs.captures == [8]
    assert graphed.held_bytes(torch.device("cpu")) >= 8 * 300 * 4 * 2


def test_clear_caches_releases_the_graphs(graphs: Pretended) -> None:
    mapped = shardmap.vmap(function, cuda_graphs=True)
    mapped(batch(5))
    [graph] = [weakref.ref(g.outs[1]) for g in graphed._site(torch.device("cpu")).graphs.values()]
    assert graph() is not None
    shardmap.clear_caches()
    gc.collect()
    assert graph() is None
    assert_close(mapped(batch(5)), loop(function, batch(5)))
    assert graphs.captures == [5, 5]


def test_graphs_give_way_when_memory_runs_out(
    graphs: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = shardmap.vmap(function, cuda_graphs=True, chunk_size=4)
    mapped(batch(8))
    assert graphed.held_bytes(torch.device("cpu"))
    original, failing = lanes.Lane.compute, [True]

    def compute(self: lanes.Lane, ready: Any, chunk: Any) -> Any:
        if failing and failing.pop():
            raise torch.OutOfMemoryError("no more")
        return original(self, ready, chunk)

    monkeypatch.setattr(lanes.Lane, "compute", compute)
    assert_close(mapped(batch(8)), loop(function, batch(8)))
    assert graphs.captures == [4, 2]


def test_the_graphs_of_a_device_are_bounded(
    graphs: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed, "MOST_GRAPHS", 2)
    mapped = shardmap.vmap(lambda row: row.sin(), cuda_graphs=True)
    for size in (2, 3, 5, 5, 2):
        torch.testing.assert_close(mapped(batch(size)), batch(size).sin())
    assert graphs.captures == [2, 3, 5, 2]
