"""Every function of the suite against the loop, on each way that a map runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import shardmap
from tests import oracle
from tests.conformance import (
    branches,
    containers,
    control_operators,
    distributions,
    functions,
    linear_algebra,
    loops,
    modules,
    numbers,
    selections,
    shapes,
    writes,
)
from tests.conformance.suite import SAMPLES, Case, Function

Tensor = torch.Tensor

FILES = [
    branches, containers, control_operators, distributions, functions, linear_algebra, loops,
    modules, numbers, selections, shapes, writes,
]  # fmt: skip
CASES = [case for file in FILES for case in file.case]

WAYS: dict[str, dict[str, Any]] = {
    "chunk 1": {"chunk_size": 1},
    "chunk 3": {"chunk_size": 3},
    "chunk N": {"chunk_size": SAMPLES},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 5},
    "once": {"trace": "once"},
}


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    shardmap.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def name(case: Case) -> str:
    """The file and the function."""
    return f"{case.function.__module__.rpartition('.')[2]}-{case.function.__name__}"


def total(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """A sum that depends in another way on each element."""
    terms = []
    for t in tensors:
        if t is not None and t.requires_grad:
            steps = torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).reshape(t.shape)
            for part in (t.real, t.imag) if t.is_complex() else (t,):
                terms.append(((part * steps).square() + 1).sqrt().sum())
    return torch.stack(terms).sum() if terms else None


def gradients(found: Sequence[Tensor], wrt: list[Tensor], orders: int) -> list[list[Tensor]]:
    """First and second gradients of outputs, zero where nothing leads there."""
    gathered: list[list[Tensor]] = []
    for order in range(orders):
        of = total(found)
        if of is None:
            found = [torch.zeros_like(t) for t in wrt]
        else:
            more = order + 1 < orders
            grads = torch.autograd.grad(of, wrt, create_graph=more, allow_unused=True)
            found = [
                torch.zeros_like(t) if g is None else g for g, t in zip(grads, wrt, strict=True)
            ]
        gathered.append(list(found))
    return gathered


def loop(function: Function, **_: Any) -> Function:
    """The plain loop: results stacked, numbers as tensors, None as it is."""

    def mapped(x: Tensor) -> Any:
        results = [pytree.tree_flatten(function(x[i])) for i in range(len(x))]
        columns = zip(*(leaves for leaves, _ in results), strict=True)
        stacked = [
            None if column[0] is None else torch.stack([torch.as_tensor(leaf) for leaf in column])
            for column in columns
        ]
        return pytree.tree_unflatten(stacked, results[0][1])

    return mapped


def without_history(case: Case) -> Function:
    """The function with its results detached: a store keeps no history."""

    def detached(r: Tensor) -> Any:
        return pytree.tree_map_only(Tensor, Tensor.detach, case.function(r))

    return detached


class Run:
    """All that a caller sees of one map: outputs, their structure, the batch, and gradients."""

    def __init__(self, case: Case, vmap: Callable[..., Any], options: dict[str, Any]):
        x = case.batch()
        self.leaves, self.spec = pytree.tree_flatten(vmap(case.function, **options)(x))
        self.after = x
        self.grads: list[list[Tensor]] = []
        self.graded: list[Tensor] = []
        if case.orders:
            x = case.batch().requires_grad_()
            gain = torch.ones((), dtype=case.dtype, requires_grad=True)
            mapped = vmap(lambda r: case.function(r * gain), **options)
            if options.get("trace") == "once":
                mapped(x)
            found = [leaf for leaf in pytree.tree_leaves(mapped(x)) if leaf is not None]
            self.graded = found
            self.grads = gradients(found, [x, gain, *case.weights], case.orders)


def compare(got: Run, want: Run, way: str) -> None:
    """Each sample, in structure, dtype and value, and each gradient."""
    assert got.spec == want.spec, way
    for i, (a, b) in enumerate(zip(got.leaves, want.leaves, strict=True)):
        if b is None:
            assert a is None, f"{way}: output {i}"
        else:
            oracle.assert_same(a, b, f"{way}: output {i}")
    for i, (a, b) in enumerate(zip(got.graded, want.graded, strict=True)):
        oracle.assert_same(a, b, f"{way}: output {i} with gradients")
        assert a.requires_grad == b.requires_grad, f"{way}: output {i} requires_grad"
    oracle.assert_same(got.after, want.after, f"{way}: the batch afterwards")
    for order, (mine, theirs) in enumerate(zip(got.grads, want.grads, strict=True), 1):
        scale = max(float(t.abs().nan_to_num(0.0, 0.0, 0.0).max()) for t in theirs if t.numel())
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            # What cancels in one sum is compared with what entered it.
            dtype = torch.complex128 if b.is_complex() else torch.float64
            rough = 1e-3 if a.dtype in (torch.float32, torch.complex64) else 1e-7
            what = f"{way}: gradient {i} of order {order}"
            assert a.dtype == b.dtype, what
            torch.testing.assert_close(
                a.to(dtype), b.to(dtype), rtol=rough, atol=rough / 10 * scale, equal_nan=True,
                msg=lambda text, what=what: f"{what}: {text}",
            )  # fmt: skip


def test_names_are_of_one_function_each() -> None:
    assert len(CASES) >= 200
    assert len({name(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_way_is_the_loops(case: Case, tmp_path: Path) -> None:
    reference = replace(case, function=case.plain) if case.plain else case
    want = Run(reference, loop, {})
    if case.refused is not None:
        for options in WAYS.values():
            with pytest.raises(case.refused):
                Run(case, shardmap.vmap, options | case.options)
        return
    for way, options in WAYS.items():
        compare(Run(case, shardmap.vmap, options | case.options), want, way)
    sink = shardmap.MemmapSink(tmp_path / "rows")
    stored = shardmap.vmap(without_history(case), out=sink, chunk_size=5, **case.options)(
        case.batch()
    )
    tensors = [leaf for leaf in want.leaves if leaf is not None]
    assert len(stored.header.outputs) == len(tensors)
    for i, leaf in enumerate(tensors):
        oracle.assert_same(stored.read(i, 0, SAMPLES), leaf, f"stored output {i}")
