"""Tests of the check on a second sample when a function is mapped for the first time."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from tests import oracle

x = torch.tensor(
    [[1.0, 2.0, -1.0], [-1.0, -2.0, -1.0], [3.0, 1.0, 4.0], [1.0, 1.0, -6.0], [2.0, -7.0, 1.0]]
)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 1": {"chunk_size": 1},
    "chunk 2": {"chunk_size": 2},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "always": {"check": "always"},
}


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    shardmap.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
        yield


def _in_a_thread(r: torch.Tensor) -> torch.Tensor:
    box: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: box.append(r * 2))
    thread.start()
    thread.join()
    return box[0]


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(v)
        return v * v

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * torch.from_numpy(2 * ctx.saved_tensors[0].numpy())


def _numpy_backward(r: torch.Tensor) -> torch.Tensor:
    w = r.clone().requires_grad_()
    return torch.autograd.grad((_Square.apply(w) * w).sum(), w)[0]


def _clipped_by_a_hook(r: torch.Tensor) -> torch.Tensor:
    w = r.clone().requires_grad_()
    y = w * 2
    y.register_hook(lambda g: torch.from_numpy(g.numpy().clip(-1, 1)))
    return torch.autograd.grad((y**2).sum(), w)[0]


VARYING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a printed number": lambda r: r * float(repr(r[0])[7:-1]),
    "a length": lambda r: r / max(1, len(r[r > 0])),
    "a shape of nonzero": lambda r: torch.tensor((r > 0).nonzero().shape[0]),
    "numbers of unique": lambda r: r * r.unique().numel(),
    "a masked selection": lambda r: r + r.masked_select(r > 1).numel(),
    "work in a thread": _in_a_thread,
    "numpy in a backward": _numpy_backward,
    "numpy in a hook": _clipped_by_a_hook,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", VARYING)
def test_what_varies_by_another_door_is_served_sample_by_sample(name: str, way: str) -> None:
    """Right, or refused by name; never the first sample's value for all."""
    function = VARYING[name]
    want = torch.stack([function(r) for r in x])
    for _ in range(2):
        try:
            got = shardmap.vmap(function, **WAYS[way])(x)
        except errors.EscapeError:
            return
        oracle.assert_same(got, want, f"{name}, {way}")


@pytest.mark.parametrize("size", [0, 1, 3, 5])
def test_a_length_in_batches_of_every_size(size: int) -> None:
    function = VARYING["a length"]
    got = shardmap.vmap(function)(x[:size])
    oracle.assert_same(got, torch.stack([*map(function, x[:size])]) if size else x[:0], "output")


def test_only_a_sample_in_the_middle_differs() -> None:
    """The recordings of the first and the last agree; the guard outlives the operator it guards."""
    rows = torch.tensor([[1.0, -1.0], [1.0, 2.0], [3.0, -2.0]])
    function = lambda r: r / len(r[r > 0])
    for options in ({}, {"chunk_size": 1}, {"trace": "once"}):
        for _ in range(2):
            got = shardmap.vmap(function, **options)(rows)
            oracle.assert_same(got, torch.stack([*map(function, rows)]), str(options))


def test_reduced_stored_and_differentiated_sample_by_sample(tmp_path: Any) -> None:
    weight = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    function = lambda r: (r * weight).sin() / max(1, len(r[r > 0]))
    want = torch.stack([function(r) for r in x])
    got = shardmap.vmap(function, chunk_size=2)(x)
    (gradient,) = torch.autograd.grad(got.square().sum(), weight)
    (expected,) = torch.autograd.grad(want.square().sum(), weight)
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        oracle.assert_same(shardmap.vmap(function, reduce="sum")(x), want.detach().sum(0), "sum")
        got = shardmap.vmap(function, reduce="max", chunk_size=2)(x)
        oracle.assert_same(got, want.detach().amax(0), "max")
        store = shardmap.vmap(function, out=shardmap.MemmapSink(tmp_path / "s"), chunk_size=2)(x)
        oracle.assert_same(store.read("result", 0, 5), want.detach(), "store")


def test_a_loss_with_gradients_inside_is_served_sample_by_sample() -> None:
    """Replays run without gradients; the function runs with them, as it was called."""
    model = nn.Linear(3, 2)

    def function(r: torch.Tensor) -> Any:
        loss = model(r).square().sum() * max(1, len(r[r > 0]))
        return torch.autograd.grad(loss, tuple(model.parameters()))

    got = shardmap.vmap(function, chunk_size=2)(x)
    for found, column in zip(got, zip(*map(function, x), strict=True), strict=True):
        oracle.assert_same(found, torch.stack(column), "gradients")


