"""Maps that are traced (`make_fx`, `torch.export`) or run on fake tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import fake_tensor
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from shardmap.lower.cache import lowerings
from tests.same import assert_same

Function = Callable[..., Any]
make_fx: Any = proxy_tensor.make_fx
V = shardmap.vmap


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Torch warns of what it imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rows(*shape: int, count: int = 5, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


net = network()
weights = {name: p.detach().clone() for name, p in net.named_parameters()}


def filled(r: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(3)
    out[0] = r.sum()
    out[1:] = r[:2]
    return out.mul_(2)


def loss(p: dict[str, torch.Tensor], r: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(net, p, (r,)).square().sum()


def summed(x: torch.Tensor) -> torch.Tensor:
    return V(lambda r: r.sin().sum())(x)


CASES: dict[str, tuple[Function, tuple[Any, ...]]] = {
    "operators": (summed, (rows(3),)),
    "literals": (
        lambda x: V(lambda r: r * torch.tensor([1.0, 2.0, 3.0]) + torch.arange(3))(x),
        (rows(3),),
    ),
    "writes": (lambda x: V(filled)(x), (rows(3),)),
    "shared": (lambda w, x: V(lambda r: (w @ r).relu())(x), (rows(3, count=4), rows(3))),
    "dims": (
        lambda x, y: V(lambda a, b: (a * b, a.sum()), in_dims=(1, 0), out_dims=(1, 0))(x, y),
        (rows(5, count=3), rows(3)),
    ),
    "gradients": (lambda p, x: shardmap.per_sample_grad(loss)(p, x), (weights, rows(3))),
    "Jacobian": (lambda x: shardmap.jacobian(lambda r: r.sin() * r.sum())(x), (rows(3),)),
    "Hessian": (lambda p, x: shardmap.hessian(lambda r: loss(p, r))(x), (weights, rows(3))),
    "product": (lambda x: shardmap.jvp(lambda r: r.sin() * r.sum())(x, x), (rows(3),)),
    "nested": (lambda x: V(lambda r: V(lambda s: s.sin() * r)(r))(x), (rows(3),)),
    "gradient around": (
        lambda x: torch.func.grad(lambda x: summed(x).square().sum())(x),
        (rows(3),),
    ),
    "torch's map around": (lambda x: torch.func.vmap(summed)(x), (rows(5, 3, count=2),)),
    "convolution": (
        lambda w, x: V(lambda r: F.conv2d(r[None], w)[0])(x),
        (rows(2, 3, 3, count=3), rows(2, 6, 6)),
    ),
    "attention": (
        lambda x: V(lambda r: F.scaled_dot_product_attention(r, r + 1, r * 2))(x),
        (rows(2, 4, 8),),
    ),
    "indices": (
        lambda x, i: V(lambda r, i: r[i] + r.gather(0, i[None])[0])(x, i),
        (rows(3), torch.tensor([0, 2, 1, 1, 0])),
    ),
    "reduced": (lambda x: V(lambda r: r.sin(), reduce="mean", chunk_size=2)(x), (rows(3),)),
    "chunks": (lambda x: V(lambda r: r.sin(), chunk_size=2)(x), (rows(3),)),
    "two lanes": (lambda x: V(torch.sin, devices=["cpu", "cpu"])(x), (rows(3),)),
    "recorded once": (lambda x: V(lambda r: r.sin(), trace="once")(x), (rows(3),)),
    "always compared": (lambda x: V(lambda r: r.sin(), check="always")(x), (rows(3),)),
    "unmapped result": (lambda x: V(lambda r: torch.ones(3))(x), (rows(3),)),
    "sizes of what is shared": (
        lambda w, x: V(lambda r: (r * w.shape[0]).expand(w.shape[1], 3))(x),
        (rows(6, count=4), rows(3)),
    ),
    "structure": (lambda x: V(lambda r: {"a": r, "b": [r.sum(), r > 0]})(x), (rows(3),)),
    "one sample": (lambda x: V(lambda r: r.sin())(x), (rows(3, count=1),)),
    "no sample": (lambda x: V(lambda r: r.sin())(x), (rows(3, count=0),)),
    "strides": (lambda x: V(lambda r: r.t().reshape(-1))(x.transpose(1, 2)), (rows(3, 4),)),
}


def others(args: Any) -> Any:
    """Other arguments of the same shapes."""
    return pytree.tree_map(
        lambda t: t * 0.7 + 0.1 * t.flip(0) if t.is_floating_point() else t.flip(0), args
    )


@pytest.mark.parametrize("name", CASES)
def test_a_graph_gives_the_map_of_other_inputs(name: str) -> None:
    """Traced on one batch, the graph is run on another: every sample is compared."""
    f, args = CASES[name]
    shardmap.clear_caches()
    fresh = others(args)
    graphs = [
        (mode, before, make_fx(f, tracing_mode=mode, pre_dispatch=before)(*args))
        for mode in ("real", "fake", "symbolic")
        for before in ((False,) if "around" in name else (False, True))
    ]
    want = pytree.tree_leaves(f(*fresh))
    for mode, before, graph in graphs:
        for got, w in zip(pytree.tree_leaves(graph(*fresh)), want, strict=True):
            assert_same(got, w, f"{mode}, before dispatch: {before}")


@pytest.mark.parametrize("name", [name for name in CASES if "around" in name])
def test_transforms_traced_before_dispatch_are_refused(name: str) -> None:
    """Torch's own graph of them is wrong."""
    f, args = CASES[name]
    with pytest.raises(errors.TransformError, match="pre_dispatch=False"):
        make_fx(f, pre_dispatch=True)(*args)
    graph, fresh = make_fx(f, pre_dispatch=False)(*args), others(args)
    assert_same(graph(*fresh), f(*fresh), "remedy")


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors_have_the_shapes_of_the_results(name: str) -> None:
    f, args = CASES[name]
    shardmap.clear_caches()
    with fake_tensor.FakeTensorMode() as mode:
        found = f(*pytree.tree_map(mode.from_tensor, args))
    for got, want in zip(pytree.tree_leaves(found), pytree.tree_leaves(f(*args)), strict=True):
        assert isinstance(got, fake_tensor.FakeTensor)
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def test_a_graph_holds_the_batch_and_nothing_of_the_recording() -> None:
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(summed, tracing_mode=mode)(rows(3))
        names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        assert names == ["aten.sin.default", "aten.sum.dim_IntList"]


