"""Several GPUs without hardware: fake tensors have devices, and refuse calls that mix them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import shardmap
from shardmap.planning import device as devices
from shardmap.run import prepare

GPUS = [f"cuda:{i}" for i in range(8)]


class Attention(nn.Module):
    """Attention with heads, over a sequence without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[s, 8] -> [s, 8]`."""
        q, k, v = self.project(x).view(1, x.shape[0], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), (8,)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(0), nn.Linear(64, 3)), (1, 4, 4)),
    "norms": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()), (5, 8)),
    "attention": (Attention, (6, 8)),
    "recurrent": (lambda: nn.GRU(8, 4), (5, 8)),
}


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Eight GPUs that exist in name only; counts the captured tensors copied to each."""
    copies: Counter[str] = Counter()
    monkeypatch.setattr(devices, "available", lambda: ("cpu", *GPUS))
    original = prepare.captured_to

    def counted(t: torch.Tensor, device: torch.device) -> torch.Tensor:
        copies[str(device)] += 1
        return original(t, device)

    monkeypatch.setattr(prepare, "captured_to", counted)
    return copies


@pytest.mark.parametrize("samples", [1, 7, 8, 19])
@pytest.mark.parametrize("name", MODELS)
def test_recorded_on_the_host_and_run_on_eight_gpus(name: str, samples: int, eight_gpus: Counter[str]) -> None:
    """No call mixes devices, results come home, and each device gets each captured tensor once."""
    make, shape = MODELS[name]
    with FakeTensorMode(), torch.no_grad():
        model = make()
        batch = torch.randn(samples, *shape)

        def forward(x: torch.Tensor) -> torch.Tensor:
            out = model(x)
            return out[0] if isinstance(out, tuple) else out

        result = shardmap.vmap(forward, devices="cuda:*", chunk_size=2)(batch)
        expected = forward(batch[0]).shape
    assert result.shape == (samples, *expected)
    assert result.device.type == "cpu"
    assert 1 <= len(eight_gpus) <= min(samples, len(GPUS)), "a device that computes nothing gets nothing; a faster one may do more"
    assert set(eight_gpus.values()) == {len(list(model.parameters()))}


def test_devices_named_one_by_one(eight_gpus: Counter[str]) -> None:
    """A list, and a name with numbers."""
    with FakeTensorMode(), torch.no_grad():
        weights = torch.randn(4, 4)
        for named in (["cuda:1", torch.device("cuda", 5)], "cuda:1,5"):
            eight_gpus.clear()
            result = shardmap.vmap(lambda x: weights @ x, devices=named)(torch.randn(6, 4))
            assert result.shape == (6, 4)
            assert dict(eight_gpus) == {"cuda:1": 1, "cuda:5": 1}


def test_samples_that_live_on_a_gpu_stay_there(eight_gpus: Counter[str]) -> None:
    """ "auto" is where the inputs are, factories inside the function included."""
    with FakeTensorMode(), torch.no_grad():
        batch = torch.randn(5, 3, device="cuda:3")
        result = shardmap.vmap(lambda x: x + torch.ones(3, device=x.device))(batch)
    assert result.device == torch.device("cuda:3")
    assert set(eight_gpus) <= {"cuda:3"}


def test_a_gpu_that_is_not_there() -> None:
    """The message lists what is."""
    with pytest.raises(shardmap.errors.DeviceError, match="cuda:9.*this machine has cpu"):
        shardmap.vmap(torch.sin, devices="cuda:9")(torch.ones(2))
