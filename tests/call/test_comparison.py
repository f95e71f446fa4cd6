"""`shardmap.compare`: the map beside the loop, as a user asks for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from shardmap.rules import registry
from tests.call import test_confirm as confirmed

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
x, y = torch.randn(13, 4), torch.randint(2, (13,))


def gradient(row: torch.Tensor, label: torch.Tensor) -> Any:
    loss = nn.functional.cross_entropy(MODEL(row), label)
    return torch.autograd.grad(loss, tuple(MODEL.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 3},
        {"devices": ["cpu", "cpu"]},
        {"reduce": "mean"},
        {"reduce": shardmap.reduce.norm()},
        {"out_dims": -1},
        {"check": "off"},
    ],
    ids=str,
)
def test_a_right_map_agrees(options: dict[str, Any]) -> None:
    found = shardmap.compare(gradient, **options)(x, y, samples=5)
    assert found.agrees
    assert found.parted is None
    assert len(found.samples) == 5
    assert all(out.largest < 1e-5 for out in found.outputs)
    assert "agrees with the loop on 5 samples" in str(found)


def test_transforms_are_compared() -> None:
    square = torch.randn(13, 4, 4)
    loss = nn.functional.cross_entropy
    made = shardmap.per_sample_grad(MODEL, loss, chunk_size=5)
    found = made.compare(x, y, samples=[0, 7, 12])
    assert found.agrees
    assert found.samples == (0, 7, 12)
    assert found.parameter_share == 1.0

    def of_parameters(weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return (weight @ row).sin().sum()

    shared = shardmap.per_sample_grad(of_parameters)
    assert shared.compare(torch.randn(3, 4), x, samples=3).agrees
    for transform in (shardmap.jacobian, shardmap.jacrev, shardmap.jacfwd):
        assert transform(MODEL, chunk_size=3).compare(x, samples=range(13)).agrees
    assert shardmap.hessian(torch.logdet).compare(square @ square.mT + torch.eye(4)).agrees
    with pytest.raises(errors.OptionError, match=r"samples=0; pass a positive number"):
        shardmap.jacobian(MODEL).compare(x, samples=0)


def test_the_share_of_parameters_that_have_a_gradient() -> None:
    assert shardmap.compare(gradient)(x, y).parameter_share == 1.0

    def of_the_last_layer(row: torch.Tensor, label: torch.Tensor) -> Any:
        loss = nn.functional.cross_entropy(MODEL(row), label)
        return torch.autograd.grad(loss, tuple(MODEL[2].parameters()))

    found = shardmap.compare(of_the_last_layer)(x, y)
    total = sum(p.numel() for p in MODEL.parameters())
    assert found.parameter_share == pytest.approx(8 / total)
    assert "parameters with a gradient: 34.8%" in str(found)
    assert shardmap.compare(torch.sin)(x).parameter_share is None


def test_which_samples_are_compared() -> None:
    assert shardmap.compare(torch.sin)(x, samples=[12, 0, 7]).samples == (12, 0, 7)
    assert shardmap.compare(torch.sin)(x, samples=100).samples == tuple(range(13))
    assert shardmap.compare(torch.sin)(x[:1]).samples == (0,)


@torch.library.custom_op("shardmap_compare_test::twice", mutates_args=())
def twice(t: torch.Tensor) -> torch.Tensor:
    """An operator whose rule is wrong."""
    return t * 2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda t: t * 2.5, "shardmap_compare_test::twice"),
        (lambda t: t * 2 if t.shape[0] < 5 else t * 2.5, "the size of a chunk"),
    ],
)
def test_a_wrong_map_is_shown_with_the_operator(wrong: Any, named: str) -> None:
    shardmap.clear_caches()
    rules = dict(registry._rules)

    @shardmap.batching_rule(torch.ops.shardmap_compare_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(wrong, *args)

    try:
        function = lambda r: torch.ops.shardmap_compare_test.twice(r) + 1
        found = shardmap.compare(function, check="off")(x)
    finally:
        registry._rules.clear()
        registry._rules.update(rules)
        shardmap.clear_caches()
    assert not found.agrees
    assert named in (found.parted or "")
    assert "DIFFERS" in str(found)
    worst = found.outputs[0]
    assert worst.largest == pytest.approx(float(0.5 * x[list(found.samples)].abs().max()), rel=1e-4)


def test_a_function_that_is_run_sample_by_sample() -> None:
    with pytest.warns(shardmap.SlowLoopWarning):
        found = shardmap.compare(lambda r: r * float(repr(r[0])[7:-1]))(x)
    assert found.agrees
    assert found.tiers == {"the function itself": "loop"}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: shardmap.compare(torch.sin)(x[:0]), "the batch is empty"),
        (lambda: shardmap.compare(torch.sin)(x, samples=0), "samples=0"),
        (lambda: shardmap.compare(torch.sin)(x, samples=[13]), "samples from 0 to 12"),
        (
            lambda: shardmap.compare(nn.Dropout(), randomness="different")(x),
            "draws random numbers",
        ),
        (
            lambda: shardmap.vmap(lambda r: shardmap.compare(torch.sin)(r))(x),
            "compare the outermost call",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Any, text: str) -> None:
    with pytest.raises(errors.OptionError, match=text):
        call()


@pytest.mark.parametrize("name", confirmed.ROUNDED)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"]}], ids=str)
def test_rounding_is_no_difference(name: str, options: dict[str, Any]) -> None:
    function, batch = confirmed.ROUNDED[name]()
    found = shardmap.compare(function, **options)(batch, samples=range(len(batch)))
    assert found.agrees, str(found)
    assert found.parted is None


@pytest.mark.parametrize("error", [1e-2, 1.0])
def test_an_error_beyond_the_least_precise_dtype_is_one(error: float) -> None:
    """Weights of 1 and a softmax in float32 hide no error of a part in a hundred."""
    shardmap.clear_caches()
    rules = dict(registry._rules)

    @shardmap.batching_rule(torch.ops.shardmap_compare_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t: t * (2 + error), *args)

    def function(row: torch.Tensor) -> torch.Tensor:
        return torch.ops.shardmap_compare_test.twice(row.float().softmax(0).double())

    try:
        found = shardmap.compare(function, check="off")(x.double())
    finally:
        registry._rules.clear()
        registry._rules.update(rules)
        shardmap.clear_caches()
    assert not found.agrees


@pytest.mark.parametrize("first", [True, False])
def test_of_several_calls_of_an_operator_the_slowest_tier_is_shown(first: bool) -> None:
    """A rule that gives up for some calls leaves them to the loop, which must be seen."""
    shardmap.clear_caches()
    rules = dict(registry._rules)

    @shardmap.batching_rule(torch.ops.shardmap_compare_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        (value,) = args
        return b.call(lambda t: t * 2, value) if len(value.shape) == 1 else NotImplemented

    def function(row: torch.Tensor) -> torch.Tensor:
        twice = torch.ops.shardmap_compare_test.twice
        parts = [lambda: twice(row).sum(), lambda: twice(row[None]).sum()]
        return sum(part() for part in (parts if first else parts[::-1]))  # pyright: ignore

    try:
        with pytest.warns(shardmap.SlowLoopWarning):
            found = shardmap.compare(function)(x)
    finally:
        registry._rules.clear()
        registry._rules.update(rules)
        shardmap.clear_caches()
    assert found.agrees
    assert found.tiers["shardmap_compare_test::twice"] == "loop"


WRITES = {
    "sum": lambda r: r.mul_(3).sum(),
    "itself": lambda r: r.add_(1),
    "on a path": lambda r: r.mul_(2).sum() if r.sum() > 20 else r.sum() + 1,
    "bounded": lambda r: r.clamp_(max=1).sum(),
}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"trace": "each"}], ids=str)
@pytest.mark.parametrize("name", WRITES)
def test_a_function_that_writes_to_its_argument(name: str, options: dict[str, Any]) -> None:
    shardmap.clear_caches()
    for size in (7, 1, 7, 12):
        batch = torch.arange(5.0 * size).view(size, 5)
        assert shardmap.compare(WRITES[name], **options)(batch, samples=4).agrees
        assert torch.equal(batch, torch.arange(5.0 * size).view(size, 5))


UNEQUAL = torch.tensor([[1.0, -1, 2], [1, 1, -3], [-1, -2, 5], [1, 2, 3]])


@pytest.mark.parametrize("samples", [8, 3, 1, [0, 3], [3], [2, 0]], ids=str)
@pytest.mark.parametrize("ragged", ["list", "nested"])
def test_results_of_unequal_shapes(ragged: str, samples: Any) -> None:
    def positive(row: torch.Tensor) -> torch.Tensor:
        return row[row > 0]

    def several(row: torch.Tensor) -> dict[str, Any]:
        return {"all": [row.sin(), row[row > 0]], "less": row[row < 0].exp()}

    for function in (positive, several):
        found = shardmap.compare(function, ragged=ragged)(UNEQUAL, samples=samples)
        assert found.agrees
        assert len(found.outputs) == (1 if function is positive else 3)


def test_an_output_that_does_not_differ_by_sample() -> None:
    shared = torch.randn(3)

    def function(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return shared * 2, row.sin()

    for dims in ((None, 0), (None, -1), (0, 0), 0):
        for chunk_size in ("auto", 3):
            made = shardmap.compare(function, out_dims=dims, chunk_size=chunk_size)
            found = made(x, samples=[0, 5, 12])
            assert found.agrees
            assert len(found.outputs) == 2
    with pytest.raises(errors.OutDimsError, match="differs by sample"):
        shardmap.compare(function, out_dims=(0, None))(x)


@pytest.mark.parametrize("ragged", ["list", "nested"])
def test_a_plan_is_of_results_of_one_shape(ragged: str) -> None:
    def positive(row: torch.Tensor) -> torch.Tensor:
        return row[row > 0]

    with pytest.raises(errors.RaggedError, match="call the mapped function with ragged="):
        shardmap.plan(positive, ragged=ragged)(UNEQUAL).run()
    found = shardmap.vmap(positive, ragged=ragged)(UNEQUAL)
    for row, own in zip(UNEQUAL, found, strict=True):
        assert torch.equal(own, positive(row))
