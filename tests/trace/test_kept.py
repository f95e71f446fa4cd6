"""Tensors that outlive a recording, and those that only seem to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import nn

import shardmap
from shardmap import errors
from shardmap.call.arguments import collect
from shardmap.trace.record import record

Function = Callable[[torch.Tensor], Any]
Made = Callable[[], tuple[Function, Any]]


def kept(function: Function, rows: torch.Tensor) -> tuple[str, ...]:
    batch = collect((rows,), {}, 0, 0, "test")
    found = record(function, batch, "error", False, "test", look=True)[0].kept
    assert found is not None
    return found


def attribute() -> tuple[Function, Any]:
    class Net(nn.Module):
        hidden: torch.Tensor

        def forward(self, r: torch.Tensor) -> torch.Tensor:
            self.hidden = r * 2
            return self.hidden.sum()

    net = Net()
    return net, net


def appended() -> tuple[Function, Any]:
    seen: list[torch.Tensor] = []

    def function(r: torch.Tensor) -> torch.Tensor:
        seen.append(r.sin())
        return r.sum()

    return function, seen


def hooked() -> tuple[Function, Any]:
    net, total = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), {}

    def hook(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        total["sum"] = total.get("sum", 0) + out

    net[0].register_forward_hook(hook)
    return lambda r: net(r).sum(), total


def in_a_closure() -> tuple[Function, Any]:
    memory: dict[str, Any] = {}

    def function(r: torch.Tensor) -> torch.Tensor:
        memory["last"] = {"nested": (r.cos(),)}
        return r * 3

    return function, memory


LAST: Any = None


def in_a_global() -> tuple[Function, Any]:
    def function(r: torch.Tensor) -> torch.Tensor:
        global LAST
        LAST = r + 1
        return r * 3

    return function, None


def a_gradient() -> tuple[Function, Any]:
    found: list[torch.Tensor] = []

    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        y = q * r
        y.register_hook(lambda g: found.append(g * r))
        return torch.autograd.grad(y.sin().sum(), q)[0]

    return function, found


def the_argument() -> tuple[Function, Any]:
    class Net(nn.Module):
        hidden: torch.Tensor

        def forward(self, r: torch.Tensor) -> torch.Tensor:
            self.hidden = r
            return r.sum()

    net = Net()
    return net, net


def the_argument_that_is_returned() -> tuple[Function, Any]:
    seen: list[torch.Tensor] = []

    def function(r: torch.Tensor) -> torch.Tensor:
        seen.append(r)
        return r

    return function, seen


def the_argument_in_a_hook() -> tuple[Function, Any]:
    net, seen = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), {}

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen["first"] = args[0]

    net[0].register_forward_hook(hook)
    return lambda r: net(r).sum(), seen


def the_argument_in_a_cache() -> tuple[Function, Any]:
    @functools.lru_cache
    def doubled(r: torch.Tensor) -> int:
        return 2 * r.numel()

    return lambda r: r * doubled(r), doubled


def an_output() -> tuple[Function, Any]:
    class Net(nn.Module):
        hidden: torch.Tensor

        def forward(self, r: torch.Tensor) -> torch.Tensor:
            self.hidden = r.tanh()
            return self.hidden

    net = Net()
    return net, net


class Doubling(torch.fx.Interpreter):
    """An interpreter that runs a graph, as those of torch-jet and of export's passes do."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, args, kwargs) * 2


def traced() -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(lambda r: {"a": r.sin(), "b": (torch.cos(r) * r, r)})


def interpreted() -> tuple[Function, Any]:
    interpreter = Doubling(traced())
    return lambda r: interpreter.run(r), interpreter


def interpreted_with_all_values() -> tuple[Function, Any]:
    interpreter = torch.fx.Interpreter(traced(), garbage_collect_values=False)
    return lambda r: interpreter.run(r * 2)["b"][0].sum(), interpreter


def interpreted_and_appended() -> tuple[Function, Any]:
    interpreter, seen = torch.fx.Interpreter(traced()), []

    def function(r: torch.Tensor) -> torch.Tensor:
        seen.append(interpreter.run(r)["a"])
        return r.sum()

    return function, seen


