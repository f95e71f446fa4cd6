"""Networks whose per-sample gradients are products, and the loop's reductions of them."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.transforms.test_per_sample_grad import Tied, loop

Problem = tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]], Callable[..., Tensor]]


class Twice(nn.Module):
    """One convolution used twice, and a linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.tanh(self.conv(x))).flatten()
        return self.linear(torch.tanh(self.linear(x)))[:3]


class Attends(nn.Module):
    """An encoder layer between an embedding and a head, over T positions."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16, padding_idx=padding)
        self.layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(0))


class Recurrent(nn.Module):
    """One weight, used at each of five steps with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.around, self.out = (
            nn.Linear(6, 20),
            nn.Linear(20, 20, bias=False),
            nn.Linear(20, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inward(x))
        for step in range(5):
            h = torch.tanh(self.around(h) * (1 + 0.1 * step) + h)
        return self.out(h)


class Scaled(nn.Module):
    """Weights that are not used as they are: transposed, scaled, negated, sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.s = (
            nn.Parameter(torch.randn(6, 5)),
            nn.Parameter(torch.randn(5, 4)),
            nn.Parameter(torch.randn(())),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ (0.5 * self.w)) / 3.0
        return (-(h @ self.v) * self.s)[:3] + (h @ self.v[:, 1:])


class Positions(nn.Module):
    """Narrow layers over many positions, whose products are smaller than their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.mix, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x[None]) * 0.5).tanh()[0].flatten(1)  # [4, 64]
        return self.head((y.mT @ (2 * self.mix)).tanh().mean(0))


def problems() -> dict[str, Callable[[], Problem]]:
    def images(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 2, 4, 4), torch.randint(3, (n,))

    def sentences(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(40, (n, 5)), torch.randint(3, (n,))

    def vectors(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 6), torch.randint(3, (n,))

    return {
        "mlp": lambda: (
            nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)),
            vectors,
            F.cross_entropy,
        ),
        "wide": lambda: (
            nn.Sequential(nn.Linear(6, 20, bias=False), nn.Tanh(), nn.Linear(20, 3)).double(),
            doubles,
            F.cross_entropy,
        ),
        "cnn": lambda: (
            nn.Sequential(
                nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 2), nn.Flatten(0), nn.Linear(16, 3)
            ),
            images,
            F.cross_entropy,
        ),
        "strided": lambda: (
            nn.Sequential(
                nn.Conv2d(2, 8, 3, 2, 1),
                nn.Conv2d(8, 8, 2, padding=1, dilation=2, groups=4),
                nn.Flatten(0),
                nn.LazyLinear(3),
            ),
            images,
            F.cross_entropy,
        ),
        "transposed": lambda: (
            nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.Flatten(0), nn.LazyLinear(3)),
            images,
            F.cross_entropy,
        ),
        "twice": lambda: (Twice(), images, F.cross_entropy),
        "tied": lambda: (
            Tied(),
            lambda n: (torch.randint(11, (n, 3)), torch.randint(11, (n, 3))),
            F.cross_entropy,
        ),
        "tied once": lambda: (
            Tied(),
            lambda n: (torch.randint(11, (n, 1)), torch.randint(11, (n, 1))),
            F.cross_entropy,
        ),
        "attends": lambda: (Attends(), sentences, F.cross_entropy),
        "padded": lambda: (Attends(padding=3), sentences, F.cross_entropy),
        "recurrent": lambda: (Recurrent(), vectors, F.cross_entropy),
        "scaled": lambda: (Scaled(), vectors, F.cross_entropy),
        "positions": lambda: (
            Positions(),
            lambda n: (torch.randn(n, 2, 8, 8), torch.randint(3, (n,))),
            F.cross_entropy,
        ),
    }


def doubles(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))


def made(
    name: str, size: int
) -> tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor, list[Tensor]]:
    """A model, its loss, a batch, and the gradients of the loop."""
    torch.manual_seed(7)
    model, batch, loss = problems()[name]()
    x, y = batch(size)
    if size:
        model(x[0])  # lazy layers learn their sizes
    return model, loss, x, y, loop(list(model.parameters()), lambda a, b: loss(model(a), b), x, y)


def close(found: Any, expected: Tensor) -> None:
    tolerance = 1e-9 if expected.dtype == torch.float64 else 2e-4
    scale = max(float(expected.abs().max()), 1e-6) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.reshape(len(g), math.prod(g.shape[1:])) for g in gradients], 1)


@pytest.fixture(autouse=True)
def no_fallback(caplog: pytest.LogCaptureFixture) -> Any:
    """Nothing falls back: what is from factors agrees with the samples' own values at once."""
    with caplog.at_level(logging.WARNING, logger="shardmap"):
        yield
    assert [r.getMessage() for r in caplog.records if "factors" in r.getMessage()] == []
