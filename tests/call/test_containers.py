"""Containers of tensors as arguments and results: what pytrees know, and what batches itself."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _remove_batch_dim
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutput

import shardmap
from shardmap import errors

SIZES = [1, 3, 7]
WAYS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 3},
    {"chunk_size": None},
    {"devices": ["cpu", "cpu"]},
    {"trace": "once"},
    {"remat": True},
]


class Point(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class State:
    position: Tensor
    velocity: Tensor
    name: str = "free"

    def __post_init__(self) -> None:
        """Take tensors only: a state made of stand-ins would be noticed."""
        assert self.position.dtype == self.velocity.dtype


pytree.register_dataclass(State, field_names=["position", "velocity"], drop_field_names=["name"])


class Pair:
    """A container that pytrees know by `register_pytree_node`, and that checks what it is given."""

    def __init__(self, first: object, second: object):
        self.first, self.second = first, second


pytree.register_pytree_node(
    Pair, lambda p: ([p.first, p.second], None), lambda parts, _: Pair(*parts)
)


class Box:
    """A container with torch.func's methods, which pytrees do not know."""

    def __init__(self, value: Tensor, weight: Tensor, batch: tuple[int, ...], label: str = "box"):
        self.value, self.weight, self.batch, self.label = value, weight, batch, label

    def dim(self) -> int:
        return len(self.batch)

    def size(self, dim: int) -> int:
        return self.batch[dim]

    def __getitem__(self, row: int) -> Box:
        return Box(self.value[row], self.weight[row], self.batch[1:], self.label)

    def _of(self, change: Callable[[Tensor], Tensor], batch: tuple[int, ...]) -> Box:
        return Box(change(self.value), change(self.weight), batch, self.label)

    def _add_batch_dim(self, *, in_dim: int, vmap_level: int) -> Box:
        batch = self.batch[:in_dim] + self.batch[in_dim + 1 :]
        return self._of(lambda t: _add_batch_dim(t, in_dim, vmap_level), batch)

    def _remove_batch_dim(self, vmap_level: int, batch_size: int, out_dim: int) -> Box:
        batch = (*self.batch[:out_dim], batch_size, *self.batch[out_dim:])
        return self._of(lambda t: _remove_batch_dim(t, vmap_level, batch_size, out_dim), batch)


def data(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, generator=generator), torch.randn(size, generator=generator)


MAKERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "namedtuple": Point,
    "dict": lambda a, b: {"a": a, "b": b},
    "OrderedDict": lambda a, b: collections.OrderedDict(z=a, b=b),
    "defaultdict": lambda a, b: collections.defaultdict(list, a=a, b=b),
    "deque": lambda a, b: collections.deque([a, b]),
    "dataclass": State,
    "registered class": Pair,
    "ModelOutput": lambda a, b: BaseModelOutput(last_hidden_state=a, hidden_states=(b,)),
}


def function(sample: Any) -> Any:
    """The container that it is given, with other values; python sees its class and parts."""
    a, b = pytree.tree_leaves(sample)
    structure = pytree.tree_structure(sample)
    return pytree.tree_unflatten([a.sin() * b, a.sum() - b], structure)


def rows(batch: Any, size: int) -> list[Any]:
    leaves, structure = pytree.tree_flatten(batch)
    return [pytree.tree_unflatten([t[i] for t in leaves], structure) for i in range(size)]


def assert_equals_loop(found: Any, samples: list[Any]) -> None:
    """Compare every sample, and the structure."""
    each = [pytree.tree_flatten(sample) for sample in samples]
    leaves, structure = pytree.tree_flatten(found)
    assert structure == each[0][1]
    for leaf, parts in zip(leaves, zip(*[leaves for leaves, _ in each], strict=True), strict=True):
        torch.testing.assert_close(leaf, torch.stack(list(parts)))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_a_container_comes_back_as_the_loop_makes_it(name: str, way: dict[str, Any]) -> None:
    for size in SIZES:
        batch = MAKERS[name](*data(size))
        mapped = shardmap.vmap(function, **way)
        for _ in range(2):
            found = mapped(batch)
            assert type(found) is type(batch)
            assert_equals_loop(found, [function(row) for row in rows(batch, size)])


@pytest.mark.parametrize("name", MAKERS)
def test_a_container_of_an_empty_batch(name: str) -> None:
    batch = MAKERS[name](*data(0))
    found = shardmap.vmap(function)(batch)
    assert pytree.tree_structure(found) == pytree.tree_structure(batch)
    assert [t.shape for t in pytree.tree_leaves(found)] == [(0, 3), (0,)]


