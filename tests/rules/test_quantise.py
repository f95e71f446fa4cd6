"""Fake quantisation, compared with the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from tests.rules.against_loop import Make, below, real
from tests.rules.everywhere import everywhere


def positive(*shape: int) -> Make:
    """A maker of scales."""
    return lambda g: torch.rand(shape, generator=g) * 0.2 + 0.05


def zero(*shape: int) -> Make:
    """A maker of zero points."""
    return lambda g: torch.randint(0, 5, shape, generator=g, dtype=torch.int32)


single = real(4, 3, dtype=torch.float32)
PLAIN: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "two numbers": (
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 15),
        [real(4, 3)],
    ),
    "two tensors": (
        lambda x, s, z: torch.fake_quantize_per_tensor_affine(x, s.detach(), z, 0, 15),
        [single, positive(), zero()],
    ),
    "channels": (
        lambda x, s, z: torch.fake_quantize_per_channel_affine(x, s.detach(), z, 1, 0, 15),
        [single, positive(3), zero(3)],
    ),
    "learned": (
        lambda x, s, z: torch._fake_quantize_learnable_per_tensor_affine(x, s, z, 0, 15, 0.5),
        [single, positive(1), lambda g: torch.rand(1, generator=g) * 4],
    ),
    "learned channels": (
        lambda x, s, z: torch._fake_quantize_learnable_per_channel_affine(x, s, z, 1, 0, 15, 0.5),
        [single, positive(3), lambda g: torch.rand(3, generator=g) * 4],
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_rounding_to_a_grid(name: str) -> None:
    func, makers = PLAIN[name]
    everywhere(func, *makers, tolerance=1e-5)


def test_a_switch_of_each_sample() -> None:
    def rounded(x: torch.Tensor, s: torch.Tensor, on: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
            x, s, torch.zeros(1, dtype=torch.int32), on, 0, 15
        )

    everywhere(rounded, single, positive(1), below(2, 1), gradient=False)


GRIDS = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2])
INTEGERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one grid": lambda x: torch.quantize_per_tensor(x, 0.1, 3, torch.quint8).dequantize(),
    "its integers": lambda x: torch.quantize_per_tensor(x, 0.1, 3, torch.qint8).int_repr(),
    "a grid for each channel": lambda x: (
        torch.quantize_per_channel(x, *GRIDS, 1, torch.qint8).dequantize() * 2
    ),
    "their integers": lambda x: torch.quantize_per_channel(
        x.t(), *GRIDS, 0, torch.quint8
    ).int_repr(),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_with_a_grid(name: str) -> None:
    everywhere(INTEGERS[name], single, gradient=False)


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per:UserWarning", "ignore::shardmap.SlowLoopWarning"
)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"trace": "once"}])
@pytest.mark.parametrize("size", [1, 3, 150])
def test_grids_of_each_sample(size: int, options: dict[str, Any]) -> None:
    """The function itself is run: torch stacks no tensors that have a grid for each channel."""

    def function(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.quantize_per_channel(x, scales, GRIDS[1], 1, torch.qint8).dequantize()

    x, scales = torch.randn(size, 4, 3), torch.rand(size, 3) + 0.05
    wanted = torch.stack([function(*row) for row in zip(x, scales, strict=True)])
    assert torch.equal(shardmap.vmap(function, **options)(x, scales), wanted)
