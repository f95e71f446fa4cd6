"""Samples that take different paths: each against the loop, on each way that a map runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.call import routes, spread
from tests import oracle
from tests.call.paths import WAYS, batch, expected
from tests.call.runs import counting

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("paths_pay_early")


def branch(r: Tensor) -> Tensor:
    """Two ways by a sum."""
    return r.sin() * 2 if r.sum() > 0 else r.cos()


def branch_in_a_branch(r: Tensor) -> Tensor:
    """Three ways, the third behind the second."""
    if r[0] > 0:
        return r.exp()
    y = r * 2
    return y.tanh() if y[1] > 0 else y - 1


def newton(r: Tensor) -> Tensor:
    """The square root of each sum, until it has converged."""
    a = r.abs().sum() + 0.1
    x = a
    for _ in range(50):
        step = 0.5 * (x + a / x)
        if (step - x).abs() < 1e-5 * step:
            return step * r
        x = step
    return x * r


def bisection(r: Tensor) -> Tensor:
    """Halves an interval: a question a step."""
    low, high = torch.tensor(-4.0), torch.tensor(4.0)
    while high - low > 0.5:
        middle = (low + high) / 2
        if (middle.tanh() - r[0].tanh()) > 0:
            high = middle
        else:
            low = middle
    return low + r


def argmax_as_a_number(r: Tensor) -> Tensor:
    """A slice from the sample's own start."""
    start = int(r.abs().argmax())
    return r[start:].sum() * r


def repeated(r: Tensor) -> Tensor:
    """A loop as long as the sample says."""
    out = torch.zeros_like(r)
    for i in range(int((r > 0).sum())):
        out = out + r * (i + 1)
    return out


def masked_values(r: Tensor) -> Tensor:
    """A masked write of values that were computed from the masked values."""
    t = r.clone()
    t[t > 0] = t[t > 0].sin() * 3
    return t


def masked_in_place(r: Tensor) -> Tensor:
    """A masked write in place."""
    t = r.clone()
    t[t > 0.5] *= 2
    return t


def positions(r: Tensor) -> Tensor:
    """The positions of what is positive, summed."""
    return r * (r > 0).nonzero().sum()


def selected(r: Tensor) -> Tensor:
    """A mean over what is selected."""
    return r * r.masked_select(r > 0).sum()


def repeats(r: Tensor) -> Tensor:
    """Entries repeated as often as they say."""
    counts = r.abs().round().long()
    return torch.repeat_interleave(r, counts).sum() + r


def equal_to_its_sort(r: Tensor) -> Tensor:
    """`torch.equal` of two things that differ by sample."""
    return r if torch.equal(r, r.sort().values) else r.flip(0)


def jitter_until_positive_definite(r: Tensor) -> Tensor:
    """Adds more to the diagonal until the factorisation works."""
    matrix, eye, jitter = r[:, None] * r[None], torch.eye(len(r)), 0.0
    while True:
        factor, info = torch.linalg.cholesky_ex(matrix + jitter * eye)
        if info == 0:
            return factor
        jitter = max(jitter * 10, 1e-2)


def caught(r: Tensor) -> Tensor:
    """An error that the function itself catches."""
    try:
        return torch.linalg.cholesky(r[:, None] * r[None] + r.sum() * torch.eye(len(r)))
    except torch.linalg.LinAlgError:
        return r[:, None] * r[None]


def normalised(r: Tensor) -> Tensor:
    """Asserts and checks for NaN, which all samples answer alike."""
    assert (r.abs() < 100).all()
    if torch.isnan(r).any():
        raise ValueError("NaN")
    return r / r.norm()


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    branch, branch_in_a_branch, newton, bisection, argmax_as_a_number, repeated, masked_values,
    masked_in_place, positions, selected, repeats, equal_to_its_sort,
    jitter_until_positive_definite, caught, normalised,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_sample_is_the_loops(function: Callable[[Tensor], Tensor], way: str) -> None:
    x = batch(61)
    want = expected(function, x)
    mapped = shardmap.vmap(function, **WAYS[way])
    for _ in range(2):
        oracle.assert_same(mapped(x), want, function.__name__)


@pytest.mark.parametrize("size", [1, 2, 3, 17])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_small_batches(function: Callable[[Tensor], Tensor], size: int) -> None:
    x = batch(size)
    oracle.assert_same(shardmap.vmap(function)(x), expected(function, x), function.__name__)