@pytest.mark.parametrize("name", MAKERS)
def test_a_captured_container_is_read(name: str) -> None:
    held = MAKERS[name](*data(1))
    x = torch.randn(5, 3)

    def with_held(row: Tensor) -> Tensor:
        a, b = pytree.tree_leaves(held)
        return (row * a[0]).sum() + b[0]

    mapped = shardmap.vmap(with_held, trace="once")
    torch.testing.assert_close(mapped(x), torch.stack([with_held(row) for row in x]))
    for leaf in pytree.tree_leaves(held):
        leaf.mul_(2)
    torch.testing.assert_close(mapped(x), torch.stack([with_held(row) for row in x]))


@pytest.mark.parametrize(
    ("make", "dims"),
    [
        (MAKERS["OrderedDict"], {"z": 0, "b": None}),
        (MAKERS["defaultdict"], {"a": 0, "b": None}),
        (MAKERS["ModelOutput"], {"last_hidden_state": 0, "hidden_states": None}),
        (MAKERS["ModelOutput"], BaseModelOutput(last_hidden_state=0, hidden_states=(None,))),
        (MAKERS["namedtuple"], (0, None)),
        (MAKERS["namedtuple"], Point(0, None)),
        (MAKERS["deque"], [0, None]),
        (MAKERS["registered class"], Pair(0, None)),
    ],
)
def test_dims_of_the_parts_of_a_container(make: Callable[..., Any], dims: Any) -> None:
    x, b = torch.randn(5, 3), torch.randn(())
    found = shardmap.vmap(function, in_dims=(dims,))(make(x, b))
    assert_equals_loop(found, [function(make(row, b)) for row in x])


def test_dims_that_name_other_keys_are_refused() -> None:
    batch = collections.OrderedDict(a=torch.ones(2), b=torch.ones(2))
    with pytest.raises(errors.InDimsError, match="does not fit the structure"):
        shardmap.vmap(function, in_dims=({"a": 0, "c": 0},))(batch)
    with pytest.raises(errors.InDimsError, match="does not fit the structure"):
        shardmap.vmap(function, in_dims=(Pair(0, 0),))(batch)


def of_box(box: Box) -> tuple[Box, Tensor]:
    assert box.batch == ()
    assert box.value.shape == (3,)
    return Box(box.value * box.weight, box.weight + 1, (), box.label), box.value.sum()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_container_with_methods_of_torch_func(way: dict[str, Any]) -> None:
    for size in SIZES:
        value, weight = data(size)
        box = Box(value, weight, (size,), "mine")
        mapped = shardmap.vmap(of_box, **way)
        for _ in range(2):
            found, total = mapped(box)
            assert isinstance(found, Box)
            assert (found.batch, found.label) == ((size,), "mine")
            each = [of_box(box[i])[0] for i in range(size)]
            torch.testing.assert_close(found.value, torch.stack([b.value for b in each]))
            torch.testing.assert_close(found.weight, torch.stack([b.weight for b in each]))
            torch.testing.assert_close(total, value.sum(1))


def test_dims_of_such_a_container_count_its_batch() -> None:
    value, weight = torch.randn(2, 5, 3), torch.randn(2, 5)

    def double(box: Box) -> Box:
        assert box.batch == (2,)
        return Box(box.value * 2, box.weight * 2, (2,))

    for in_dim in (1, -1):
        for out_dim, batch in ((0, (5, 2)), (1, (2, 5)), (-1, (2, 5)), (-2, (5, 2))):
            found = shardmap.vmap(double, in_dims=in_dim, out_dims=out_dim)(
                Box(value, weight, (2, 5))
            )
            order = (0, 1) if batch == (2, 5) else (1, 0)
            assert found.batch == batch
            torch.testing.assert_close(found.value, 2 * value.permute(*order, 2))
            torch.testing.assert_close(found.weight, 2 * weight.permute(*order))
    with pytest.raises(errors.OutDimsError, match="out of range; use -2 to 1"):
        shardmap.vmap(double, in_dims=1, out_dims=2)(Box(value, weight, (2, 5)))


def test_sizes_of_such_a_container_and_a_tensor_agree() -> None:
    box = Box(torch.ones(4, 3), torch.ones(4), (4,))
    with pytest.raises(errors.InDimsError, match=r"argument 0.* has 4 samples, argument 1"):
        shardmap.vmap(lambda b, t: b.value * t)(box, torch.ones(5))


