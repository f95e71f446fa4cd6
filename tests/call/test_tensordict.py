"""TensorDicts, lazy stacks and tensorclasses: mapped as the loop maps them, over their batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import (
    LazyStackedTensorDict,
    TensorDict,
    TensorDictParams,
    UnbatchedTensor,
    tensorclass,
)
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

import shardmap
from shardmap import errors

SIZES = [1, 3, 7]
WAYS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 3},
    {"devices": ["cpu", "cpu"]},
    {"trace": "once"},
]


@tensorclass
class State:
    position: Tensor
    velocity: Tensor
    name: str = "free"


def nested(*batch: int) -> TensorDict:
    generator = torch.Generator().manual_seed(sum(batch))
    draw = lambda *shape: torch.randn(*batch, *shape, generator=generator)
    return TensorDict({"a": draw(3), "n": TensorDict({"b": draw()}, batch)}, batch)


def changed(td: TensorDict) -> TensorDict:
    td = td.clone()
    td["c"] = td["a"].sum(-1) * td["n", "b"]
    td["a"] = td["a"] * 2
    return td


def assert_same(found: Any, expected: Any) -> None:
    """The same class, batch and keys, and every tensor of every sample."""
    assert type(found) is type(expected)
    assert found.batch_size == expected.batch_size
    keys = sorted(map(str, found.keys(True, True)))
    assert keys == sorted(map(str, expected.keys(True, True)))
    for key in expected.keys(True, True):
        torch.testing.assert_close(found[key], expected[key])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_tensordict_comes_back_as_the_loop_stacks_it(way: dict[str, Any]) -> None:
    for size in SIZES:
        td = nested(size)
        mapped = shardmap.vmap(changed, **way)
        for _ in range(2):
            assert_same(mapped(td), torch.stack([changed(td[i]) for i in range(size)]))
        assert sorted(td.keys()) == ["a", "n"]


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("out_dim", [0, 1, -1, -2])
def test_dims_count_the_batch(in_dim: int, out_dim: int) -> None:
    td = nested(5, 2)
    rows = td.unbind(in_dim)
    for row in rows:
        assert row.batch_dims == 1
    found = shardmap.vmap(changed, in_dims=in_dim, out_dims=out_dim)(td)
    assert_same(found, torch.stack([changed(row) for row in rows], out_dim))


def test_a_dim_beyond_the_batch_is_refused() -> None:
    with pytest.raises(errors.OutDimsError, match="out of range; use -1 to 0"):
        shardmap.vmap(changed, out_dims=1)(nested(3))


def test_tensors_beyond_the_batch_are_mapped_leaf_by_leaf() -> None:
    td = TensorDict({"w": torch.randn(5, 3), "b": torch.randn(5)}, [])
    found = shardmap.vmap(lambda t: t["w"].sum() * t["b"])(td)
    torch.testing.assert_close(found, td["w"].sum(1) * td["b"])


def test_an_empty_batch_and_names() -> None:
    assert_same(shardmap.vmap(changed)(nested(0)), changed(nested(0)))
    td = TensorDict({"a": torch.randn(3, 5, 4)}, [3, 5], names=["A", "B"])
    assert shardmap.vmap(lambda t: t, in_dims=1)(td).names == [None, "A"]
    assert shardmap.vmap(lambda t: t, in_dims=0)(td).names == [None, "B"]


@pytest.mark.parametrize("stack_dim", [0, 1])
@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("out_dim", [0, 1])
def test_a_lazy_stack_is_a_batch(stack_dim: int, in_dim: int, out_dim: int) -> None:
    parts = [nested(2), nested(2) + 1, nested(2) * 3]
    lazy = LazyStackedTensorDict.lazy_stack(parts, stack_dim)
    rows = lazy.unbind(in_dim)

    def func(td: Any) -> Any:
        td.set("c", td.get("a") + 1)
        return td

    found = shardmap.vmap(func, in_dims=in_dim, out_dims=out_dim)(lazy)
    assert isinstance(found, LazyStackedTensorDict)
    expected = torch.stack([row.clone().set("c", row.get("a") + 1) for row in rows], out_dim)
    assert found.batch_size == expected.batch_size
    for key in ("a", "c", ("n", "b")):
        torch.testing.assert_close(found[key], expected[key])
    total = shardmap.vmap(lambda td: td["a"].sum(), in_dims=in_dim)(lazy)
    torch.testing.assert_close(total, torch.stack([row["a"].sum() for row in rows]))


def test_the_gradient_of_a_lazy_stack_reaches_its_tensors() -> None:
    nets = [nn.Linear(3, 4) for _ in range(3)]
    stacked = TensorDict.from_modules(*nets, lazy_stack=True)
    assert isinstance(stacked, LazyStackedTensorDict)
    net, x = nn.Linear(3, 4).to("meta"), torch.randn(5, 3)

    def call(parameters: TensorDict, x: Tensor) -> Tensor:
        with parameters.to_module(net):
            return net(x)

    found = shardmap.vmap(call, in_dims=(0, None))(stacked, x)
    torch.testing.assert_close(found, torch.stack([net(x) for net in nets]))
    found.square().sum().backward()
    for net in nets:
        expected = torch.autograd.grad(net(x).square().sum(), [net.weight, net.bias])
        torch.testing.assert_close((net.weight.grad, net.bias.grad), expected)


@pytest.mark.parametrize("as_module", [True, False])
def test_stacked_parameters(as_module: bool) -> None:
    nets = [nn.Linear(3, 4) for _ in range(3)]
    stacked = TensorDict.from_modules(*nets, as_module=as_module)
    assert isinstance(stacked, TensorDictParams) == as_module
    x, net = torch.randn(5, 3), nn.Linear(3, 4).to("meta")

    def call(parameters: TensorDict, x: Tensor) -> Tensor:
        with parameters.to_module(net):
            return net(x)

    found = shardmap.vmap(call, in_dims=(0, None))(stacked, x)
    torch.testing.assert_close(found, torch.stack([net(x) for net in nets]))
    keys = [*stacked.keys(True, True)]
    wanted = [stacked[key] for key in keys]
    grads = torch.autograd.grad(found.square().sum(), wanted)
    by_loop = [
        torch.autograd.grad(net(x).square().sum(), [dict(net.named_parameters())[k] for k in keys])
        for net in nets
    ]
    for grad, parts in zip(grads, zip(*by_loop, strict=True), strict=True):
        torch.testing.assert_close(grad, torch.stack(list(parts)))


def unequal(*parts: dict[str, Any]) -> LazyStackedTensorDict:
    return LazyStackedTensorDict.lazy_stack([TensorDict(part, []) for part in parts])


@pytest.mark.parametrize(
    ("lazy", "match"),
    [
        (unequal({"x": torch.ones(2)}, {"x": torch.ones(3)}), r"'x' has shape \(2,\).*Ragged"),
        (unequal({"x": torch.ones(2)}, {"y": torch.ones(2)}), "same keys"),
        (unequal({"x": torch.ones(2)}, {"x": torch.ones(2).double()}), "float64 in sample 1"),
        (unequal({"x": torch.ones(2), "s": "a"}, {"x": torch.ones(2), "s": "b"}), "differs within"),
    ],
)
def test_a_lazy_stack_that_is_no_batch_is_refused(lazy: Any, match: str) -> None:
    with pytest.raises(errors.InDimsError, match=match):
        shardmap.vmap(lambda td: td["x"].sum())(lazy)


def test_the_remedies_of_unequal_stacks() -> None:
    parts = [torch.randn(2), torch.randn(3), torch.randn(2)]
    found = shardmap.vmap(torch.sum)(shardmap.Ragged(parts))
    torch.testing.assert_close(found, torch.stack([part.sum() for part in parts]))
    lazy = unequal({"x": torch.ones(2), "s": "a"}, {"x": torch.ones(2), "s": "b"})
    assert shardmap.vmap(lambda td: td["x"].sum())(lazy.exclude("s")).tolist() == [2.0, 2.0]


def test_writes_to_samples() -> None:
    def func(td: TensorDict) -> Tensor:
        return td["x"].add_(1)

    dense = TensorDict({"x": torch.arange(6.0).view(3, 2)}, [3])
    shardmap.vmap(func)(dense)
    torch.testing.assert_close(dense["x"], torch.arange(6.0).view(3, 2) + 1)
    lazy = unequal({"x": torch.ones(2)}, {"x": torch.ones(2)})
    with pytest.raises(errors.CapturedWriteError, match="lazy stack.*clone the argument"):
        shardmap.vmap(func)(lazy)
    found = shardmap.vmap(lambda td: func(td.clone()))(lazy)
    torch.testing.assert_close(found, torch.full((2, 2), 2.0))


def test_a_locked_lazy_stack_has_locked_samples() -> None:
    lazy = unequal({"x": torch.ones(2)}, {"x": torch.ones(2)}).lock_()
    with pytest.raises(RuntimeError, match="Cannot modify"):
        shardmap.vmap(lambda td: td.set("y", td["x"]))(lazy)
    locked = nested(3).lock_()  # whose rows are not locked
    assert_same(shardmap.vmap(lambda td: td.set("c", td["a"]))(locked)["n"], nested(3)["n"])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_tensorclass(way: dict[str, Any]) -> None:
    def step(state: State) -> State:
        assert state.batch_size == torch.Size([])
        assert state.name == "mine"
        return State(state.position + state.velocity, state.velocity * 2, state.name, batch_size=[])

    for size in SIZES:
        state = State(torch.randn(size, 3), torch.randn(size, 3), "mine", batch_size=[size])
        found = shardmap.vmap(step, **way)(state)
        assert isinstance(found, State)
        assert found.name == "mine"
        assert found.batch_size == torch.Size([size])
        expected = torch.stack([step(state[i]) for i in range(size)])
        torch.testing.assert_close(found.position, expected.position)
        torch.testing.assert_close(found.velocity, expected.velocity)


def test_data_that_is_no_tensor() -> None:
    rows = [TensorDict({"s": "same", "x": torch.full((2,), float(i))}, []) for i in range(3)]

    def func(td: TensorDict) -> TensorDict:
        assert td["s"] == "same"
        return td.set("y", td["x"] * 2)

    found = shardmap.vmap(func)(torch.stack(rows))
    assert found["s"] == "same"
    torch.testing.assert_close(found["y"], torch.stack([row["x"] * 2 for row in rows]))


def test_a_captured_tensordict_may_change() -> None:
    x, weights = torch.randn(5, 3), TensorDict({"w": torch.randn(3, 3), "b": torch.randn(3)}, [])
    lazy = unequal({"w": torch.randn(3)}, {"w": torch.randn(3)})

    def func(row: Tensor) -> Tensor:
        return row @ weights["w"] + weights["b"] + (lazy["w"] @ row).sum()

    mapped = shardmap.vmap(func, trace="once")
    changes: list[Callable[[], object]] = [
        lambda: weights.set("w", torch.randn(3, 3)),
        lambda: weights["b"].mul_(3),
        lambda: lazy.tensordicts[0].set("w", torch.randn(3)),
    ]
    for change in [lambda: None, *changes]:
        change()
        torch.testing.assert_close(mapped(x), torch.stack([func(row) for row in x]))


def test_gradients_transforms_and_modules() -> None:
    parameters, x = TensorDict({"w": torch.randn(3), "b": torch.randn(())}, []), torch.randn(5, 3)

    def loss(p: TensorDict, row: Tensor) -> Tensor:
        return ((p["w"] * row).sum() + p["b"]).square()

    expected = torch.stack([torch.func.grad(loss)(parameters, row) for row in x])
    assert_same(shardmap.per_sample_grad(loss)(parameters, x), expected)
    assert_same(shardmap.vmap(torch.func.grad(loss), (None, 0))(parameters, x), expected)
    batch = nested(5)
    jacobian = shardmap.jacrev(lambda td: td["a"].sin() * td["n", "b"])(batch)
    by_loop = torch.func.vmap(torch.func.jacrev(lambda td: td["a"].sin() * td["n", "b"]))(batch)
    assert jacobian.batch_size == torch.Size([5])
    torch.testing.assert_close(jacobian["a"], by_loop["a"])
    torch.testing.assert_close(jacobian["n", "b"], by_loop["n", "b"])
    module = TensorDictModule(nn.Linear(3, 2), in_keys=["a"], out_keys=["o"])
    assert_same(shardmap.vmap(module)(batch), torch.stack([module(batch[i]) for i in range(5)]))


@pytest.mark.parametrize("outer", [shardmap.vmap, torch.func.vmap])
@pytest.mark.parametrize("inner", [shardmap.vmap, torch.func.vmap])
def test_nested_maps(outer: Callable[..., Any], inner: Callable[..., Any]) -> None:
    td = nested(5, 2)
    expected = torch.stack([changed(row) for row in td.reshape(-1)]).reshape(5, 2)
    assert_same(outer(inner(changed))(td), expected)


def test_reduced_planned_compared_and_ragged() -> None:
    td = nested(7)
    summed = shardmap.vmap(changed, reduce="sum")(td)
    assert summed.batch_size == torch.Size([])
    torch.testing.assert_close(summed["c"], changed(td)["c"].sum())
    assert_same(shardmap.plan(changed)(td).run(), changed(td))
    compared = shardmap.compare(changed)(td)
    assert {out.name for out in compared.outputs} == {"a", "c", "n.b"}
    assert all(out.agrees for out in compared.outputs)
    words = [torch.randn(i % 3 + 1) for i in range(7)]

    def of_words(word: Tensor, td: TensorDict) -> TensorDict:
        return TensorDict({"s": word.sum() * td["a"]}, [])

    found = shardmap.vmap(of_words)(shardmap.Ragged(words), td)
    assert_same(found, torch.stack([of_words(w, td[i]) for i, w in enumerate(words)]))
    with pytest.raises(
        errors.OutputError, match="'s' of it has unequal shapes; return its tensors"
    ):
        shardmap.vmap(lambda w: TensorDict({"s": w * 2}, []))(shardmap.Ragged(words))
    doubled = shardmap.vmap(lambda w: {"s": w * 2})(shardmap.Ragged(words))["s"]
    for i, word in enumerate(words):
        torch.testing.assert_close(doubled[i], word * 2)


def test_branches_on_data_of_a_tensordict() -> None:
    def func(td: TensorDict) -> tuple[TensorDict, int]:
        if td["a"].sum() > 0:
            return TensorDict({"y": td["a"] * 2}, []), 1
        return TensorDict({"y": td["a"] - 1}, []), 2

    td = nested(11)
    each = [func(td[i]) for i in range(11)]
    assert {number for _, number in each} == {1, 2}
    found, numbers = shardmap.vmap(func)(td)
    assert_same(found, torch.stack([out for out, _ in each]))
    assert numbers.tolist() == [number for _, number in each]


def test_a_tensor_without_a_batch_is_shared_and_not_returned() -> None:
    td = TensorDict({"a": torch.randn(5, 3), "u": UnbatchedTensor(torch.randn(2))}, [5])
    found = shardmap.vmap(lambda td: td["u"].sum() * td["a"])(td)
    torch.testing.assert_close(found, torch.stack([row["u"].sum() * row["a"] for row in td]))
    with pytest.raises(errors.OutputError, match=r"'u' is a UnbatchedTensor.*exclude"):
        shardmap.vmap(lambda td: td)(td)
    assert_same(shardmap.vmap(lambda td: td.exclude("u"))(td), td.exclude("u"))


def test_a_tensordict_is_stored_by_name(tmp_path: Path) -> None:
    td = nested(7)
    store = shardmap.vmap(changed, out=shardmap.MemmapSink(tmp_path / "out"), chunk_size=3)(td)
    assert sorted(spec.name for spec in store.header.outputs) == ["a", "c", "n.b"]
    expected = changed(td)
    for name in ("a", "c", "n.b"):
        torch.testing.assert_close(store.read(name, 0, 7), expected[tuple(name.split("."))])
