"""One operator at a time against the loop, for every choice of mapped arguments."""

from __future__ import annotations

import contextlib
import itertools
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import shardmap
from shardmap.lower import batcher as batch
from shardmap.rules import registry

Make = Callable[[torch.Generator], torch.Tensor]


def real(*shape: int, dtype: torch.dtype = torch.float64) -> Make:
    """A maker of normal tensors."""
    return lambda g: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def below(high: int, *shape: int, low: int = 0) -> Make:
    """A maker of indices."""
    return lambda g: torch.randint(low, high, shape, generator=g)


def distinct(high: int, count: int) -> Make:
    """A maker of indices without repetition."""
    return lambda g: torch.randperm(high, generator=g)[:count]


def choices(count: int) -> Iterator[tuple[bool, ...]]:
    """Every choice of mapped arguments with at least one."""
    return (c for c in itertools.product([True, False], repeat=count) if any(c))


def check(
    func: Callable[..., Any],
    *makers: Make,
    always: Sequence[int] = (),
    never: Sequence[int] = (),
    sizes: Sequence[int] = (3, 1),
    gradient: bool = True,
    rules: bool = True,
    strided: bool = True,
    randomness: str = "error",
    tolerance: float = 1e-9,
) -> None:
    """Compare `shardmap.vmap(func)` with the loop.

    Args:
        func: Takes one sample of each argument and returns a tensor or a tuple of tensors.
        *makers: Make one sample of each argument.
        always: Arguments that are mapped in every choice.
        never: Arguments that are mapped in none.
        sizes: How many samples.
        gradient: Whether to compare outer gradients as well.
        rules: Whether every operator that has a rule of ours must have been served by it.
        strided: Whether to repeat it on samples that lie strided in memory.
        randomness: Passed on.
        tolerance: Largest difference allowed, relative to the largest value.
    """
    for mapped in choices(len(makers)):
        if any(not mapped[i] for i in always) or any(mapped[i] for i in never):
            continue
        for size, last in [(n, False) for n in sizes] + ([(2, True)] if strided else []):
            generator = torch.Generator().manual_seed(size)
            args = []
            for make, m in zip(makers, mapped, strict=True):
                rows = [make(generator) for _ in range(size if m else 1)]
                arg = torch.stack(rows, -1 if last else 0) if m else rows[0]
                args.append(arg.requires_grad_() if gradient and arg.is_floating_point() else arg)
            dims = tuple((-1 if last else 0) if m else None for m in mapped)
            label = f"mapped {mapped}, {size} samples, last {last}"
            _compare(func, args, dims, size, rules, randomness, tolerance, gradient, label)


def _compare(
    func: Callable[..., Any],
    args: list,
    dims: tuple,
    size: int,
    rules: bool,
    randomness: str,
    tolerance: float,
    gradient: bool,
    label: str,
) -> None:
    with below_our_rules() as served:
        got = shardmap.vmap(func, dims, randomness=randomness)(*args)
    assert not rules or not served, f"{label}: served by a lower tier: {served}"
    got = got if isinstance(got, tuple) else (got,)
    results = [
        func(*[a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)])
        for i in range(size)
    ]
    columns = zip(*[r if isinstance(r, tuple) else (r,) for r in results], strict=True)
    want = tuple(torch.stack(c) for c in columns)
    assert len(got) == len(want), label
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert_close(mine, theirs, tolerance, f"{label}, result {i}")
    if not gradient:
        return
    leaves = [a for a in args if a.requires_grad]
    try:
        theirs = _gradients(want, leaves)
    except RuntimeError as refusal:  # operators that older versions of torch cannot differentiate
        if "derivative for" not in str(refusal):
            raise
        with pytest.raises(RuntimeError, match="derivative for"):
            _gradients(got, leaves)
        return
    mine = _gradients(got, leaves)
    for i, (m, t) in enumerate(zip(mine, theirs, strict=True)):
        if m is not None or t is not None:
            other = m if t is None else t
            assert other is not None
            zeros = torch.zeros_like(other)
            assert_close(
                zeros if m is None else m,
                zeros if t is None else t,
                tolerance,
                f"{label}, gradient {i}",
            )


def _gradients(
    outputs: tuple[torch.Tensor, ...], leaves: list[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    used = [t for t in outputs if t.requires_grad]
    if not used or not leaves:
        return [None] * len(leaves)
    weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape) for t in used]
    return torch.autograd.grad(
        [(t * w).sum() for t, w in zip(used, weights, strict=True)], leaves, allow_unused=True
    )


def assert_close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float, label: str) -> None:
    """Raises unless shape, dtype and values agree, NaN equal to NaN."""
    assert mine.shape == theirs.shape, (
        f"{label}: shape {tuple(mine.shape)}, the loop has {tuple(theirs.shape)}"
    )
    assert mine.dtype == theirs.dtype, f"{label}: {mine.dtype}, the loop has {theirs.dtype}"
    wide = torch.complex128 if theirs.is_complex() else torch.float64
    mine, theirs = mine.detach().to(wide), theirs.detach().to(wide)
    scale = float(theirs.abs().nan_to_num(0, 0, 0).max()) if theirs.numel() else 0.0
    torch.testing.assert_close(
        mine,
        theirs,
        rtol=tolerance,
        atol=tolerance * max(scale, 1.0),
        equal_nan=True,
        msg=lambda m: f"{label}: {m}",
    )


@contextlib.contextmanager
def below_our_rules() -> Iterator[list[str]]:
    """Collect the calls of operators with a rule that another tier serves after all."""
    served: list[str] = []

    def watch(tier: Callable[..., Any]) -> Callable[..., Any]:
        def watched(b: Any, eq: Any, *rest: Any) -> Any:
            if registry.has_rule(eq.op):
                served.append(f"{tier.__name__}: {eq}")
            return tier(b, eq, *rest)

        return watched

    shardmap.clear_caches()
    names = "functorch_rule", "loop_rule"
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(
                unittest.mock.patch.object(batch, name, watch(getattr(batch, name)))
            )
        yield served