def test_what_is_lowered_without_values_is_compared_once_there_are_some() -> None:
    shardmap.clear_caches()
    x = rows(3).sigmoid()
    make_fx(V(torch.erfinv), tracing_mode="fake")(x)
    assert [low.options.traced for low in lowerings()] == [True]
    assert_same(V(torch.erfinv)(x), torch.erfinv(x), "values")
    assert [low.options.traced for low in lowerings()] == [True, False]


ASKS: dict[str, Function] = {
    "a number": lambda r: r * r.sum().item(),
    "a branch": lambda r: r if r.sum() > 0 else -r,
    "a shape": lambda r: r[r > 0].sum(),
}


@pytest.mark.parametrize("name", ASKS)
def test_questions_about_values_are_refused_where_there_are_none(name: str) -> None:
    x = rows(3)
    for mode in ("fake", "symbolic"):
        with pytest.raises(errors.DataDependentError, match=r"torch\.where"):
            make_fx(V(ASKS[name]), tracing_mode=mode)(x)
    with pytest.raises(RuntimeError):
        make_fx(V(ASKS[name]))(x)
    remedy: Function = lambda r: torch.where(r.sum() > 0, r, -r)
    for mode in ("real", "fake", "symbolic"):
        assert_same(make_fx(V(remedy), tracing_mode=mode)(x)(x + 1), V(remedy)(x + 1), mode)


def test_draws_are_refused_and_passed_in_instead() -> None:
    x = rows(3)
    for mode in ("real", "fake"):
        with pytest.raises(errors.RandomnessError, match="pass them in"):
            make_fx(V(lambda r: r + torch.randn(3), randomness="different"), tracing_mode=mode)(x)
    noise = rows(3, seed=9)
    graph = make_fx(V(lambda r, n: r + n))(x, noise)
    assert_same(graph(x * 2, noise * 3), x * 2 + noise * 3, "remedy")


class Holds(nn.Module):
    """A module with a map inside."""

    def __init__(self, f: Function):
        super().__init__()
        self.f = f
        self.net = network()

    def forward(self, x: torch.Tensor) -> Any:
        return self.f(self.net, x)


EXPORTED: dict[str, Function] = {
    "a module": lambda m, x: V(m)(x).sin(),
    "gradients": lambda m, x: shardmap.per_sample_grad(m, lambda o: o.square().sum(), flat=True)(x),
    "literals, in chunks": lambda m, x: V(
        lambda r: (r * torch.tensor([1.0, 2.0, 3.0])).cumsum(0), chunk_size=2
    )(x),
    "Jacobian": lambda m, x: shardmap.jacobian(lambda r: m(r))(x),
    "Hessian": lambda m, x: shardmap.hessian(lambda r: m(r).square().sum())(x),
    "nested": lambda m, x: V(lambda r: V(lambda q: q * r.sum())(r))(x),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name: str) -> None:
    module = Holds(EXPORTED[name])
    program = torch.export.export(module, (rows(3),))
    x = others(rows(3))
    assert_same(program.module()(x), module(x), "exported")
    assert_same(program.run_decompositions().module()(x), module(x), "decomposed")


@pytest.mark.parametrize("name", EXPORTED)
def test_export_for_any_number_of_samples(name: str) -> None:
    module = Holds(EXPORTED[name])
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module, (rows(3),), dynamic_shapes=dynamic)
    for count in (2, 5, 7):
        x = rows(3, count=count, seed=count)
        assert_same(program.module()(x), module(x), f"{count} samples")


def test_export_by_compiling_names_the_remedy() -> None:
    module = Holds(EXPORTED["a module"])
    with pytest.raises(Exception, match="strict=False"):
        torch.export.export(module, (rows(3),), strict=True)
    program = torch.export.export(module, (rows(3),), strict=False)
    x = others(rows(3))
    assert_same(program.module()(x), module(x), "remedy")