def test_draws_sample_by_sample_depend_on_the_seed_and_the_sample_only() -> None:
    function = lambda r: torch.randn(2) * len(r[r > 0])
    found = []
    for options in ({}, {"chunk_size": 1}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}):
        torch.manual_seed(3)
        found.append(shardmap.vmap(function, randomness="different", **options)(x))
    for other in found[1:]:
        assert torch.equal(found[0], other)
    assert found[0][0].ne(found[0][4]).all()
    torch.manual_seed(3)
    one = shardmap.vmap(function, randomness="same")(x)
    assert torch.allclose(one[0] / 2, one[2] / 3)


def test_the_warning_names_what_varies_and_strict_refuses_it() -> None:
    function = VARYING["a printed number"]
    with pytest.warns(shardmap.SlowLoopWarning, match="sample by sample"):
        shardmap.vmap(function)(x)
    with pytest.raises(errors.VariesError, match="strict=True"):
        shardmap.vmap(function, strict=True)(x)
    oracle.assert_same(
        shardmap.vmap(lambda r: r / (r > 0).sum().clamp(min=1), strict=True)(x),
        torch.stack([r / (r > 0).sum().clamp(min=1) for r in x]),
        "the remedy",
    )


def test_other_devices_are_refused_where_the_function_itself_has_to_run() -> None:
    with pytest.raises(errors.VariesError, match=r"devices='ray'.*devices='auto'"):
        shardmap.vmap(VARYING["a printed number"], devices="ray")(x)


def test_a_counter_is_refused_by_name() -> None:
    numbers = itertools.count()
    with pytest.raises(errors.EscapeError, match="something else each time"):
        shardmap.vmap(lambda r: r * next(numbers))(x)


def test_a_cache_that_the_first_call_fills_is_no_difference() -> None:
    """Lazy modules and tables of positions are made once, and found by every later call."""
    made: dict[int, torch.Tensor] = {}

    def function(r: torch.Tensor) -> torch.Tensor:
        if len(r) not in made:
            made[len(r)] = torch.arange(len(r)) * 0.5
        return r * made[len(r)]

    oracle.assert_same(shardmap.vmap(function)(x), x * torch.arange(3) * 0.5, "output")
    lazy = nn.LazyLinear(2)
    lazy(x[0])
    oracle.assert_same(shardmap.vmap(lazy)(x), lazy(x), "lazy module")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_cache_is_filled_by_the_first_call_and_samples_vary_as_well(size: int, way: str) -> None:
    class Net(nn.Module):
        table: torch.Tensor | None = None

        def forward(self, row: torch.Tensor) -> torch.Tensor:
            if self.table is None:
                self.table = torch.arange(3.0).sin()
            return row * self.table * float(repr(row[0])[7:-1])

    mapped = shardmap.vmap(Net(), **WAYS[way])
    for rows in (x[:size], x[:size] + 1):
        wanted = torch.stack([Net()(row) for row in rows])
        torch.testing.assert_close(mapped(rows), wanted)


def test_a_cache_beside_a_counter_is_refused_still() -> None:
    calls: list[int] = []

    def function(row: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return row * len(calls) * float(repr(row[0])[7:-1])

    with pytest.raises(errors.EscapeError, match="something else each time that it is called"):
        shardmap.vmap(function)(x)


def test_a_graph_that_is_freed_is_compared_on_the_first_sample() -> None:
    """The Jacobian of the README: it cannot run twice, and the plan says so."""
    w = torch.randn(3, requires_grad=True)

    def rows() -> torch.Tensor:
        return w.sin() * w.sum()

    y = rows()
    got = shardmap.vmap(lambda v: torch.autograd.grad(y, w, v)[0])(torch.eye(3))
    oracle.assert_same(got, torch.autograd.functional.jacobian(lambda w: w.sin() * w.sum(), w), "J")
    y = rows()
    plan = shardmap.plan(lambda v: torch.autograd.grad(y, w, v)[0])(torch.eye(3))
    assert "compared on the first sample alone" in plan.explain()


def test_the_last_samples_own_error_reaches_the_user() -> None:
    def function(r: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is None:
            return r
        return torch.linalg.cholesky(torch.diag(r))

    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, -1.0]])
    with pytest.raises(torch.linalg.LinAlgError):
        shardmap.vmap(function)(rows)


