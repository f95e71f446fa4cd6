"""Python objects inside a recorded function: modules, copies, subclasses, handles, None."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from tests import oracle

WAYS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 2},
    {"devices": ["cpu", "cpu"]},
    {"trace": "once", "chunk_size": 2},
]


class Tagged(torch.Tensor):
    pass


captured = torch.randn(3)
model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
frozen = copy.deepcopy(model).requires_grad_(False)


def made_inside(r: torch.Tensor) -> torch.Tensor:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    for p in net.parameters():
        nn.init.constant_(p, 0.5)
    return net(r)


def optimised(
    kind: Callable[..., torch.optim.Optimizer], given: bool = False
) -> Callable[..., torch.Tensor]:
    """Training of a tensor that is made inside, with gradients that are `given` to it, or not."""

    def function(r: torch.Tensor) -> torch.Tensor:
        w = torch.zeros(3, requires_grad=True)
        optimizer = kind([w], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = ((w - r) ** 2).sum()
            if given:
                (w.grad,) = torch.autograd.grad(loss, w)
            else:
                loss.backward()
            optimizer.step()
        return w.detach()

    return function


def ranged(r: torch.Tensor) -> torch.Tensor:
    with torch.profiler.record_function("step"):
        return r.sin()


def copied_sample(r: torch.Tensor) -> torch.Tensor:
    a, b = copy.deepcopy([r, r])
    a.mul_(2)
    return r + a * b


def copied_leaf(r: torch.Tensor) -> torch.Tensor:
    leaf = r.clone().requires_grad_()
    twin = copy.deepcopy({"leaf": leaf})["leaf"]
    return torch.autograd.grad((twin**2 * leaf).sum(), twin)[0]


def copied_state(r: torch.Tensor) -> torch.Tensor:
    state = copy.deepcopy(frozen.state_dict())
    return torch.func.functional_call(frozen, state, (r[None],))


def written_by_data(r: torch.Tensor) -> torch.Tensor:
    y = r * 2
    y.data.mul_(r)
    return y + y.data


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "modules made inside": made_inside,
    "sgd": optimised(torch.optim.SGD),
    "adam": optimised(torch.optim.Adam),
    "sgd of given gradients": optimised(torch.optim.SGD, given=True),
    "adam of given gradients": optimised(torch.optim.Adam, given=True),
    "a profiler range": ranged,
    "record_function as decorator": torch.profiler.record_function("all")(lambda r: r.cos()),
    "a copied module": lambda r: copy.deepcopy(model)(r[None]),
    "a copied module without grad": lambda r: copy.deepcopy(frozen)(r[None]),
    "a copied sample": copied_sample,
    "a copied leaf": copied_leaf,
    "a copied captured tensor": lambda r: copy.deepcopy(captured).mul_(2) * r,
    "a copied state": copied_state,
    "a subclass": lambda r: (r.as_subclass(Tagged) * 2).as_subclass(torch.Tensor),
    "a subclass kept": lambda r: (r.as_subclass(Tagged).sin() + captured).as_subclass(torch.Tensor),
    "a parameter": lambda r: nn.Parameter(r * 2).sin().detach(),
    "data": written_by_data,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_loop(name: str) -> None:
    f = FUNCTIONS[name]
    for size in (1, 3, 5):
        x = torch.randn(size, 3)
        want = torch.stack([f(r) for r in x])
        for way in WAYS:
            for _ in range(2):  # the second is compared with the first recording
                torch.testing.assert_close(shardmap.vmap(f, randomness="same", **way)(x), want)


def test_modules_made_inside_are_never_refused() -> None:
    """Parameters are known by their memory: the objects that they were made of are gone."""
    x = torch.randn(5, 6)
    for _ in range(30):
        net = lambda r: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))(r)
        assert shardmap.vmap(net, randomness="different")(x).shape == (5, 2)


def test_copies_that_share_memory_are_refused() -> None:
    def function(r: torch.Tensor) -> torch.Tensor:
        a, b = copy.deepcopy([r, r[:]])
        a.mul_(2)
        return b

    with pytest.raises(errors.EscapeError, match="deepcopy"):
        shardmap.vmap(function)(torch.randn(3, 2))


ANOMALY = torch.tensor([[1.0, 2.0], [4.0, 9.0], [0.0, 1.0]])


def gradient(r: torch.Tensor) -> torch.Tensor:
    r = r.detach().requires_grad_()
    return torch.autograd.grad((r.sqrt() * 0).sum(), r)[0]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_anomaly_detection_sees_every_sample(way: dict[str, Any]) -> None:
    """Gradients without NaN are the loop's; a NaN in any sample raises, as in the loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.set_detect_anomaly(True):
            want = torch.stack([gradient(r) for r in ANOMALY[:2]])
            oracle.assert_same(shardmap.vmap(gradient, **way)(ANOMALY[:2]), want, "no nan")
            nested = shardmap.vmap(lambda rows: shardmap.vmap(gradient)(rows))
            oracle.assert_same(nested(ANOMALY[None, :2]), want[None], "nested")
            for batch in (ANOMALY, ANOMALY.flip(0)):  # in a later sample, in the first
                with pytest.raises(RuntimeError, match="nan values"):
                    shardmap.vmap(gradient, **way)(batch)
                with pytest.raises(RuntimeError, match="nan values"):
                    nested(batch[None])
        assert shardmap.vmap(gradient, **way)(ANOMALY).isnan().any()


