"""Reductions over the samples equal the loop's results reduced by torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from shardmap.run.base import ChunkDone, listen
from tests import oracle
from tests.reduce.expected import (
    CHUNKS,
    DEVICES,
    DTYPES,
    SIZES,
    batch_of,
    exact,
    permitted,
    reduced,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_named_reductions_equal_torchs_of_the_stack(name: str, dtype: torch.dtype) -> None:
    """Values and dtypes; integers and bools are summed in int64; what is not defined is refused."""
    for samples in SIZES:
        batch = batch_of(dtype, samples, 2, 3)
        for chunk_size in CHUNKS:
            for devices in DEVICES:
                mapped = shardmap.vmap(
                    lambda x: x.flip(0), reduce=name, chunk_size=chunk_size, devices=devices
                )
                if not permitted(name, dtype):
                    with pytest.raises(errors.OptionError, match=f"reduce='{name}'.*{dtype}"):
                        mapped(batch)
                    continue
                got, stacked = mapped(batch), oracle.loop(lambda x: x.flip(0))(batch)
                oracle.assert_same(
                    got,
                    reduced(name, stacked),
                    f"{samples} samples, chunk_size={chunk_size}, devices={devices}",
                )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("name", ["sum", "mean"])
def test_sums_of_many_samples_lose_no_digits(name: str, dtype: torch.dtype) -> None:
    """10,007 samples, one at a time or seven: to two units of rounding of the exact result."""
    batch = batch_of(dtype, 10_007, 2).abs().to(dtype) + 1
    want = exact(name, batch * 1)
    for chunk_size in (7, 1000, "auto"):
        got = shardmap.vmap(lambda x: x * 1, reduce=name, chunk_size=chunk_size)(batch)
        assert got.dtype == dtype
        assert ((got - want).abs() <= 2 * torch.finfo(dtype).eps * want.abs()).all(), (
            chunk_size,
            got,
            want,
        )


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_a_half_precision_sum_larger_than_its_dtype_overflows_as_torchs(chunk_size: Any) -> None:
    batch = torch.full((7, 2), 30_000.0, dtype=torch.float16)
    got = shardmap.vmap(lambda x: x * 1, reduce="sum", chunk_size=chunk_size)(batch)
    assert got.isinf().all()
    mean = shardmap.vmap(lambda x: x * 1, reduce="mean", chunk_size=chunk_size)(batch)
    oracle.assert_same(mean, batch.mean(0), "mean")


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_nan_and_infinities_come_through(name: str, chunk_size: Any) -> None:
    batch = torch.tensor(
        [
            [1.0, 2.0, 0.0, -1.0],
            [float("nan"), 5.0, float("inf"), 2.0],
            [3.0, 4.0, float("-inf"), float("inf")],
        ]
    )
    for order in (batch, batch.flip(0), batch[[1, 0, 2]]):
        got = shardmap.vmap(lambda x: x * 1, reduce=name, chunk_size=chunk_size)(order)
        oracle.assert_same(got, reduced(name, order), name)
        assert got[0].isnan()


@pytest.mark.parametrize(
    "make", [shardmap.reduce.sum, shardmap.reduce.mean, shardmap.reduce.max, shardmap.reduce.min]
)
def test_functions_say_the_same_as_names(make: Callable[[], Any]) -> None:
    batch = batch_of(torch.float64, 7, 3)
    by_name = shardmap.vmap(torch.exp, reduce=make.__name__, chunk_size=2)(batch)
    by_call = shardmap.vmap(torch.exp, reduce=make(), chunk_size=2)(batch)
    assert torch.equal(by_name, by_call)


def test_results_of_no_dimensions() -> None:
    batch = batch_of(torch.float64, 13, 3)
    for name in ("sum", "mean", "max", "min"):
        for chunk_size in CHUNKS:
            got = shardmap.vmap(lambda x: x.sum(), reduce=name, chunk_size=chunk_size)(batch)
            oracle.assert_same(got, reduced(name, batch.sum(1)), name)


def test_results_without_elements() -> None:
    batch = batch_of(torch.float64, 5, 0, 3)
    for name in ("sum", "mean", "max", "min"):
        got = shardmap.vmap(lambda x: x * 2, reduce=name, chunk_size=2)(batch)
        assert got.shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("devices", DEVICES)
def test_the_sum_of_no_samples_is_zero(dtype: torch.dtype, devices: Any) -> None:
    batch = batch_of(dtype, 0, 2, 3)
    got = shardmap.vmap(lambda x: x.flip(0), reduce="sum", devices=devices)(batch)
    oracle.assert_same(got, batch.flip(1).sum(0), "sum")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_the_mean_of_no_samples_is_nan(dtype: torch.dtype) -> None:
    got = shardmap.vmap(lambda x: x * 1, reduce="mean")(batch_of(dtype, 0, 2))
    assert (got.shape, got.dtype) == ((2,), dtype)
    assert got.isnan().all()


@pytest.mark.parametrize(
    "reduce",
    ["max", "min", shardmap.reduce.max(), (torch.add, None), shardmap.reduce.fold(torch.add)],
)
def test_other_reductions_of_no_samples_are_refused(reduce: Any) -> None:
    with pytest.raises(
        errors.EmptyBatchError, match=r"shardmap.vmap\(exp.*reduce=.*no samples is not defined"
    ):
        shardmap.vmap(torch.exp, reduce=reduce)(torch.zeros(0, 2))


def test_an_empty_batch_keeps_gradients_defined() -> None:
    batch = torch.zeros(0, 2, requires_grad=True)
    out = shardmap.vmap(torch.exp, reduce="sum")(batch)
    assert torch.equal(out, torch.zeros(2))


@pytest.mark.parametrize("samples", SIZES)
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("devices", DEVICES)
def test_a_fold_keeps_the_order_of_the_samples(samples: int, chunk_size: Any, devices: Any) -> None:
    """Products of matrices are associative, and no two commute."""
    batch = torch.linalg.qr(batch_of(torch.float64, samples, 3, 3))[0]
    got = shardmap.vmap(
        lambda m: m * 1, reduce=(torch.matmul, None), chunk_size=chunk_size, devices=devices
    )(batch)
    oracle.assert_same(got, functools.reduce(torch.matmul, batch.unbind(0)), "product")


def test_a_fold_finishes_once() -> None:
    calls = []

    def finish(total: torch.Tensor) -> torch.Tensor:
        calls.append(total)
        return total.sqrt()

    batch = batch_of(torch.float64, 13, 4)
    got = shardmap.vmap(torch.square, reduce=(torch.add, finish), chunk_size=3)(batch)
    oracle.assert_same(got, batch.norm(dim=0), "norm")
    assert len(calls) == 1


def test_a_fold_of_one_sample_is_that_sample_finished() -> None:
    got = shardmap.vmap(torch.square, reduce=(torch.add, torch.neg))(torch.full((1, 2), 3.0))
    assert torch.equal(got, torch.full((2,), -9.0))


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_a_fold_with_a_captured_tensor_and_data_dependent_choice(chunk_size: Any) -> None:
    """The combination is itself a mapped function.

    It may capture, branch by torch.where, and run autograd.
    """
    weight = batch_of(torch.float64, 3)

    def larger(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where((a * weight).sum() >= (b * weight).sum(), a, b)

    batch = batch_of(torch.float64, 13, 3)
    got = shardmap.vmap(lambda x: x * 1, reduce=(larger, None), chunk_size=chunk_size)(batch)
    oracle.assert_same(got, functools.reduce(larger, batch.unbind(0)), "largest by a weight")


def test_a_fold_reports_no_maps_of_its_own() -> None:
    events: list[Any] = []
    with listen(events.append):
        shardmap.vmap(lambda x: x * 1, reduce=(torch.add, None), chunk_size=4)(torch.ones(13, 2))
    assert [(e.start, e.stop) for e in events if isinstance(e, ChunkDone)] == [
        (0, 4),
        (4, 8),
        (8, 12),
        (12, 13),
    ]


def test_a_combination_of_another_shape_is_refused() -> None:
    with pytest.raises(errors.ShardmapError, match=r"(?s)shardmap.vmap\(.*reduce"):
        shardmap.vmap(lambda x: x * 1, reduce=(lambda a, b: torch.cat([a, b]), None))(
            torch.ones(5, 2)
        )


TREES: tuple[Any, ...] = (
    "sum",
    None,
    {"a": "mean", "b": None, "c": "sum"},
    {"a": ("sum", None), "b": "max", "c": None},
    {"a": None, "b": "min", "c": ("sum", (torch.add, None))},
    {
        "a": (shardmap.reduce.sum(), shardmap.reduce.max()),
        "b": shardmap.reduce.fold(torch.maximum),
        "c": ("mean", "min"),
    },
)


def several(x: torch.Tensor) -> dict[str, Any]:
    return {"a": (x * 2, x.outer(x)), "b": x.exp(), "c": (x.sum(), x.cumsum(0))}


def apply(reduction: Any, stacked: torch.Tensor, out_dim: int) -> torch.Tensor:
    """The result of one reduction of one stacked output."""
    if reduction is None:
        return stacked.movedim(0, out_dim).contiguous()
    if isinstance(reduction, tuple):
        return functools.reduce(reduction[0], stacked.unbind(0))
    if not isinstance(reduction, str):
        return (
            functools.reduce(reduction.combine, stacked.unbind(0))
            if reduction.combine
            else reduced(reduction.name, stacked)
        )
    return reduced(reduction, stacked)


@pytest.mark.parametrize("reduce", TREES)
@pytest.mark.parametrize("out_dims", [0, -1, {"a": 1, "b": 0, "c": 0}])
@pytest.mark.parametrize("chunk_size", ["auto", 3, None])
def test_each_output_has_its_reduction(reduce: Any, out_dims: Any, chunk_size: Any) -> None:
    """A pytree prefix with None to stack, mixed with out_dims."""
    batch = batch_of(torch.float64, 7, 3)
    got = shardmap.vmap(several, 0, out_dims, reduce=reduce, chunk_size=chunk_size)(batch)
    stacked = oracle.loop(several)(batch)

    def leaf(value: Any) -> bool:
        return shardmap.reduce.is_one(value) and not isinstance(value, dict)

    reductions: list[Any] = []
    for key in ("a", "b", "c"):
        one = reduce[key] if isinstance(reduce, dict) else reduce
        count = len(pytree.tree_leaves(stacked[key]))
        reductions += [one] * count if leaf(one) else list(one)
    flat, spec = pytree.tree_flatten(stacked)
    placed = [
        out_dims
        if isinstance(out_dims, int)
        else out_dims["a" if i < 2 else "b" if i == 2 else "c"]
        for i in range(len(flat))
    ]
    assert pytree.tree_structure(got) == spec
    for i, (g, s, r, d) in enumerate(
        zip(pytree.tree_leaves(got), flat, reductions, placed, strict=True)
    ):
        want = apply(r, s, d)
        oracle.assert_same(g, want, f"output {i}")
        assert g.is_contiguous()


@pytest.mark.parametrize(
    "reduce",
    [
        "product",
        3,
        ("sum",),
        {"a": "sum"},
        {"a": "sum", "b": "sum", "d": "sum"},
        ["sum", "sum"],
        {"a": ("sum",) * 3, "b": 0, "c": 0},
    ],
)
def test_a_reduction_that_does_not_fit_is_refused(reduce: Any) -> None:
    with pytest.raises(errors.OptionError, match=r"shardmap.vmap\(several, in_dims=0\): reduce="):
        shardmap.vmap(several, reduce=reduce)(torch.ones(3, 2))


def unchanged_outputs_count_for_each_sample(**options: Any) -> None:
    """Sums, means, extremes and folds of unmapped outputs, on any executor."""
    weight = batch_of(torch.float64, 3)
    batch = batch_of(torch.float64, 7, 3)

    def function(x: torch.Tensor) -> Any:
        return weight.exp(), weight.exp(), weight, weight.exp(), x * weight

    reduce = ("sum", "mean", "max", (torch.add, None), "sum")
    got = shardmap.vmap(function, reduce=reduce, **options)(batch)
    want = (weight.exp() * 7, weight.exp(), weight, weight.exp() * 7, (batch * weight).sum(0))
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        oracle.assert_same(g, w, f"output {i}")
    oracle.assert_own_memory(list(got), [weight, batch])


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("devices", DEVICES)
def test_an_output_that_no_sample_changes_counts_once_for_each(
    chunk_size: Any, devices: Any
) -> None:
    unchanged_outputs_count_for_each_sample(chunk_size=chunk_size, devices=devices)


def test_an_output_that_no_sample_changes_and_there_are_none() -> None:
    weight = batch_of(torch.float64, 3)
    got = shardmap.vmap(lambda x: (weight * 2, weight > 0), reduce="sum")(torch.zeros(0, 3))
    assert torch.equal(got[0], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(got[1], torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", (torch.add, None)])
@pytest.mark.parametrize("grad", [False, True])
def test_a_reduction_has_memory_of_its_own(reduce: Any, grad: bool) -> None:
    """Also of a single sample, of an output that is an input, and of a constant output."""
    if grad and reduce in ("max", "min"):
        reduce = "sum"
    weight = batch_of(torch.float64, 3)
    for samples in (1, 3):
        batch = batch_of(torch.float64, samples, 3).requires_grad_(grad)
        for chunk_size in (1, None):
            got = shardmap.vmap(
                lambda x: (x, x, x * 1, weight, weight), reduce=reduce, chunk_size=chunk_size
            )(batch)
            oracle.assert_own_memory(list(got), [batch, weight])