def test_how_often_the_function_runs() -> None:
    calls: list[int] = []

    def function(r: torch.Tensor) -> torch.Tensor:
        return r.sin()

    def count(frame: types.FrameType, event: str, _: object) -> None:
        """The function reads no list that it changes: it would be recorded at each call."""
        if event == "call" and frame.f_code is function.__code__:
            calls.append(1)

    for options, first, later in (
        ({"trace": "each"}, 2, 1),
        ({"trace": "each", "check": "off"}, 1, 1),
        ({"trace": "each", "check": "always"}, 2, 2),
        ({"trace": "once"}, 2, 0),
        ({"trace": "once", "check": "off"}, 1, 0),
        ({"trace": "once", "check": "always"}, 2, 2),
    ):
        shardmap.clear_caches()
        mapped = shardmap.vmap(function, **options)
        for wanted in (first, later, later):
            calls.clear()
            sys.setprofile(count)
            try:
                mapped(x)
            finally:
                sys.setprofile(None)
            assert len(calls) == wanted, options


def test_a_check_leaves_no_trace() -> None:
    layer = nn.Linear(3, 3)
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    shardmap.vmap(lambda r: layer(r).sin(), check="always")(x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[arg-type]
    assert all(p.grad is None for p in layer.parameters())


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(
        errors.OptionError, match="check='often'; choose 'first', 'always' or 'off'"
    ):
        shardmap.vmap(torch.sin, check="often")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_function_that_frees_the_graph_it_differentiates_can_be_called_again(size):
    """A later call of the same code finds its recording as expected, and looks at it once more."""

    def gradients(retain: bool, row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, (left, right), row, retain_graph=retain)

    for number in range(4):
        left = torch.linspace(-1.0, 1.0, 3).add_(number).requires_grad_()
        right = torch.linspace(0.5, 2.0, 3).requires_grad_()
        out = (left @ right + (left**2).sum() + right.norm()).reshape(1) * right.exp()
        rows = torch.randn(size, 3)
        expected = [torch.stack(of) for of in zip(*(gradients(True, r) for r in rows), strict=True)]
        found = shardmap.vmap(functools.partial(gradients, False), chunk_size=size)(rows)
        torch.testing.assert_close(list(found), expected)


def test_equal_samples_are_no_verdict_for_later_ones() -> None:
    """A number that python reads unseen: the first batch's samples are all alike."""
    mapped = shardmap.vmap(lambda r: r * float(repr(r[0])[7:-1]), trace="each")
    alike = torch.ones(5, 3)
    assert torch.equal(mapped(alike), alike)
    rows = alike * torch.tensor([[2.0], [3.0], [0.5], [4.0], [1.0]])
    with pytest.warns(shardmap.SlowLoopWarning):
        found = mapped(rows)
    assert torch.equal(found, rows * rows)


class Carried:
    """What functions below keep from one sample for the next, in python."""

    total = 0.0
    best = -100.0
    seen: set[int]
    made: torch.Tensor | None = None

    def __init__(self) -> None:
        self.seen = set()

    def sum(self, r: torch.Tensor) -> torch.Tensor:
        self.total += r.sum().item()
        return r * self.total

    def largest(self, r: torch.Tensor) -> torch.Tensor:
        self.best = max(self.best, r.max().item())
        return r * self.best

    def is_new(self, r: torch.Tensor) -> torch.Tensor:
        place = int(r.argmax())
        new = place not in self.seen
        self.seen.add(place)
        return r if new else r * 0

    def on_one_branch(self, r: torch.Tensor) -> torch.Tensor:
        if r.sum() > 0:
            self.total += 1
        return r * self.total

    def started(self, r: torch.Tensor) -> torch.Tensor:
        first, self.total = self.total == 0, 1
        return r if first else -r

    def cached(self, r: torch.Tensor) -> torch.Tensor:
        if self.made is None:
            self.made = torch.ones(3)
        return r * self.made if r.sum() > 0 else r


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["sum", "largest", "is_new", "on_one_branch", "started"])
def test_what_python_carries_from_sample_to_sample_is_refused(name: str, way: str) -> None:
    """It comes by an answer to a question, or is settled after a call; also in a second batch."""
    for rows in (x[:3], torch.cat([x, 2 * x[:1]])):
        with pytest.raises(errors.EscapeError, match="something else each time that it is called"):
            shardmap.vmap(getattr(Carried(), name), **WAYS[way])(rows)


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_of_a_function_that_branches_is_no_state(way: str) -> None:
    mapped, plain = shardmap.vmap(Carried().cached, **WAYS[way]), Carried().cached
    for rows in (x, x[:3], x[:1], x):
        assert torch.equal(mapped(rows), torch.stack([plain(r) for r in rows]))
