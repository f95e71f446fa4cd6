"""What only a GPU can show: run with `pytest -m gpu` on a machine that has one."""

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
    "cnn": lambda: nn.Sequential(nn.Unflatten(0, (1, 3, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(0), nn.Linear(48, 3)),
    "transformer": lambda: nn.Sequential(nn.Unflatten(0, (3, 4)), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), nn.Flatten(0)),
    "lstm": lambda: nn.Sequential(nn.Unflatten(0, (3, 4)), nn.LSTM(4, 5)),
}


def gradients(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Per-sample gradients over plain autograd."""

    def gradient(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = model(x)
        out = out[0].flatten() if isinstance(out, tuple) else out
        return torch.autograd.grad(F.cross_entropy(out, y), tuple(model.parameters()))

    return gradient


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"devices": ["cuda:0", "cuda:0"]}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_on_the_gpu(name: str, options: dict) -> None:
    """Model and batch on the GPU: the loop's gradients, to rounding."""
    torch.manual_seed(0)
    model = MODELS[name]().double().cuda()
    x, y = torch.randn(5, 12, dtype=torch.float64, device="cuda"), torch.randint(3, (5,), device="cuda")
    loop = [torch.stack(g) for g in zip(*[gradients(model)(a, b) for a, b in zip(x, y, strict=True)], strict=True)]
    torch.testing.assert_close(list(shardmap.vmap(gradients(model), **options)(x, y)), loop)


@pytest.mark.parametrize("name", MODELS)
def test_recorded_on_the_host_and_run_on_the_gpu(name: str) -> None:
    """Model and batch on the host, `devices="cuda:*"`: the results come back to the host."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, y = torch.randn(7, 12, dtype=torch.float64), torch.randint(3, (7,))
    loop = [torch.stack(g) for g in zip(*[gradients(model)(a, b) for a, b in zip(x, y, strict=True)], strict=True)]
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
        mapped = shardmap.vmap(lambda row: row + torch.rand(3, device=row.device), randomness="different")
        return mapped(torch.zeros(4, 3, device=device)).cpu()

    torch.testing.assert_close(drawn("cpu"), drawn("cuda"))
