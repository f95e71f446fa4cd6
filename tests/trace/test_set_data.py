"""`tensor.data = value` inside a mapped function, and writes that no operator shows, against the loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shardmap
from shardmap import errors
from tests.same import assert_same

DTYPE = torch.float64
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
SINGLE = nn.Linear(3, 2)
TABLE = torch.randn(6, 3, dtype=DTYPE)


def adapted(r: Tensor) -> Tensor:
    """Two steps of gradient descent that write to `.data`."""
    net = copy.deepcopy(NET)
    with torch.enable_grad():
        for _ in range(2):
            loss = (net(r.detach()) - r.detach()[:2]).square().sum()
            for p, g in zip(
                net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
            ):
                p.data = p.data - 0.1 * g
    return net(r)


def clamped(r: Tensor) -> Tensor:
    layer = copy.deepcopy(NET[0])
    layer.weight.data = layer.weight.data.clamp(-0.5, 0.5) * r[0].sigmoid()
    layer.bias.data.add_(r.sum())
    return layer(r)


def masked_table(r: Tensor) -> Tensor:
    table = nn.Embedding.from_pretrained(TABLE.clone())
    table.weight.data = table.weight.data.index_fill(0, torch.tensor([2, 4]), 0.0)
    return table(r.abs().long() % 6) * r.sum()


def both_ways(r: Tensor) -> Tensor:
    """Later writes through the value reach the tensor, and the other way round."""
    a, b = torch.ones(3, dtype=DTYPE), r * 2
    a.data = b
    b += 1
    a *= r
    return a + b


def of_a_leaf(r: Tensor) -> Tensor:
    with torch.enable_grad():
        w = torch.ones(3, dtype=DTYPE, requires_grad=True)
        w.data = r.detach() * 3
        (g,) = torch.autograd.grad((w**3).sum() * 2, w)
    return g * r


def of_another_shape(r: Tensor) -> Tensor:
    w = torch.zeros(2, dtype=DTYPE)
    w.data = torch.outer(r, r)
    return w.sum(0)


def on_one_branch(r: Tensor) -> Tensor:
    w = torch.ones(3, dtype=DTYPE)
    if r.sum() < 0:
        w.data = w.data * 2
    return w * r


def flattened(r: Tensor) -> Tensor:
    net = copy.deepcopy(NET)
    flat = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(flat * (1 + r[0] ** 2).detach(), net.parameters())
    return net(r)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "steps of descent": adapted,
    "clamped weights": clamped,
    "a masked table": masked_table,
    "writes later": both_ways,
    "a leaf's gradient": of_a_leaf,
    "another shape": of_another_shape,
    "on one branch": on_one_branch,
    "a flat vector": flattened,
    "module.double()": lambda r: nn.LayerNorm(3).double()(r),
    "module.to(tensor)": lambda r: nn.LayerNorm(3).to(r)(r),
    "a copy, double": lambda r: copy.deepcopy(SINGLE).double()(r),
    "half and back": lambda r: copy.deepcopy(SINGLE).half().float().double()(r),
    "where it is already": lambda r: NET.to(r.device).double()(r),
    "statistics": lambda r: nn.BatchNorm1d(3).double()(torch.stack([r, r**2])).sum(0),
}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks of three": {"chunk_size": 3},
    "lanes": {"devices": ["cpu", "cpu"]},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_sample_is_the_loops(name: str, way: str) -> None:
    function = FUNCTIONS[name]
    mapped = shardmap.vmap(function, **WAYS[way])
    for size in (7, 1, 7, 3, 7):
        x = torch.randn(size, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(size))
        x[0], x[-1] = x[0].abs(), x[-1].abs()  # ends of the batch that take one branch
        assert_same(mapped(x), torch.stack([function(r) for r in x]), name)
        y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
        wanted, found = torch.stack([function(r) for r in y]), mapped(z)
        assert found.requires_grad == wanted.requires_grad
        if wanted.requires_grad:
            (wanted,) = torch.autograd.grad(wanted.sin().sum(), y)
            (found,) = torch.autograd.grad(found.sin().sum(), z)
            assert_same(found, wanted, f"{name}, gradients")


def by_numpy(r: Tensor) -> Tensor:
    mask = torch.ones(3, dtype=DTYPE)
    mask.numpy()[2] = 0
    return r.relu() * mask


def by_an_array(r: Tensor) -> Tensor:
    mask = torch.ones(3, dtype=DTYPE)
    view = np.asarray(mask)
    once = r * mask
    view[1] = 5
    return once * mask


def by_apply(r: Tensor) -> Tensor:
    return r * torch.arange(3.0, dtype=DTYPE).apply_(lambda v: v * v)


def by_a_storage(r: Tensor) -> Tensor:
    mask = torch.ones(3, dtype=DTYPE)
    mask.untyped_storage().fill_(0)
    return r * mask


def in_the_result(r: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.ones(3, dtype=DTYPE)
    mask.numpy()[2] = 0
    return r, mask


OF_ALL = torch.ones(3, dtype=DTYPE)


def to_a_captured_tensor(r: Tensor) -> Tensor:
    OF_ALL.numpy()[1] += 1
    return r * OF_ALL


def data_of_a_captured_tensor(r: Tensor) -> Tensor:
    OF_ALL.data = OF_ALL.data * 2
    return r * OF_ALL


def data_with_a_history(r: Tensor) -> Tensor:
    with torch.enable_grad():
        w = OF_ALL.clone().requires_grad_() * 2
        w.data = r.detach()
        return w.detach() * r


def data_of_a_tensor_with_a_view(r: Tensor) -> Tensor:
    a = torch.ones(3, dtype=DTYPE)
    part = a[:2]
    a.data = r * 2
    a *= r
    return torch.cat([a, part])


UNSEEN = {
    data_of_a_tensor_with_a_view: errors.EscapeError,
    by_numpy: errors.EscapeError,
    by_an_array: errors.EscapeError,
    by_apply: errors.EscapeError,
    by_a_storage: errors.EscapeError,
    in_the_result: errors.EscapeError,
    to_a_captured_tensor: errors.CapturedWriteError,
    data_of_a_captured_tensor: errors.CapturedWriteError,
    data_with_a_history: errors.EscapeError,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", UNSEEN, ids=lambda f: f.__name__)
def test_a_write_that_no_operator_shows_is_refused(function: Any, way: str) -> None:
    """Also where the first and the last sample do not show it."""
    OF_ALL.fill_(1)
    x = torch.tensor([[1.0, 2, -1], [1, 2, 3], [1, 1, -2]], dtype=DTYPE)
    kind = errors.EscapeError if way == "once" else UNSEEN[function]  # it may not read at all
    with pytest.raises((kind, UNSEEN[function]), match="write|copy_|instead|leaves it"):
        shardmap.vmap(function, **WAYS[way])(x)


@pytest.mark.parametrize("way", ["whole", "chunks of three", "each"])
def test_memory_that_is_only_read_is_served(way: str) -> None:
    def function(r: Tensor) -> Tensor:
        steps = torch.arange(3.0, dtype=DTYPE)
        scale = float(steps.numpy().sum()) + float(np.asarray(OF_ALL).max())
        steps[0] = 4  # by an operator
        return r * steps * scale

    OF_ALL.fill_(1)
    mapped = shardmap.vmap(function, **WAYS[way])
    for size in (3, 1, 5):
        x = torch.randn(size, 3, dtype=DTYPE)
        assert_same(mapped(x), torch.stack([function(r) for r in x]), way)
