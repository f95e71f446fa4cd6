"""cuda_graphs=True on a GPU: run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardmap
from shardmap import errors
from shardmap.run import cuda_graphs

pytestmark = pytest.mark.gpu


class Counted(cuda_graphs.CudaGraphs):
    """Torch's graphs, counted."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def captured(
        self, device: torch.device, pool: object, function: Callable[[], Sequence[Tensor]]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Capture, and count the replays."""
        replay, outs = super().captured(device, pool, function)
        self.captures += 1

        def counting() -> None:
            self.replays += 1
            replay()

        return counting, outs


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """Counted graphs; a test fails if anything runs without one and it does not say so."""
    shardmap.clear_caches()
    found = Counted()
    monkeypatch.setattr(cuda_graphs, "graphs", found)
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.CompileWarning)
        yield found
    shardmap.clear_caches()


def model_of(kind: str) -> nn.Module:
    """A small model in float64 on the GPU."""
    torch.manual_seed(0)
    layers: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)),
        "cnn": lambda: nn.Sequential(
            nn.Unflatten(0, (1, 3, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(0),
            nn.Linear(48, 3),
        ),
        "transformer": lambda: nn.Sequential(
            nn.Unflatten(0, (3, 4)), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
            nn.Flatten(0),
        ),
    }  # fmt: skip
    return layers[kind]().double().cuda()


def gradients(model: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """Per-sample gradients over plain autograd."""

    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(x), y), tuple(model.parameters()))

    return gradient


def batch(size: int, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """Different samples and their classes."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 12, dtype=torch.float64, generator=generator)
    return x.to(device), torch.randint(3, (size,), generator=generator).to(device)


def loop(f: Callable[..., Any], *columns: Tensor) -> list[Tensor]:
    """The plain loop's results, stacked."""
    rows = [f(*row) for row in zip(*columns, strict=True)]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}, {"devices": ["cuda:0"] * 2}], ids=str)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_every_sample_has_the_loops_gradient(kind: str, options: Any, graphs: Counted) -> None:
    """Weights are updated in place between calls, and replaced once."""
    model = model_of(kind)
    mapped = shardmap.vmap(gradients(model), cuda_graphs=True, **options)
    kept = []
    for step in range(4):
        x, y = batch(13)
        expected = loop(gradients(model), x + step, y)
        kept.append((list(mapped(x + step, y)), expected))
        with torch.no_grad():
            for weight in model.parameters():
                if step == 2:
                    weight.data = weight.data.clone()
                weight.mul_(1.25)
    for found, expected in kept:  # none was overwritten by a later replay
        torch.testing.assert_close(found, expected)
    assert graphs.captures >= 1
    assert graphs.replays > 4


def test_samples_and_results_on_the_host(graphs: Counted) -> None:
    """Chunks in flight beside their copies: each result is its own sample's."""
    x = torch.arange(10_007, dtype=torch.float64)[:, None].expand(-1, 64).contiguous()
    mapped = shardmap.vmap(
        lambda r: (r * 2).sin() + 1, devices="cuda:*", chunk_size=499, cuda_graphs=True
    )
    for shift in range(3):
        torch.testing.assert_close(mapped(x + shift), ((x + shift) * 2).sin() + 1)
    assert graphs.replays >= 60


def test_reductions(graphs: Counted) -> None:
    x = torch.randn(1009, 64, dtype=torch.float64, device="cuda")
    mapped = shardmap.vmap(
        lambda r: (torch.outer(r, r), r.norm()), reduce=("sum", None), chunk_size=50,
        cuda_graphs=True,
    )  # fmt: skip
    total, norms = mapped(x)
    torch.testing.assert_close(total, x.T @ x)
    torch.testing.assert_close(norms, x.norm(dim=1))
    assert graphs.captures == 1


def test_a_capture_that_fails_is_a_warning(graphs: Counted) -> None:
    """It leaves the stream as it was, and later graphs work."""
    x, _ = batch(13)
    stream, plain = torch.cuda.current_stream(), graphs.captured

    def waiting(
        device: torch.device, pool: object, function: Callable[[], Sequence[Tensor]]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        return plain(device, pool, lambda: (function(), torch.cuda.synchronize())[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "captured", waiting)
        with pytest.warns(errors.CompileWarning, match="capturing a chunk raised"):
            found = shardmap.vmap(lambda row: row.cos(), cuda_graphs=True, chunk_size=4)(x)
    torch.testing.assert_close(found, x.cos())
    assert torch.cuda.current_stream() == stream
    found = shardmap.vmap(lambda row: row.sin(), cuda_graphs=True, chunk_size=4)(x)
    torch.testing.assert_close(found, x.sin())
    assert graphs.captures == 1


def test_calls_through_the_host_run_without(graphs: Counted) -> None:
    def through(row: Tensor) -> Tensor:
        return row * row.sum().cpu().exp().to(row.device, non_blocking=True)

    x, _ = batch(13)
    with pytest.warns(errors.CompileWarning, match="memory of another device"):
        found = shardmap.vmap(through, cuda_graphs=True, chunk_size=4)(x)
    torch.testing.assert_close(found, torch.stack([through(row) for row in x]))
    assert not graphs.captures


def test_threads_on_streams_of_their_own(graphs: Counted) -> None:
    weight = torch.randn(12, 12, dtype=torch.float64, device="cuda")
    mapped = shardmap.vmap(lambda row: (row @ weight).tanh().cumsum(0), cuda_graphs=True)
    wrong: list[BaseException] = []

    def work(shift: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                x = batch(64)[0] + shift
                for step in range(20):
                    wanted = ((x + step) @ weight).tanh().cumsum(1)
                    torch.testing.assert_close(mapped(x + step), wanted)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert graphs.captures == 1


def big(x: Tensor) -> Tensor:
    """64 MiB of intermediates for each sample of 4,096 numbers."""
    table = torch.outer(x, x)
    return (table.sin() * table.cos()).sum(1)


def test_the_pool_is_within_the_plan_and_is_released(graphs: Counted) -> None:
    x = torch.randn(13, 4096, device="cuda")
    plan = shardmap.plan(big, chunk_size=4, cuda_graphs=True)(x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    found = plan.run()
    measured = torch.cuda.max_memory_allocated() - before
    torch.testing.assert_close(found, torch.stack([big(row) for row in x]))
    assert graphs.captures == 1
    assert measured <= plan.lanes[0].peak_bytes
    del found
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    assert held - reserved <= plan.lanes[0].peak_bytes
    shardmap.clear_caches()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held


def test_a_map_in_a_graph_of_the_callers(graphs: Counted) -> None:
    x, _ = batch(16)
    mapped = shardmap.vmap(lambda row: row.sin() * 2, cuda_graphs=True, trace="once")
    for _ in range(3):
        mapped(x)
    graph, before = torch.cuda.CUDAGraph(), graphs.captures
    with torch.cuda.graph(graph):
        out = mapped(x)
    x.add_(1)
    graph.replay()
    torch.testing.assert_close(out, x.sin() * 2)
    assert graphs.captures == before