NONES: dict[str, Callable[[torch.Tensor], Any]] = {
    "last": lambda r: (r.sin(), None),
    "first": lambda r: (None, r.sin()),
    "dict": lambda r: {"a": None, "b": r * 2, "c": [None, r.sum()]},
    "unused gradient": lambda r: torch.autograd.grad(
        (a := r.clone().requires_grad_()).sin().sum(),
        (a, torch.zeros(2, requires_grad=True)),
        allow_unused=True,
    ),
}


def stacked(rows: list[Any]) -> Any:
    return pytree.tree_map(
        lambda *leaves: None if leaves[0] is None else torch.stack(leaves), *rows
    )


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", NONES)
def test_none_among_the_outputs(name: str, way: dict[str, Any]) -> None:
    f, x = NONES[name], torch.randn(5, 3)
    want = stacked([f(r) for r in x])
    same(shardmap.vmap(f, **way)(x), want)
    nested = shardmap.vmap(lambda rows: shardmap.vmap(f)(rows), **way)(x.expand(3, 5, 3))
    same(pytree.tree_map(lambda t: None if t is None else t[1], nested), want)
    sums = shardmap.vmap(f, reduce="sum", **way)(x)
    same(sums, pytree.tree_map(lambda t: None if t is None else t.sum(0), want))


def same(got: Any, want: Any) -> None:
    mine, loops = pytree.tree_flatten(got), pytree.tree_flatten(want)
    assert mine[1] == loops[1]
    for a, b in zip(mine[0], loops[0], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_none_and_out_dims_and_names(tmp_path: Any) -> None:
    x = torch.randn(5, 3)
    f = lambda r: (None, r.outer(r), {"k": None, "v": r})
    got = shardmap.vmap(f, out_dims=(None, 2, 1))(x)
    assert got[0] is None
    assert got[2]["k"] is None
    torch.testing.assert_close(got[1], torch.stack([r.outer(r) for r in x], 2))
    torch.testing.assert_close(got[2]["v"], x.t())
    store = shardmap.vmap(f, out=shardmap.MemmapSink(tmp_path / "store"))(x)
    torch.testing.assert_close(torch.as_tensor(store.read("2.v", 0, 5)), x)


def test_only_none_is_refused() -> None:
    for f in (lambda r: None, lambda r: (None, None)):
        with pytest.raises(errors.OutputError, match="NoneType"):
            shardmap.vmap(f)(torch.randn(3, 2))


def test_a_helper_of_one_code_for_different_graphs() -> None:
    """The second recording is compared with the first: a tensor stands where a number stood."""

    def jacobian(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = torch.eye(len(y))
        return shardmap.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(rows)

    x, w = torch.randn(3, requires_grad=True), torch.randn(3)
    values: list[Any] = [2 * x, w * x, x * x, x**2, x.sin(), x / w, x / 3, -x, x * True, w * x * 2]
    for order in (values, values[::-1]):
        for y in order:
            want = torch.stack(
                [torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in torch.eye(3)]
            )
            torch.testing.assert_close(jacobian(y, x), want)


KINDS: list[Any] = [2, 2.0, None, True, torch.tensor(2.0), torch.tensor(2), 2 + 0j, torch.ones(3)]


def test_every_change_of_kind_between_calls() -> None:
    x = torch.randn(3, 3)

    def make(value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda r: r.clamp(max=9) if value is None else torch.mul(r, value).add(1)

    for first in KINDS:
        for second in KINDS:
            for value in (first, second):
                f = make(value)
                oracle.assert_same(
                    shardmap.vmap(f)(x), torch.stack([f(r) for r in x]), f"{first} {second}"
                )
