"""One operator on every path that a map takes, compared with the loop and without a slow loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import shardmap
from tests.rules.against_loop import Make, assert_close, check

PATHS: tuple[dict[str, Any], ...] = ({}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]})
"""Ways to compute a batch: at once, two samples at a time, on two lanes."""


def everywhere(
    func: Callable[..., Any],
    *makers: Make,
    never: Sequence[int] = (),
    gradient: bool = True,
    tolerance: float = 1e-9,
    strided: bool = True,
) -> None:
    """Compare a map of `func` with the loop on every path, and refuse slow loops.

    The paths: every choice of mapped arguments, samples that lie strided, chunks, two lanes, no
    samples at all, a map of the map, the outer gradient and the gradient of each sample.

    Args:
        func: Takes one sample of each argument and returns a tensor or a tuple of tensors.
        *makers: Make one sample of each argument.
        never: Arguments that are mapped in none of the choices.
        gradient: Whether to compare gradients as well.
        tolerance: Largest difference allowed, relative to the largest value.
        strided: Whether to repeat it on samples that lie strided in memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", shardmap.SlowLoopWarning)
        check(func, *makers, never=never, gradient=gradient, tolerance=tolerance, strided=strided)
        generator = torch.Generator().manual_seed(5)
        mapped = [i not in never for i in range(len(makers))]
        dims = tuple([0 if m else None for m in mapped])

        def batch(*size: int) -> list[torch.Tensor]:
            count = int(torch.tensor(size).prod())
            return [
                torch.stack([make(generator) for _ in range(max(count, 1))])[:count].unflatten(
                    0, size
                )
                if m
                else make(generator)
                for make, m in zip(makers, mapped, strict=True)
            ]

        for size in (5, 3):
            args = batch(size)
            for options in PATHS:
                got = _flat(shardmap.vmap(func, dims, **options)(*args))
                _same(got, _loop(func, args, dims), tolerance, f"{size} samples, {options}")
        args = batch(3, 2)
        got = _flat(shardmap.vmap(shardmap.vmap(func, dims), dims)(*args))
        want = _loop(lambda *rows: tuple(_loop(func, rows, dims)), args, dims)
        _same(got, want, tolerance, "a map of a map")
        like = _flat(func(*[a[0] if m else a for a, m in zip(batch(1), mapped, strict=True)]))
        for mine, theirs in zip(_flat(shardmap.vmap(func, dims)(*batch(0))), like, strict=True):
            assert mine.shape == (0, *theirs.shape), "no samples"
            assert mine.dtype == theirs.dtype, "no samples"
        if gradient:
            by_sample = _gradient(func, mapped)
            args = batch(4)
            for options in PATHS:
                got = _flat(shardmap.vmap(by_sample, dims, **options)(*args))
                want = _loop(by_sample, args, dims)
                _same(got, want, tolerance, f"gradients by sample, {options}")


def _flat(results: Any) -> list[torch.Tensor]:
    return list(results) if isinstance(results, tuple | list) else [results]


def _loop(func: Callable[..., Any], args: Sequence[Any], dims: Sequence[Any]) -> list[Any]:
    size = next(len(a) for a, d in zip(args, dims, strict=True) if d == 0)
    rows = [
        _flat(func(*[a if d is None else a[i] for a, d in zip(args, dims, strict=True)]))
        for i in range(size)
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _same(got: list[Any], want: list[Any], tolerance: float, label: str) -> None:
    assert len(got) == len(want), label
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert_close(mine, theirs, tolerance, f"{label}, result {i}")


def _gradient(func: Callable[..., Any], mapped: Sequence[bool]) -> Callable[..., Any]:
    """The gradient of a weighted sum of the results, by all real mapped arguments."""

    def gradient(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = [
            r.detach().requires_grad_() if m and r.is_floating_point() else r
            for r, m in zip(rows, mapped, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float64)
        for t in _flat(func(*own)):
            if t.requires_grad:
                weights = torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).view(t.shape)
                total = total + (t.to(torch.float64) * weights).sum()
        by = [t for t in own if t.requires_grad]
        return torch.autograd.grad(total, by, materialize_grads=True)

    return gradient
