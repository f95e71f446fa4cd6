"""Tests that need a GPU: run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardmap

pytestmark = pytest.mark.gpu

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(0, (1, 3, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(0),
        nn.Linear(48, 3),
    ),
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(0, (3, 4)), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), nn.Flatten(0)
    ),
    "lstm": lambda: nn.Sequential(nn.Unflatten(0, (3, 4)), nn.LSTM(4, 5)),
}


def gradients(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Per-sample gradients over plain autograd."""

    def gradient(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = model(x)
        out = out[0].flatten() if isinstance(out, tuple) else out
        return torch.autograd.grad(F.cross_entropy(out, y), tuple(model.parameters()))

    return gradient


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 2}, {"devices": ["cuda:0", "cuda:0"]}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_on_the_gpu(name: str, options: dict) -> None:
    """Model and batch on the GPU: the loop's gradients, to rounding."""
    torch.manual_seed(0)
    model = MODELS[name]().double().cuda()
    x, y = (
        torch.randn(5, 12, dtype=torch.float64, device="cuda"),
        torch.randint(3, (5,), device="cuda"),
    )
    loop = [
        torch.stack(g)
        for g in zip(*[gradients(model)(a, b) for a, b in zip(x, y, strict=True)], strict=True)
    ]
    torch.testing.assert_close(list(shardmap.vmap(gradients(model), **options)(x, y)), loop)


@pytest.mark.parametrize("name", MODELS)
def test_recorded_on_the_host_and_run_on_the_gpu(name: str) -> None:
    """Model and batch on the host, `devices="cuda:*"`: the results come back to the host."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, y = torch.randn(7, 12, dtype=torch.float64), torch.randint(3, (7,))
    loop = [
        torch.stack(g)
        for g in zip(*[gradients(model)(a, b) for a, b in zip(x, y, strict=True)], strict=True)
    ]
    there = shardmap.vmap(gradients(model), devices="cuda:*", chunk_size=3)(x, y)
    assert all(g.device.type == "cpu" for g in there)
    torch.testing.assert_close(list(there), loop)


def test_outer_gradients_cross_devices() -> None:
    """Autograd goes through the copies to the GPU and back."""
    weights = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    out = shardmap.vmap(lambda row: (weights @ row).sin(), devices="cuda:*", chunk_size=2)(x)
    got = torch.autograd.grad(out.square().sum(), (weights, x))
    wanted = torch.autograd.grad((x @ weights.T).sin().square().sum(), (weights, x))
    torch.testing.assert_close(got, wanted)


def test_draws_do_not_depend_on_the_device() -> None:
    """Seeded draws are the same on the host and on the GPU."""

    def drawn(device: str) -> torch.Tensor:
        torch.manual_seed(1)
        mapped = shardmap.vmap(
            lambda row: row + torch.rand(3, device=row.device), randomness="different"
        )
        return mapped(torch.zeros(4, 3, device=device)).cpu()

    torch.testing.assert_close(drawn("cpu"), drawn("cuda"))


def big(x: torch.Tensor) -> torch.Tensor:
    """64 MiB of intermediates for each sample of 4,096 numbers."""
    table = torch.outer(x, x)
    return (table.sin() * table.cos()).sum(1)


@pytest.mark.parametrize("chunk_size", ["auto", 3, None])
def test_chunks_on_the_gpu_stay_within_the_plan(chunk_size: object) -> None:
    """The allocator's peak is at most what was predicted, and the values are those of one chunk."""
    x = torch.randn(13, 4096, device="cuda")
    plan = shardmap.plan(big, chunk_size=chunk_size)(x)
    for _ in range(2):  # once before, once after the first chunk has been measured
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = plan.run()
        measured = torch.cuda.max_memory_allocated() - before
        plan = shardmap.plan(big, chunk_size=chunk_size)(x)
        torch.testing.assert_close(got, torch.stack([big(row) for row in x]))
    assert measured <= plan.lanes[0].peak_bytes


def test_out_of_memory_halves_the_chunk_and_goes_on() -> None:
    """A budget that lies: more than the GPU has. What was computed before is kept."""
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(max(0, free - (2 << 30)), dtype=torch.uint8, device="cuda")  # leaves 2 GiB
    x = torch.randn(101, 4096, device="cuda")
    got = shardmap.vmap(big, chunk_size=64, memory_budget="1000GiB")(x)
    del hog
    torch.testing.assert_close(got, torch.stack([big(row) for row in x]))


@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_reductions_on_the_gpu(home: str) -> None:
    """Chunks are combined on the device, in order; samples come from the host meanwhile."""
    x = torch.randn(1009, 64, dtype=torch.float64).to(home)
    total, norms = shardmap.vmap(
        lambda r: (torch.outer(r, r), r.norm()),
        reduce=("sum", None),
        devices="cuda:*",
        chunk_size=50,
    )(x)
    assert total.device.type == norms.device.type == home
    torch.testing.assert_close(total, x.T @ x)
    torch.testing.assert_close(norms, x.norm(dim=1))


def test_copies_overlap_without_mixing_chunks() -> None:
    """Many small chunks from and to the host: each sample's result is its own."""
    x = torch.arange(100_003, dtype=torch.float64)[:, None].expand(-1, 64).contiguous()
    got = shardmap.vmap(lambda r: r * 2 + 1, devices="cuda:*", chunk_size=997)(x)
    assert torch.equal(got, x * 2 + 1)


def test_remat_on_the_gpu() -> None:
    """The same gradients, with the activations of one chunk."""
    model = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 1)).double().cuda()
    x = torch.randn(101, 12, dtype=torch.float64, device="cuda")
    wanted = torch.autograd.grad(model(x).square().sum(), tuple(model.parameters()))
    out = shardmap.vmap(model, remat=True, chunk_size=10)(x)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), tuple(model.parameters())), wanted
    )


def test_results_go_where_they_are_asked_for() -> None:
    """`output_device` in both directions."""
    x = torch.randn(31, 5)
    assert (
        shardmap.vmap(torch.sin, devices="cuda:*", output_device="cuda:0", chunk_size=4)(
            x
        ).device.type
        == "cuda"
    )
    assert torch.equal(shardmap.vmap(torch.neg, output_device="cpu", chunk_size=4)(x.cuda()), -x)
