"""Normalisation with running statistics in training mode: `batch_norm=`, and functional ones."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from tests import oracle
from tests.call.paths import WAYS


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Different samples."""
    return torch.randn(7, *shape, generator=torch.Generator().manual_seed(seed))


def trained(*layers: nn.Module) -> nn.Module:
    """A model in training mode that has seen batches."""
    model = nn.Sequential(*layers)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._NormBase):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
    return model


class Activated(nn.BatchNorm1d):
    """A batch norm with a forward pass of its own, as libraries of models have them."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        out = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )
        return F.relu(out)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: trained(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()), (5, 3)),
    "1d, a mean of all batches": (
        lambda: trained(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh()),
        (5, 3),
    ),
    "2d": (lambda: trained(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh()), (2, 2, 4, 4)),
    "3d": (lambda: trained(nn.BatchNorm3d(2, affine=False), nn.Tanh()), (2, 2, 2, 3, 2)),
    "synchronised": (lambda: trained(nn.SyncBatchNorm(4), nn.Tanh()), (3, 4)),
    "a forward of its own": (lambda: trained(nn.Linear(3, 4), Activated(4)), (5, 3)),
    "twice": (lambda: trained(*[nn.BatchNorm1d(4)] * 2, nn.Tanh()), (5, 4)),
    "instance": (lambda: trained(nn.InstanceNorm1d(4, track_running_stats=True)), (2, 4, 3)),
}


def loop(model: nn.Module, x: Tensor, **mode: bool) -> Tensor:
    """The results of the loop with a copy of the model that shares its parameters."""
    alone = copy.deepcopy(model).train(**mode)
    state: dict[str, Tensor] = dict(model.named_parameters())
    return torch.stack([functional_call(alone, state, (r,)) for r in x])


HERE = ("plain", "chunk 1", "chunk 3", "two lanes", "once")


@pytest.mark.parametrize("way", HERE)
@pytest.mark.parametrize("how", ["per_sample", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_served_as_the_option_says(name: str, how: str, way: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), rows(*shape).requires_grad_()
    before = copy.deepcopy(model.state_dict())
    mapped = shardmap.vmap(model, batch_norm=how, **WAYS[way])
    want = loop(model, x, mode=how == "per_sample")
    leaves = [x, *model.parameters()]
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        got = mapped(x)
        oracle.assert_same(got, want, name)
        pairs = zip(
            torch.autograd.grad((got * weight).sum(), leaves, retain_graph=True),
            torch.autograd.grad((want * weight).sum(), leaves, retain_graph=True),
            strict=True,
        )
        for mine, loops in pairs:
            torch.testing.assert_close(mine, loops, rtol=1e-4, atol=1e-5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_the_refusal_names_the_module_and_what_to_pass(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), rows(*shape)
    place = next(
        f"{type(m).__name__}.*{n!r}"
        for n, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._NormBase)
    )
    before = copy.deepcopy(model.state_dict())
    words = f"{place}.*batch_norm='per_sample'.*'frozen'"
    with pytest.raises(errors.CapturedWriteError, match=words):
        shardmap.vmap(lambda r: model(r) * 2)(x)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for how in ("per_sample", "frozen"):
        got = shardmap.vmap(lambda r: model(r) * 2, batch_norm=how)(x)
        oracle.assert_same(got, 2 * loop(model, x, mode=how == "per_sample"), name)


def _loss(out: Tensor) -> Tensor:
    return (out * out.detach().sin()).sum()


MAKERS: dict[str, Callable[..., Any]] = {
    "per_sample_grad": lambda m, **o: shardmap.per_sample_grad(m, _loss, **o),
    "jacrev": shardmap.jacrev,
    "jacfwd": shardmap.jacfwd,
    "jacobian": shardmap.jacobian,
    "hessian": lambda m, **o: shardmap.hessian(lambda r: m(r).square().mean(), **o),
    "vjp": lambda m, **o: lambda x: shardmap.vjp(m, **o)(x, torch.ones(7, 5, 4).cumsum(1)),
    "jvp": lambda m, **o: lambda x: shardmap.jvp(m, **o)(x, x.cos()),
    "hvp": lambda m, **o: lambda x: shardmap.hvp(lambda r: m(r).square().mean(), **o)(x, x.cos()),
    "plan": lambda m, **o: lambda x: shardmap.plan(m, **o)(x).run(),
}


@pytest.mark.parametrize("how", ["per_sample", "frozen"])
@pytest.mark.parametrize("maker", MAKERS)
def test_every_maker_takes_it(maker: str, how: str) -> None:
    model, x = MODELS["1d"][0](), rows(5, 3)
    same = copy.deepcopy(model)
    norm = same.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm1d)
    if how == "frozen":
        norm.eval()
    else:  # the loop's results, from a module without running statistics
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        norm.track_running_stats = False
    got = MAKERS[maker](model, batch_norm=how)(x)
    want = MAKERS[maker](same)(x)
    for mine, others in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(mine, others)
    with pytest.raises((errors.CapturedWriteError, RuntimeError), match="batch_norm=|in-place"):
        MAKERS[maker](model)(x)


def test_per_sample_gradients_are_those_of_the_loop() -> None:
    model, x = MODELS["2d"][0](), rows(2, 2, 4, 4)
    got = shardmap.per_sample_grad(model, _loss, batch_norm="per_sample")(x)
    names = [name for name, _ in model.named_parameters()]
    for i, row in enumerate(x):
        alone = copy.deepcopy(model)
        want = torch.autograd.grad(_loss(alone(row)), list(alone.parameters()))
        for name, g in zip(names, want, strict=True):
            torch.testing.assert_close(got[name][i], g, rtol=1e-4, atol=1e-5)


def test_compared_with_the_loop_of_the_same_option() -> None:
    model, x = MODELS["1d"][0](), rows(5, 3)
    for how in ("per_sample", "frozen"):
        assert shardmap.compare(model, batch_norm=how)(x, samples=7).agrees


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
def test_samples_that_run_one_by_one_are_served_the_same() -> None:
    model, x = MODELS["1d"][0](), rows(5, 3)
    before = copy.deepcopy(model.state_dict())
    scaled = lambda r, m=model: m(r) * r.sum().item()
    for how in ("per_sample", "frozen"):
        want = loop(model, x, mode=how == "per_sample") * x.sum((1, 2))[:, None, None]
        oracle.assert_same(shardmap.vmap(scaled, batch_norm=how, max_paths=2)(x), want, how)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_inside_another_map_and_reduced_and_stored(tmp_path: Path) -> None:
    model = MODELS["1d"][0]()
    x = rows(2, 5, 3)
    want = torch.stack([loop(model, r) for r in x])
    inner = lambda r: shardmap.vmap(model, batch_norm="per_sample")(r)
    oracle.assert_same(shardmap.vmap(inner)(x), want, "the option inside")
    outer = shardmap.vmap(lambda r: shardmap.vmap(model)(r), batch_norm="per_sample")
    oracle.assert_same(outer(x), want, "the option outside")
    x, want = rows(5, 3), loop(model, rows(5, 3))
    with torch.no_grad():
        total = shardmap.vmap(model, batch_norm="per_sample", reduce="sum", chunk_size=2)(x)
        torch.testing.assert_close(total, want.sum(0))
        out = shardmap.MemmapSink(tmp_path / "store")
        store = shardmap.vmap(model, batch_norm="per_sample", out=out, chunk_size=2)(x)
        oracle.assert_same(store.read(0, 0, 7), want.detach(), "stored")


MEAN, VAR = rows(3, seed=1), rows(3, seed=2).exp()


def _fresh(r: Tensor) -> Any:
    mean, var = torch.zeros(3), torch.ones(3)
    out = F.batch_norm(F.batch_norm(r, mean, var, training=True) + r, mean, var, training=True)
    return F.batch_norm(out, mean, var), mean, var


def _made_inside(momentum: float | None) -> Callable[[Tensor], Any]:
    def function(r: Tensor) -> Any:
        norm = nn.BatchNorm1d(3, momentum=momentum)
        return norm(norm(r)), norm.running_mean, norm.running_var, norm.num_batches_tracked

    return function


def _instance(r: Tensor, mean: Tensor, var: Tensor) -> Any:
    return F.instance_norm(r, mean, var, use_input_stats=True), mean, var


def _functional(r: Tensor, mean: Tensor, var: Tensor) -> Any:
    return F.batch_norm(r, mean, var, training=True, momentum=0.3), mean, var


def ensemble(layer: nn.Module, momentum: float | None) -> tuple[Callable[..., Any], Any, Any]:
    """A model called with parameters and buffers of its own for each sample."""
    kind = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
    models = [
        trained(copy.deepcopy(layer), kind(3, momentum=momentum), nn.Tanh()) for _ in range(7)
    ]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])
    spread = torch.linspace(0.5, 1.5, 7)
    scaled = lambda t: t.detach() * spread.view(-1, *[1] * (t.dim() - 1))

    def function(parameters: Any, buffers: Any, r: Tensor) -> Any:
        return functional_call(base, (parameters, buffers), (r,)), buffers

    return function, {k: scaled(t) for k, t in parameters.items()}, buffers


def _batch(layer: nn.Module, momentum: float | None, *shape: int) -> Callable[[], Any]:
    def make() -> Any:
        function, parameters, buffers = ensemble(layer, momentum)
        return function, (parameters, buffers, rows(*shape))

    return make


FUNCTIONAL: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "mapped": lambda: (_functional, (rows(5, 3), MEAN.clone(), VAR.clone())),
    "mapped, 2d": lambda: (_functional, (rows(2, 3, 4, 4), MEAN.clone(), VAR.clone())),
    "instance norm": lambda: (_instance, (rows(2, 3, 4), MEAN.clone(), VAR.clone())),
    "one shared and cloned": lambda: (
        lambda r, m: _functional(r, m, VAR[0].clone()),
        (rows(5, 3), MEAN.clone()),
    ),
    "fresh": lambda: (_fresh, (rows(5, 3),)),
    "made inside": lambda: (_made_inside(0.1), (rows(5, 3),)),
    "made inside, a mean of all": lambda: (_made_inside(None), (rows(5, 3),)),
    "ensemble": _batch(nn.Linear(3, 3), 0.1, 5, 3),
    "ensemble, a mean of all": _batch(nn.Linear(3, 3), None, 5, 3),
    "ensemble, 2d": _batch(nn.Conv2d(2, 3, 2), 0.1, 2, 2, 4, 4),
}


@pytest.mark.parametrize("way", HERE)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_statistics_of_the_samples_own_are_updated(name: str, way: str) -> None:
    function, columns = FUNCTIONAL[name]()
    theirs = copy.deepcopy(columns)
    want = [
        function(*pytree.tree_map(operator.itemgetter(number), tuple(theirs)))
        for number in range(7)
    ]
    got = shardmap.vmap(function, **WAYS[way])(*columns)
    flat = zip(
        pytree.tree_leaves(got),
        zip(*[pytree.tree_leaves(w) for w in want], strict=True),
        strict=True,
    )
    for mine, loops in flat:
        oracle.assert_same(mine, torch.stack(loops), name)
    pairs = zip(pytree.tree_leaves(columns), pytree.tree_leaves(theirs), strict=True)
    for mine, loops in pairs:  # written in the caller's batch, once
        torch.testing.assert_close(mine, loops)