KEPT: list[Made] = [
    interpreted_and_appended,
    attribute,
    an_output,
    appended,
    hooked,
    in_a_closure,
    in_a_global,
    a_gradient,
    the_argument,
    the_argument_that_is_returned,
    the_argument_in_a_hook,
    the_argument_in_a_cache,
]


def outputs() -> tuple[Function, Any]:
    return lambda r: (r * 2, [r.sin()], {"a": r.cos().sum()}, r), None


def saved_for_outputs() -> tuple[Function, Any]:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3), nn.LayerNorm(3))
    return lambda r: net(r.sin()).exp().square().sum(), net


def unmapped_cache() -> tuple[Function, Any]:
    @functools.lru_cache
    def table(size: int) -> torch.Tensor:
        return torch.arange(size).float().sin()

    return lambda r: r * table(3), table


def unmapped_attribute() -> tuple[Function, Any]:
    class Net(nn.Module):
        mask: torch.Tensor

        def forward(self, r: torch.Tensor) -> torch.Tensor:
            self.mask = torch.ones(3).cumsum(0)
            return r * self.mask

    net = Net()
    return net, net


def cycles() -> tuple[Function, Any]:
    def function(r: torch.Tensor) -> torch.Tensor:
        node: dict[str, Any] = {"value": r.sin()}
        node["self"] = node

        def recurse(n: int) -> torch.Tensor:
            return r * 2 if n == 0 else recurse(n - 1) + node["value"]

        return recurse(3)

    return function, None


def views() -> tuple[Function, Any]:
    return lambda r: (r * 2).view(3, 1).t()[0], None


def local_gradient() -> tuple[Function, Any]:
    def function(r: torch.Tensor) -> torch.Tensor:
        w = torch.zeros(3, requires_grad=True)
        ((w - r) ** 2).sum().backward(inputs=[w])  # not into the batch, if that requires grad
        assert w.grad is not None
        return w.grad * 2

    return function, None


def func_transform() -> tuple[Function, Any]:
    return torch.func.hessian(lambda r: r.sin().prod()), None


def indexed() -> tuple[Function, Any]:
    return lambda r: r[r.argmax()] * r, None


def through_an_exception() -> tuple[Function, Any]:
    def function(r: torch.Tensor) -> torch.Tensor:
        try:
            local = r * 2
            raise ValueError(local.shape)
        except ValueError as error:
            first = error
        return r * len(first.args)

    return function, None


def the_argument_for_a_moment() -> tuple[Function, Any]:
    class Net(nn.Module):
        hidden: torch.Tensor | None = None

        def forward(self, r: torch.Tensor) -> torch.Tensor:
            self.hidden = r
            result = self.hidden.sum()
            self.hidden = None
            return result

    net = Net()
    return net, net


def the_argument_in_a_cycle() -> tuple[Function, Any]:
    def function(r: torch.Tensor) -> torch.Tensor:
        node: dict[str, Any] = {"value": r}
        node["self"] = node
        return node["value"] * 2

    return function, None


def the_argument_saved_for_the_output() -> tuple[Function, Any]:
    return (
        lambda r: (
            (r * r).sum() + torch.utils.checkpoint.checkpoint(torch.sin, r, use_reentrant=False)
        ),
        None,
    )


