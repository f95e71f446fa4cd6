"""Jacobians and Hessians of a batch equal the loop of `torch.func`'s over its samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from tests.transforms.functions import FUNCTIONS, PAIRS, WEIGHT, close, loop, mlp


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("transform", PAIRS)
def test_functions_of_a_vector(transform: str, name: str) -> None:
    ours, theirs = PAIRS[transform]
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = loop(theirs(FUNCTIONS[name]), x)
    for seeds in ("auto", None, 1, 4):
        close(ours(FUNCTIONS[name], seed_chunk_size=seeds)(x), expected)


@pytest.mark.parametrize("transform", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [0, 1, 3, 7])
def test_sizes_and_chunks(transform: str, dtype: torch.dtype, samples: int) -> None:
    ours, theirs = PAIRS[transform]
    x = torch.randn(7, 6, dtype=dtype)
    expected = loop(theirs(mlp), x)[:samples]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for chunk, seeds in (("auto", "auto"), (2, 4), (5, 1), (None, None), (1, 5)):
        close(ours(mlp, chunk_size=chunk, seed_chunk_size=seeds)(x[:samples]), expected, tolerance)
    close(ours(mlp, devices=["cpu", "cpu"], chunk_size=2)(x[:samples]), expected, tolerance)


@pytest.mark.parametrize("transform", PAIRS)
def test_matrices_in_and_out(transform: str) -> None:
    ours, theirs = PAIRS[transform]
    x = torch.randn(3, 2, 3, dtype=torch.float64)

    def function(m: torch.Tensor) -> torch.Tensor:
        return torch.tanh(m @ m.t()) * m.sum()

    for seeds in (None, 1, 3):
        close(ours(function, seed_chunk_size=seeds)(x), loop(theirs(function), x))


@pytest.mark.parametrize("transform", PAIRS)
def test_several_arguments(transform: str) -> None:
    ours, theirs = PAIRS[transform]
    x, y = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def function(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (q.sin().sum() * p**2).cumsum(0)

    for argnums in (0, 1, (0, 1), (1, 0), (1,)):
        close(
            ours(function, argnums, seed_chunk_size=3)(x, y), loop(theirs(function, argnums), x, y)
        )
    close(
        ours(function, -1)(x, y), loop(theirs(function, 1), x, y)
    )  # torch.func.jacfwd gives another tangent's for -1
    close(ours(function, (0, 1))(x, x), loop(theirs(function, (0, 1)), x, x))  # one tensor, twice


@pytest.mark.parametrize("transform", PAIRS)
def test_pytrees_of_arguments(transform: str) -> None:
    ours, theirs = PAIRS[transform]
    a, b = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def function(tree: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return tree["a"] * tree["b"][0], tree["b"][0].exp()

    rows = [theirs(function)({"a": p, "b": (q,)}) for p, q in zip(a, b, strict=True)]
    close(ours(function)({"a": a, "b": (b,)}), pytree.tree_map(lambda *t: torch.stack(t), *rows))


@pytest.mark.parametrize("transform", PAIRS)
def test_an_argument_for_all_samples(transform: str) -> None:
    ours, theirs = PAIRS[transform]
    x, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def function(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.sin(p * q)

    rows = list(x)
    for argnums in (0, 1, (0, 1)):
        expected = [theirs(function, argnums)(row, w) for row in rows]
        close(
            ours(function, argnums, in_dims=(0, None))(x, w),
            pytree.tree_map(lambda *t: torch.stack(t), *expected),
        )
    close(ours(lambda p: p**2, in_dims=1)(x.t()), loop(theirs(lambda p: p**2), x))


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "jacobian"])
def test_aux(transform: str) -> None:
    ours, theirs = PAIRS[transform]
    x = torch.randn(3, 4, dtype=torch.float64)

    def function(row: torch.Tensor) -> Any:
        return row**2, {"half": row / 2, "count": torch.tensor(4)}

    found = ours(function, has_aux=True, seed_chunk_size=3)(x)
    close(found, loop(theirs(function, has_aux=True), x))
    assert not found[1]["half"].requires_grad


class Net(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3 * 9, 5)
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Classes of one image [1, 6, 6]."""
        return self.second(F.avg_pool2d(F.gelu(self.norm(self.first(image[None]))), 2).flatten(1))[
            0
        ]


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "jacobian"])
def test_a_convolutional_module(transform: str) -> None:
    ours, theirs = PAIRS[transform]
    net, x = Net().double(), torch.randn(3, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        found, expected = ours(net)(x), loop(theirs(net), x)
    assert not found.requires_grad
    close(found, expected)


@pytest.mark.parametrize("transform", PAIRS)
def test_gradients_flow_on_to_what_is_captured_and_to_the_samples(transform: str) -> None:
    ours, theirs = PAIRS[transform]
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(
        loop(theirs(net), x).sin().sum(), [x, *net.parameters()], allow_unused=True
    )
    several: list[dict[str, Any]] = [
        {},
        {"chunk_size": 2},
        {"seed_chunk_size": 1},
        {"remat": True, "chunk_size": 2},
    ]
    for options in several:
        found = torch.autograd.grad(
            ours(net, **options)(x).sin().sum(), [x, *net.parameters()], allow_unused=True
        )
        for f, w in zip(found, wanted, strict=True):
            close(torch.zeros(()) if f is None else f, torch.zeros(()) if w is None else w)
    detached = ours(net.requires_grad_(False))(x.detach())
    assert not detached.requires_grad


@pytest.mark.parametrize("transform", PAIRS)
def test_inside_a_transform_from_outside(transform: str) -> None:
    ours, theirs = PAIRS[transform]
    x = torch.randn(3, 6, dtype=torch.float64)
    found = torch.func.grad(lambda t: ours(mlp)(t).sin().sum())(x)
    close(found, torch.func.grad(lambda t: torch.func.vmap(theirs(mlp))(t).sin().sum())(x))


@pytest.mark.parametrize("transform", PAIRS)
def test_inside_another_map(transform: str) -> None:
    ours, theirs = PAIRS[transform]
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    close(shardmap.vmap(ours(mlp))(x), torch.stack([loop(theirs(mlp), part) for part in x]))


@pytest.mark.parametrize("transform", PAIRS)
def test_reduced_and_stored(transform: str, tmp_path: Path) -> None:
    ours, theirs = PAIRS[transform]
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = loop(theirs(mlp), x)
    close(ours(mlp, reduce="mean", chunk_size=3)(x), expected.mean(0))
    store = ours(mlp, out=shardmap.ZarrSink(str(tmp_path / "store")), chunk_size=3)(x)
    close(store.read("result", 0, 7), expected)
    with pytest.raises(errors.OptionError, match="a plan runs into memory"):
        ours(mlp, out=shardmap.ZarrSink(str(tmp_path / "other"))).plan(x)


@pytest.mark.parametrize("transform", PAIRS)
def test_recorded_once(transform: str, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = PAIRS[transform]
    weight = [torch.randn(6, dtype=torch.float64)]

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x * weight[0])

    x = torch.randn(3, 6, dtype=torch.float64)
    mapped = ours(function, trace="once")
    with caplog.at_level(logging.WARNING, "shardmap"):
        for _ in range(3):
            close(mapped(x), loop(theirs(function), x))
        weight[0] = weight[0] * 2
        close(mapped(x + 1), loop(theirs(function), x + 1))
    assert not caplog.records


def test_nothing_is_recorded_again_with_once() -> None:
    x = torch.randn(3, 4)
    for ours, _ in PAIRS.values():
        mapped = ours(torch.sin, trace="once")
        mapped(x)  # which plans the rows that are taken at a time
        mapped(x)
        outer = mapped._mapped.__closure__
        assert outer is not None
        (called,) = [c.cell_contents for c in outer if callable(c.cell_contents)][:1]
        first = called.__closure__
        assert first is not None
        once = next(c.cell_contents for c in first if type(c.cell_contents).__name__ == "Once")
        memory = once.memory
        (kept,) = memory.kept.values()
        mapped(x + 1)
        assert next(iter(memory.kept.values())) is kept


def test_infinite_values_do_not_meet_symbolic_zeros() -> None:
    """Missing tangents are not multiplied; the user's own products are."""
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    x[1, 2] = torch.inf
    torch.testing.assert_close(
        shardmap.jacfwd(lambda row: F.linear(row, weight))(x), weight.expand(3, -1, -1)
    )
    nothing = torch.zeros(4)
    found = shardmap.jacfwd(lambda row: row * torch.inf * nothing)(x)
    assert found.diagonal(dim1=1, dim2=2).isnan().all()


@pytest.mark.parametrize("transform", [shardmap.jacrev, shardmap.jacfwd])
def test_dropout_has_one_mask_for_all_rows(transform: Callable[..., Any]) -> None:
    x = torch.randn(200, 6)
    found = transform(lambda row: F.dropout(row, 0.5), randomness="different")(x)
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert torch.equal(torch.diag_embed(diagonal), found)
    assert set(diagonal.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (diagonal == 2).float().mean() < 0.6
    assert shardmap.jacobian(lambda row: F.dropout(row, 0.5), randomness="different").method is None


def test_a_plan_explains() -> None:
    x = torch.randn(7, 6)
    plan = shardmap.jacrev(mlp, chunk_size=3).plan(x)
    assert plan.samples == 7
    assert plan.lanes[0].chunks == 3
    assert "jacrev(mlp)" in str(plan)
    assert "mm" in plan.explain()
    torch.testing.assert_close(plan.run(), shardmap.jacrev(mlp)(x))
    assert shardmap.jacrev(mlp).__name__ == "mlp"
    assert repr(shardmap.jacrev(mlp)) == "shardmap.jacrev(mlp)"


NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layer norm": lambda x: F.layer_norm(x, (6,), WEIGHT[0], WEIGHT[1]),
    "group norm": lambda x: F.group_norm(x[None], 1, WEIGHT[0, :3], WEIGHT[1, :3]),
    "instance norm": lambda x: F.instance_norm(x[None]),
    "batch norm, evaluating": lambda x: F.batch_norm(
        x[None], WEIGHT[0, :3], WEIGHT[1, :3].exp(), WEIGHT[2, :3], WEIGHT[3, :3]
    ),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd"])
def test_norms(transform: str, name: str) -> None:
    """Their kernels read statistics that are not dense out of bounds.

    In forward mode torch views symbolic zeros unseen.
    """
    ours, theirs = PAIRS[transform]
    x = torch.randn(3, 3, 5, 6, dtype=torch.float64)
    close(ours(NORMS[name])(x), loop(theirs(NORMS[name]), x))


def test_gradients_through_what_autograd_saved_outside() -> None:
    """A backward inside the mapped function unpacks results that were saved outside of it.

    Gradients flow on through them.
    """
    weight, start = (
        torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
    )
    units = torch.eye(4, dtype=torch.float64)
    y = torch.tanh(weight @ start).exp()

    def one(v: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, start, v, create_graph=True)[0]

    found, expected = shardmap.vmap(one)(units), torch.stack([one(v) for v in units])
    close(found, expected)
    grads = [
        torch.autograd.grad(t.sin().sum(), [weight, start], retain_graph=True)
        for t in (found, expected)
    ]
    close(grads[0], grads[1])
