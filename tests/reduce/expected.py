"""Expected reductions, by torch's own reductions of stacked outputs."""

from __future__ import annotations

from typing import Any

import torch

SIZES = (1, 2, 3, 7, 13, 101)


CHUNKS: tuple[Any, ...] = ("auto", None, 1, 3, 1000)


DEVICES: tuple[Any, ...] = ("auto", ["cpu", "cpu"], ["cpu"] * 3)


DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.uint8,
    torch.bool,
)  # fmt: skip


def batch_of(dtype: torch.dtype, *shape: int, seed: int = 1) -> torch.Tensor:
    """Different samples."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 200, shape, generator=generator).to(dtype)


def reduced(name: str, stacked: torch.Tensor) -> torch.Tensor:
    """The reduction of the loop's stack by torch."""
    return {"sum": stacked.sum, "mean": stacked.mean, "max": stacked.amax, "min": stacked.amin}[
        name
    ](0)


def exact(name: str, stacked: torch.Tensor) -> torch.Tensor:
    """The same in the widest dtype, rounded once."""
    if not (stacked.is_floating_point() or stacked.is_complex()):
        return reduced(name, stacked)
    wide = torch.complex128 if stacked.is_complex() else torch.float64
    return reduced(name, stacked.to(wide)).to(stacked.dtype)


def permitted(name: str, dtype: torch.dtype) -> bool:
    """True if the reduction is defined for the dtype."""
    if name == "mean":
        return dtype.is_floating_point or dtype.is_complex
    return name == "sum" or not dtype.is_complex