NOT_KEPT: list[Made] = [
    interpreted,
    interpreted_with_all_values,
    the_argument_for_a_moment,
    the_argument_in_a_cycle,
    the_argument_saved_for_the_output,
    outputs,
    saved_for_outputs,
    unmapped_cache,
    unmapped_attribute,
    cycles,
    views,
    local_gradient,
    func_transform,
    indexed,
    through_an_exception,
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("made", KEPT, ids=lambda f: f.__name__)
def test_what_is_kept_is_found(made: Made, grad: bool) -> None:
    function, _holder = made()
    for _ in range(2):
        found = kept(
            function,
            torch.randn(4, 3, requires_grad=grad) if made is not a_gradient else torch.randn(4, 3),
        )
        assert len(found) == 1, found
        assert "shape" in found[0]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("made", NOT_KEPT, ids=lambda f: f.__name__)
def test_what_only_seems_to_be_kept(made: Made, grad: bool) -> None:
    function, _holder = made()
    for _ in range(2):
        assert kept(function, torch.randn(4, 3, requires_grad=grad)) == ()


@pytest.mark.parametrize("made", [attribute, the_argument], ids=lambda f: f.__name__)
def test_the_place_is_named(made: Made) -> None:
    function, _net = made()
    assert "'hidden'" in kept(function, torch.randn(4, 3))[0]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    {"reduce": "sum"},
    {"trace": "once"},
]


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 1}, {"chunk_size": 2, "devices": ["cpu"] * 2}], ids=str
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "made", [interpreted, interpreted_with_all_values], ids=lambda f: f.__name__
)
def test_the_results_of_an_interpreter_of_fx_are_no_state(
    made: Made, grad: bool, options: dict[str, Any], trace: str
) -> None:
    function, _interpreter = made()
    mapped = shardmap.vmap(function, trace=trace, **options)

    def leaves(row: torch.Tensor) -> list[torch.Tensor]:
        return pytree.tree_leaves(function(row))

    for seed in range(5):
        torch.manual_seed(seed)
        rows = torch.randn(5, 3, requires_grad=grad)
        got = pytree.tree_leaves(mapped(rows))
        expected = [torch.stack(t) for t in zip(*map(leaves, rows), strict=True)]
        torch.testing.assert_close(got, expected)
        if grad:
            torch.testing.assert_close(
                torch.autograd.grad([t.sum() for t in got], rows),
                torch.autograd.grad([t.sum() for t in expected], rows),
            )


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
def test_an_interpreter_of_fx_is_left_empty_rather_than_with_one_sample(trace: str) -> None:
    interpreter = Doubling(traced())
    scope: dict[str, Any] = {"interpreter": interpreter}
    exec(f"def {trace}(r):\n    return interpreter.run(r)", scope)  # code of its own
    mapped = shardmap.vmap(scope[trace], trace=trace)
    for _ in range(5):
        mapped(torch.randn(5, 3))
        assert not interpreter.env


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_map_refuses_to_keep_its_argument_and_the_remedy_works(
    size: int, options: dict[str, Any]
) -> None:
    class Net(nn.Module):
        hidden: torch.Tensor

        def forward(self, r: torch.Tensor) -> torch.Tensor:
            self.hidden = r
            return r.sin().sum()

    net, rows = Net(), torch.randn(size, 3)
    with pytest.raises(
        errors.EscapeError, match="its own argument of shape .3,., kept as 'hidden'"
    ):
        shardmap.vmap(net, **options)(rows)

    def returned(r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return r.sin().sum(), r

    found, hidden = shardmap.vmap(returned, **options)(rows)
    wanted = torch.stack([r.sin().sum() for r in rows])
    last = rows
    if "reduce" in options:
        wanted, last = wanted.sum(), rows.sum(0)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(hidden, last)


def test_two_arguments_of_which_one_is_kept() -> None:
    seen: list[torch.Tensor] = []

    def function(pair: dict[str, torch.Tensor], other: torch.Tensor) -> torch.Tensor:
        seen.append(pair["a"])
        return pair["a"] + pair["b"] + other

    batch = {"a": torch.randn(5, 2), "b": torch.randn(5, 2)}
    with pytest.raises(errors.EscapeError, match="kept in a list"):
        shardmap.vmap(function)(batch, torch.randn(5, 2))


def test_a_container_of_arguments_that_is_kept() -> None:
    kept_ones: list[dict[str, torch.Tensor]] = []

    def function(pair: dict[str, torch.Tensor]) -> torch.Tensor:
        kept_ones.append(pair)
        return pair["a"] * 2

    with pytest.raises(errors.EscapeError, match="kept as 'a'"):
        shardmap.vmap(function)({"a": torch.randn(5, 2)})