def test_such_a_container_is_reduced_and_differentiated() -> None:
    value, weight = torch.randn(7, 3, requires_grad=True), torch.randn(7)
    box = Box(value, weight, (7,))
    summed = shardmap.vmap(lambda b: Box(b.value * b.weight, b.weight, ()), reduce="sum")(box)
    assert summed.batch == ()
    torch.testing.assert_close(summed.value, (value * weight[:, None]).sum(0))
    found = shardmap.vmap(lambda b: Box(b.value.sin() * b.weight, b.weight, ()))(box)
    (grad,) = torch.autograd.grad(found.value.square().sum(), value)
    expected = 2 * value.sin() * value.cos() * weight.square()[:, None]
    torch.testing.assert_close(grad, expected)


def test_such_containers_in_nested_maps() -> None:
    box = Box(torch.randn(2, 5, 3), torch.randn(2, 5), (2, 5))

    def inner(b: Box) -> Box:
        assert b.batch == ()
        return Box(b.value * b.weight, b.weight, ())

    for outer in (shardmap.vmap, torch.func.vmap):
        # torch's own map knows no such container: it is given the tensors.
        def both(value: Tensor, weight: Tensor) -> Tensor:
            return shardmap.vmap(inner)(Box(value, weight, (5,))).value

        found = outer(both)(box.value, box.weight)
        torch.testing.assert_close(found, box.value * box.weight[..., None])
    found = shardmap.vmap(shardmap.vmap(inner))(box)
    assert found.batch == (2, 5)
    torch.testing.assert_close(found.value, box.value * box.weight[..., None])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_none_and_numbers_among_outputs(way: dict[str, Any]) -> None:
    def mixed(row: Tensor) -> Any:
        return {"a": row.sum(), "n": None, "i": 3, "f": (0.5, True), "c": 1j, "s": row.shape[0]}

    x = torch.randn(7, 3)
    mapped = shardmap.vmap(mixed, **way)
    for _ in range(2):
        found = mapped(x)
        assert found["n"] is None
        for key in ("i", "c", "s"):
            expected = torch.stack([torch.as_tensor(mixed(row)[key]) for row in x])
            assert found[key].dtype == expected.dtype
            assert torch.equal(found[key], expected)
        assert torch.equal(found["f"][0], torch.full((7,), 0.5))
        assert torch.equal(found["f"][1], torch.full((7,), True))
        torch.testing.assert_close(found["a"], x.sum(1))


def test_numbers_that_differ_by_sample() -> None:
    def sign(row: Tensor) -> tuple[Tensor, int, float]:
        return (row, 1, 0.5) if row.sum() > 0 else (-row, -1, 1.5)

    x = torch.randn(11, 3)
    assert {sign(row)[1] for row in x} == {1, -1}
    for options in ({}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"]}):
        rows_, signs, halves = shardmap.vmap(sign, **options)(x)
        torch.testing.assert_close(rows_, torch.stack([sign(row)[0] for row in x]))
        assert signs.tolist() == [sign(row)[1] for row in x]
        assert halves.tolist() == [sign(row)[2] for row in x]


def test_a_number_with_out_dim_none() -> None:
    found, number = shardmap.vmap(lambda row: (row * 2, 3), out_dims=(0, None))(torch.ones(4))
    assert torch.equal(found, torch.full((4,), 2.0))
    assert int(number) == 3


def test_other_outputs_are_refused_and_the_remedy_works() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(errors.OutputError, match="returned a str .*return tensors and numbers"):
        shardmap.vmap(lambda row: (row, "text"))(x)
    found, number = shardmap.vmap(lambda row: (row, len("text")))(x)
    assert torch.equal(found, x)
    assert number.tolist() == [4, 4, 4]


def test_a_dataclass_that_is_not_registered_names_the_remedy_which_works():
    @dataclasses.dataclass
    class Unknown:
        value: torch.Tensor

    x = torch.rand(5, 3)
    mapped = shardmap.vmap(lambda row: Unknown(row * 2))
    with pytest.raises(shardmap.errors.OutputError, match=r"register_dataclass\(Unknown\)"):
        mapped(x)
    torch.utils._pytree.register_dataclass(Unknown)
    torch.testing.assert_close(mapped(x).value, x * 2)
