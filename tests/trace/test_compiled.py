"""`torch.compile` around a map and inside of it."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import testing as dynamo_testing
from torch._dynamo import utils as dynamo_utils

import shardmap
from tests.loop import loop
from tests.same import assert_same

dynamo: Any = torch._dynamo
Function = Callable[..., Any]
WAYS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 2},
    {"devices": ["cpu", "cpu"]},
    {"trace": "once"},
]
guards: Any = torch._guards  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing that was compiled before."""
    dynamo.reset()
    dynamo_utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it imports
        yield
    dynamo.reset()


def rows(*shape: int, count: int = 5) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


def made() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2)


class Blocks(nn.Module):
    """A module with a compiled part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made()
        self.inner.compile(backend="eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).tanh()


def test_compiled_functions_inside_a_map_run_eagerly_and_stay_compiled_outside() -> None:
    for fullgraph in (False, True):
        counter = dynamo_testing.CompileCounter()
        written: Function = lambda r: r.sin() * 2
        f = torch.compile(written, backend=counter, fullgraph=fullgraph)
        x = rows(3)
        for way in WAYS:
            mapped = shardmap.vmap(f, **way)
            assert_same(mapped(x), loop(written)(x), str(way))
        assert counter.frame_count == 0
        assert_same(f(x[0]), x[0].sin() * 2, "outside")
        assert counter.frame_count == 1, "it is compiled outside, once"
        assert_same(shardmap.vmap(f)(x * 2), (x * 2).sin() * 2, "once compiled")
        assert_same(f(x[1]), x[1].sin() * 2, "outside")
        assert counter.frame_count == 1, "it stays compiled"


@pytest.mark.parametrize("kind", ["wrapped", "in place", "of a part"])
def test_compiled_modules_and_their_gradients(kind: str) -> None:
    net = made()
    module: nn.Module = Blocks() if kind == "of a part" else net
    plain: Function = (lambda r: net(r).tanh()) if kind == "of a part" else net
    if kind == "in place":
        plain = made()
        module.compile(backend="eager")
    if kind == "wrapped":
        module = torch.compile(net, backend="eager")  # type: ignore[assignment]
    x = rows(3)
    assert_same(shardmap.vmap(module)(x), loop(plain)(x), kind)
    grads = shardmap.per_sample_grad(module, lambda out: out.square().sum())(x)
    for i, r in enumerate(x):
        parameters = list((plain if isinstance(plain, nn.Module) else net).parameters())
        want = torch.autograd.grad(plain(r).square().sum(), parameters)
        for got, w in zip(grads.values(), want, strict=True):
            assert_same(got[i], w, f"sample {i}")


def test_a_function_compiled_inside_the_function() -> None:
    x = rows(3)

    def f(r: torch.Tensor) -> torch.Tensor:
        return torch.compile(torch.sin, backend="eager", fullgraph=True)(r) + 1

    assert_same(shardmap.vmap(f)(x), x.sin() + 1, "made inside")


def test_other_threads_compile_while_a_map_is_recorded() -> None:
    counter, inside, done = dynamo_testing.CompileCounter(), threading.Event(), threading.Event()
    compiled = torch.compile(torch.sin, backend=counter)

    def f(r: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert done.wait(60)
        return r.cos()

    def work() -> None:
        assert inside.wait(60)
        found.append(compiled(torch.ones(3)))
        done.set()

    found: list[torch.Tensor] = []
    thread = threading.Thread(target=work)
    thread.start()
    got = shardmap.vmap(f)(rows(3))
    thread.join()
    assert_same(got, rows(3).cos(), "the map")
    assert_same(found[0], torch.ones(3).sin(), "the thread")


def test_an_error_inside_leaves_compiling_as_it_was() -> None:
    counter = dynamo_testing.CompileCounter()
    f = torch.compile(lambda r: r.sin() + 1, backend=counter)

    def fails(r: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardmap.vmap(fails)(rows(3))
    f(rows(3))
    assert counter.frame_count == 1
    assert guards.TracingContext.try_get() is None


mapped = shardmap.vmap(lambda r: r.sin().sum())
net = made()
gradients = shardmap.per_sample_grad(net, lambda out: out.square().sum())
derivatives = shardmap.jacobian(lambda r: r.sin() * r)

AROUND: dict[str, Function] = {
    "a map": lambda x: mapped(x * 2) + 1,
    "a map made inside": lambda x: shardmap.vmap(lambda r: r.sin().sum())(x * 2) + 1,
    "chunks": lambda x: shardmap.vmap(torch.sin, chunk_size=2)(x * 2) + 1,
    "gradients": lambda x: gradients(x * 2)["weight"] + 1,
    "gradients made inside": lambda x: (
        shardmap.per_sample_grad(net, lambda out: out.square().sum())(x * 2)["weight"] + 1
    ),
    "a Jacobian": lambda x: derivatives(x * 2) + 1,
    "a plan": lambda x: shardmap.plan(torch.sin, chunk_size=2)(x * 2).run() + 1,
}


@pytest.mark.parametrize("name", AROUND)
def test_a_map_inside_a_compiled_function_is_one_break_at_the_call(name: str) -> None:
    counter = dynamo_testing.CompileCounter()
    f = AROUND[name]
    compiled = torch.compile(f, backend=counter)
    x = rows(3)
    assert_same(compiled(x), f(x), name)
    assert counter.frame_count == 2, "what is before the call, and what is after it"
    assert_same(compiled(x + 1), f(x + 1), name)
    assert counter.frame_count == 2
    calls = 3 if name == "a plan" else 2 if "inside" in name or name == "chunks" else 1
    assert sum(dynamo_utils.counters["graph_break"].values()) <= calls


def test_a_map_inside_a_compiled_training_step() -> None:
    weights = made()

    def step(x: torch.Tensor) -> torch.Tensor:
        return shardmap.vmap(weights)(x * 2).square().mean()

    x = rows(3)
    step(x).backward()
    want = [p.grad for p in weights.parameters()]
    weights.zero_grad()
    torch.compile(step, backend="aot_eager")(x).backward()
    for p, w in zip(weights.parameters(), want, strict=True):
        assert p.grad is not None
        assert w is not None
        assert_same(p.grad, w, "gradient")


def test_what_cannot_be_compiled_in_one_piece_says_so() -> None:
    with pytest.raises(Exception, match="without fullgraph=True") as raised:
        torch.compile(AROUND["a map"], backend="eager", fullgraph=True)(rows(3))
    assert "call the map outside of the compiled function" in str(raised.value)
    x = rows(3)
    assert_same(torch.compile(AROUND["a map"], backend="eager")(x), AROUND["a map"](x), "remedy")


def test_compiling_is_imported_by_those_who_compile_only() -> None:
    """Importing torch._dynamo takes seconds."""
    code = (
        "import sys, torch, shardmap\n"
        "shardmap.vmap(torch.sin)(torch.ones(3, 2))\n"
        "shardmap.per_sample_grad(torch.nn.Linear(2, 1))(torch.ones(3, 2))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
