"""Functions that change what they read, mapped over one sample, where no other one shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardmap
from tests.call.runs import counting

Made = tuple[Callable[[Tensor], Any], Callable[[], object], Callable[[], object]]
"""A function, what its user does now and then between calls, and the state that it leaves."""


def a_table_in_a_dict() -> Made:
    weight, memo = torch.ones(2, dtype=torch.float64), {}

    def function(x: Tensor) -> Tensor:
        table = memo.get("table")
        if table is None:
            table = memo["table"] = weight * 2
        return (x * table).sum()

    def between() -> None:
        memo.clear()
        weight.add_(1)

    return function, between, lambda: len(memo)


def a_table_in_a_list() -> Made:
    weight, memo = torch.ones(2, dtype=torch.float64), []

    def function(x: Tensor) -> Tensor:
        if not memo:
            memo.append(weight * 2)
        return x * memo[0]

    def between() -> None:
        memo.clear()
        weight.add_(1)

    return function, between, lambda: len(memo)


def a_table_in_a_cell() -> Made:
    weight, table = torch.ones(2, dtype=torch.float64), None

    def function(x: Tensor) -> Tensor:
        nonlocal table
        if table is None:
            table = weight * 2
        return x * table

    def between() -> None:
        nonlocal table
        table = None
        weight.add_(1)

    return function, between, lambda: table is None


def a_default() -> Made:
    weight = torch.ones(2, dtype=torch.float64)

    tables: dict[str, Tensor] = {}

    def function(x: Tensor, memo: dict[str, Tensor] = tables) -> Tensor:
        if "table" not in memo:
            memo["table"] = weight * 2
        return x * memo["table"]

    def between() -> None:
        tables.clear()
        weight.add_(1)

    return function, between, lambda: None


def a_sum_in_a_dict() -> Made:
    state = {"sum": torch.zeros(2, dtype=torch.float64)}

    def function(x: Tensor) -> Tensor:
        state["sum"] = state["sum"] * 0.5 + x
        return state["sum"] * 1

    return function, lambda: None, lambda: state["sum"].tolist()


def an_average_of_weights() -> Made:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.average = torch.zeros(2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            self.average = 0.5 * self.average + self.weight.detach()
            return x * self.average

    module = Averaged()
    return lambda x: module(x), lambda: module.weight.data.add_(1), lambda: module.average.tolist()


def a_module(forward: Callable[[Any, Tensor], Tensor], **state: Any) -> Made:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in state.items():
                setattr(self, name, value)

    Stateful.forward = forward
    module = Stateful()

    def between() -> None:
        for name, value in state.items():
            setattr(module, name, value)

    return lambda x: module(x), between, lambda: repr([vars(module)[name] for name in state])


def a_counter() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.steps += 1
        return x * self.steps

    return a_module(forward, steps=0)


def a_warm_up() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.steps += 1
        return x * 2 if self.steps > 2 else x

    return a_module(forward, steps=0)


def a_hidden_state() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.hidden = x if self.hidden is None else 0.5 * self.hidden + x
        return self.hidden * 1

    return a_module(forward, hidden=None)


def a_kept_activation() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.hidden = x * 2
        return self.hidden + 1

    return a_module(forward, hidden=None)


def data_that_initialise() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.ready:
            self.shift, self.ready = x.detach().clone(), True
        return x - self.shift

    return a_module(forward, ready=False, shift=None)


CASES = (
    a_table_in_a_dict, a_table_in_a_list, a_table_in_a_cell, a_default, a_sum_in_a_dict,
    an_average_of_weights, a_counter, a_warm_up, a_hidden_state, a_kept_activation,
    data_that_initialise,
)  # fmt: skip


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
@pytest.mark.parametrize("case", CASES)
def test_state_is_the_loops(case: Callable[[], Made], trace: str) -> None:
    for _ in range(4):  # of one code: each instance may use what is known of the last
        found = []
        for mapping in (True, False):
            function, between, state = case()
            mapped = shardmap.vmap(function, trace=trace) if mapping else None
            seen = []
            for call in range(13):
                if call % 4 == 3:
                    between()
                x = torch.full((1, 2), call + 1.0, dtype=torch.float64)
                result = mapped(x) if mapped else torch.stack([function(r) for r in x])
                seen.append((result.tolist(), state()))
            found.append(seen)
        assert found[0] == found[1]


@pytest.mark.parametrize("trace", ["auto", "once"])
def test_a_table_that_stays_is_recorded_no_more(trace: str) -> None:
    memo: dict[str, Tensor] = {}

    def function(x: Tensor) -> Tensor:
        if "table" not in memo:
            memo["table"] = torch.ones(2)
        return x * memo["table"]

    mapped = shardmap.vmap(function, trace=trace)
    for seed in range(4):
        x = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed))
        with counting(function) as calls:
            torch.testing.assert_close(mapped(x), x)
    assert calls() == 0


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
def test_a_kept_tensor_of_one_sample_is_refused_where_gradients_pass(trace: str) -> None:
    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.loss = super().forward(x).square().sum()
            return self.loss.sin()

    module, x = Keeping(2, 2), torch.randn(1, 2)
    for _ in range(3):
        with pytest.raises(shardmap.errors.EscapeError, match="under torch.no_grad"):
            shardmap.vmap(module, trace=trace)(x)
    with torch.no_grad():
        for scale in range(4):
            found = shardmap.vmap(module, trace=trace)(x * scale)
            torch.testing.assert_close(found, module.loss.sin()[None])


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
def test_a_lazy_module_is_called_before_it_is_mapped(trace: str) -> None:
    module = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2))
    x = torch.randn(5, 4)
    with pytest.raises(shardmap.errors.CapturedWriteError, match="call the module once"):
        shardmap.vmap(module, trace=trace, randomness="different")(x)
    module(x[0])
    mapped = shardmap.vmap(module, trace=trace)
    for _ in range(3):
        torch.testing.assert_close(mapped(x), torch.stack([module(r) for r in x]))


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
def test_a_table_behind_an_operator_of_python(trace: str) -> None:
    class Kernel:
        def __getitem__(self, name: str) -> float:
            return TABLE[name]

        def __mul__(self, other: Tensor) -> Tensor:
            return other * TABLE["b"]

    kernel = Kernel()
    mapped = shardmap.vmap(lambda r: kernel * (r * kernel["a"]), trace=trace)
    for value in range(6):
        TABLE["a" if value % 2 else "b"] = value + 1.5
        x = torch.randn(3, 2)
        torch.testing.assert_close(mapped(x), x * TABLE["a"] * TABLE["b"])


TABLE = {"a": 1.0, "b": 2.0}