def test_an_empty_batch() -> None:
    assert shardmap.vmap(branch)(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("way", ["plain", "chunk 3", "two lanes", "once"])
@pytest.mark.parametrize("function", [branch, branch_in_a_branch, newton, masked_values, repeated])
def test_first_and_second_gradients(function: Callable[..., Any], way: str) -> None:
    weight = torch.tensor([0.7, -1.2, 0.4], requires_grad=True)
    found = []
    for run in (shardmap.vmap(lambda r: function(r * weight), **WAYS[way]),
                lambda x: expected(lambda r: function(r * weight), x)):  # fmt: skip
        x = batch(61).requires_grad_()
        out = run(x)
        first = torch.autograd.grad(out.sin().sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))
        found.append((out, *first, *second))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_wasted_way_leaves_no_nan_in_the_gradients() -> None:
    """The other way would divide by zero: its samples never take it."""
    x = torch.cat([torch.zeros(20), torch.rand(20)])[torch.randperm(40)].requires_grad_()
    function = lambda r: r / r.sqrt() if r > 0 else r * 2
    (got,) = torch.autograd.grad(shardmap.vmap(function)(x).sum(), x)
    (want,) = torch.autograd.grad(expected(function, x).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("how", ["sum", "mean", "max", "min"])
def test_reduced(how: str) -> None:
    x = batch(61)
    want = expected(branch, x)
    reduced = want.amax(0) if how == "max" else want.amin(0) if how == "min" else None
    reduced = getattr(want, how)(0) if reduced is None else reduced
    for size in (1, 7, None):
        got = shardmap.vmap(branch, reduce=how, chunk_size=size)(x)
        torch.testing.assert_close(got, reduced)


def test_stored(tmp_path: Path) -> None:
    x = batch(61)
    sink = shardmap.MemmapSink(tmp_path / "rows")
    store = shardmap.vmap(branch, out=sink, chunk_size=7)(x)
    oracle.assert_same(store.read("result", 0, 61), expected(branch, x), "stored")


def test_an_argument_that_is_written_in_place_on_one_way() -> None:
    def function(r: Tensor) -> Tensor:
        if r.sum() > 0:
            r.mul_(2)
        return r.sum()

    own, theirs = batch(61), batch(61)
    want = torch.stack([function(r) for r in theirs])
    oracle.assert_same(shardmap.vmap(function, chunk_size=7)(own), want, "result")
    oracle.assert_same(own, theirs, "argument")


def test_a_captured_tensor_that_changes_between_calls() -> None:
    x, weight = batch(61), torch.ones(3)
    mapped = shardmap.vmap(lambda r: branch(r * weight), trace="once")
    for factor in (1.0, -2.0, 0.5):
        weight.mul_(factor)
        oracle.assert_same(mapped(x), expected(lambda r: branch(r * weight), x), "result")


def test_an_unmapped_argument_with_trace_once() -> None:
    x = batch(61)
    mapped = shardmap.vmap(lambda r, w: branch(r * w), in_dims=(0, None), trace="once")
    for w in (torch.ones(3), -torch.ones(3), torch.tensor([1.0, -1.0, 2.0])):
        oracle.assert_same(mapped(x, w), expected(lambda r, w=w: branch(r * w), x), "result")


def test_other_in_dims_and_out_dims() -> None:
    x = batch(61)
    got = shardmap.vmap(branch, in_dims=1, out_dims=1)(x.t().contiguous())
    oracle.assert_same(got, expected(branch, x).t(), "result")


def test_structures_and_dtypes() -> None:
    def function(r: Tensor) -> dict[str, Tensor]:
        return {"a": r, "n": r.sum()} if r[0] > 0 else {"a": r * 2, "n": r.sum().long()}

    x = batch(61)
    found = shardmap.vmap(function)(x)
    for name in ("a", "n"):
        want = torch.stack([function(r)[name].to(torch.float32) for r in x])
        oracle.assert_same(found[name], want, name)


def test_inside_another_map() -> None:
    x = batch(35).reshape(5, 7, 3)
    inner = shardmap.vmap(branch)
    got = shardmap.vmap(lambda rows: inner(rows).sum(0))(x)
    oracle.assert_same(got, torch.stack([expected(branch, r).sum(0) for r in x]), "result")


def test_under_gradients_of_torch_func() -> None:
    x = batch(61)
    got = torch.func.grad(lambda t: shardmap.vmap(branch)(t).square().sum())(x)
    y = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(expected(branch, y).square().sum(), y)
    torch.testing.assert_close(got, want)


def test_ragged_results() -> None:
    x = batch(61)
    function = lambda r: r[r > 0] * 2
    rows = [function(r) for r in x]
    with pytest.raises(errors.RaggedError, match="ragged='list'.*ragged='nested'"):
        shardmap.vmap(function)(x)
    listed = shardmap.vmap(function, ragged="list")(x)
    nested = shardmap.vmap(function, ragged="nested")(x)
    assert nested.layout is torch.jagged
    for got in (listed, list(nested.unbind())):
        assert len(got) == 61
        for k, (a, b) in enumerate(zip(got, rows, strict=True)):
            oracle.assert_same(a, b, f"sample {k}")
    with pytest.raises(errors.OptionError, match=r"ragged='list'.*reduce="):
        shardmap.vmap(function, ragged="list", reduce="sum")(x)


def test_a_number_asked_for_goes_past_the_most_paths() -> None:
    x = batch(150)
    x = x.repeat_interleave(10, 0)
    function = lambda r: r * r.sum().item()
    with pytest.warns(shardmap.SlowLoopWarning, match=r"max_paths=64.*test_paths\.py"):
        got = shardmap.vmap(function)(x)
    oracle.assert_same(got, expected(function, x), "result")
    with pytest.raises(errors.DataDependentError, match=r"max_paths=64.*strict=True"):
        shardmap.vmap(function, strict=True)(x)
    oracle.assert_same(shardmap.vmap(function, max_paths=200)(x), expected(function, x), "more")


def test_a_path_is_recorded_on_one_sample_only() -> None:
    calls = 0

    def function(r: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return branch(r)

    x = batch(1000)
    mapped = shardmap.vmap(function)
    mapped(x)
    mapped(x)
    first, calls = calls, 0
    mapped(x)
    assert first <= 12 + 1000 // spread.TRIED_OF
    assert calls == 2
    once = shardmap.vmap(branch, trace="once")
    once(x)
    oracle.assert_same(once(x), expected(branch, x), "once")


def test_few_samples_of_a_new_way_are_looped_until_they_were_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    x = batch(61)
    x[0] = 1
    others = int((x.sum(1) <= 0).sum())
    assert others < routes.WORTH <= 3 * others
    mapped, counts, want = shardmap.vmap(branch), [], expected(branch, x)
    for _ in range(6):
        with counting(branch) as calls:
            found = mapped(x)
        oracle.assert_same(found, want, "result")
        counts.append(calls())
    assert counts[0] >= others
    assert counts[-1] == 1, "the other way, at each call"


def test_draws_that_decide_the_way_are_served_by_the_loop() -> None:
    def function(r: Tensor) -> Tensor:
        return r * 2 if torch.rand(()) > 0.5 else r

    x = batch(61).abs() + 1
    found = []
    for options in ({}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"], "chunk_size": 5}):
        torch.manual_seed(1)
        found.append(shardmap.vmap(function, randomness="different", **options)(x))
    assert all(torch.equal(found[0], other) for other in found[1:])
    doubled = (found[0] / x).round()
    assert sorted(doubled.unique().tolist()) == [1.0, 2.0]
    oracle.assert_same(found[0], x * doubled, "every sample is one of both")


def test_planned_and_compared() -> None:
    x = batch(61)
    plan = shardmap.plan(branch, chunk_size=7)(x)
    oracle.assert_same(plan.run(), expected(branch, x), "planned")
    found = shardmap.compare(branch)(x)
    assert found.agrees
    assert "loop" not in found.tiers.values()


@pytest.mark.parametrize("value", [0, -1, True, "many"])
def test_max_paths_is_a_number(value: Any) -> None:
    with pytest.raises(errors.OptionError, match="max_paths="):
        shardmap.vmap(branch, max_paths=value)


def test_ragged_is_one_of_three() -> None:
    with pytest.raises(errors.OptionError, match="ragged='pad'.*'error', 'list' or 'nested'"):
        shardmap.vmap(branch, ragged="pad")


@pytest.mark.parametrize("size", [3, 5, 61])
def test_draws_on_a_way_that_was_not_recorded_first(size: int) -> None:
    """The first sample draws nothing; few or many others do."""
    x = batch(size)
    x[0] = 1

    def function(r: Tensor) -> Tensor:
        return r if r.sum() > 0 else r + torch.rand(3)

    found = []
    for options in ({}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"], "chunk_size": 2}):
        torch.manual_seed(0)
        mapped = shardmap.vmap(function, randomness="different", **options)
        found.append((mapped(x), mapped(x)))
    draws = x.sum(1) <= 0
    for first, second in found:
        assert torch.equal(first, found[0][0])
        assert torch.equal(second, found[0][1])
        for drawn in (first - x)[draws], (second - x)[draws]:
            assert ((drawn >= -1e-6) & (drawn < 1)).all()
            assert len(drawn.unique(dim=0)) == len(drawn)
        assert (first != second)[draws].any(1).all()
        assert torch.equal(first[~draws], x[~draws])
    with pytest.raises(errors.RandomnessError, match="randomness is 'error'"):
        shardmap.vmap(function)(x)


def test_a_plan_and_a_comparison_say_the_ways() -> None:
    """How many samples take each way, what they answer, and at which lines."""
    x = batch(61)
    positive = int((x[:, 0] > 0).sum())
    for text in (shardmap.plan(branch_in_a_branch)(x).explain(),
                 str(shardmap.compare(branch_in_a_branch)(x))):  # fmt: skip
        assert "Samples go 3 ways by what python asks about their values:" in text
        assert f"{positive} of 61, batched: True at {__file__}:" in text
        assert len([line for line in text.splitlines() if "of 61, batched: False at" in line]) == 2
    repeated = shardmap.plan(newton)(x.abs()).explain()
    assert re.search(r"\d+ times False at .*, True at ", repeated)
    assert "a program for each path" in repeated  # whose operators are not told apart
    assert "ways by what python asks" not in shardmap.plan(torch.sin)(x).explain()
    few = shardmap.plan(lambda r: r * r.sum().item(), max_paths=3)(x).explain()
    assert "60 of 61, one by one: the function itself" in few or "58 of 61, one by one" in few
