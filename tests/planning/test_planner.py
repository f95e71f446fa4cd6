"""Plans: memory predicted and measured, and plans that run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.planning.memory import (
    Level,
    MemoryModel,
)
from shardmap.run import lanes
from tests import oracle
from tests.planning.common import Peak, batch_of

# ----------------------------------------------------------------------------------------------
# predictions


def levels_of(function: Callable[..., Any], *batch: torch.Tensor, **options: Any) -> MemoryModel:
    return shardmap.plan(function, **options)(*batch).lanes[0].memory


def test_the_levels_of_a_chain_are_those_counted_by_hand() -> None:
    """sin makes 8,000 bytes a sample, and cos writes over them, as nothing else reads them.

    The sum goes to its place, 8 bytes of the result.
    """
    for samples in (3, 7, 13):
        model = levels_of(lambda x: x.sin().cos().sum(), batch_of(samples, 1000))
        assert model.chunk == (Level(0, 8_000),)
        assert model.resident_bytes == 8 * samples
        assert model.chunk_bytes(5) == 40_000


def test_what_no_sample_changes_is_there_during_the_run() -> None:
    """exp of the weight: 24,000 bytes once; the product goes to its place."""
    weight = batch_of(1000, 3)
    model = levels_of(lambda x: x @ weight.exp(), batch_of(7, 1000))
    assert model.resident_bytes == 24_000 + 7 * 24
    assert max(level.at(7) for level in model.chunk) <= 7 * 24


def test_a_reduction_needs_no_memory_for_the_batch() -> None:
    small, large = (levels_of(torch.exp, batch_of(n, 1000), reduce="sum") for n in (7, 101))
    assert small.resident_bytes == large.resident_bytes
    assert small.resident_bytes <= 3 * 8000
    assert small.chunk_bytes(5) == large.chunk_bytes(5) >= 40_000


def test_what_autograd_saves_stays_and_remat_avoids_it() -> None:
    """Two saved results of 8,000 bytes for each sample.

    Computed again in backward they are a chunk's.
    """
    batch = batch_of(13, 1000).requires_grad_()
    kept, again = (levels_of(lambda x: x.sin().exp().sum(), batch, remat=r) for r in (False, True))
    gradient = 2 * 13 * 8000  # of the batch, and of one chunk filled up with zeros
    assert 13 * 8000 <= kept.resident_bytes - gradient <= 13 * 24_100
    assert again.resident_bytes - gradient <= 13 * 16
    assert again.chunk_bytes(3) >= 3 * 8000


def per_sample_gradient(x: torch.Tensor) -> Any:
    weight = WEIGHT.detach().requires_grad_()
    return torch.autograd.grad((x @ weight).tanh().square().sum(), weight)[0]


WEIGHT = batch_of(200, 100)
MEASURED: dict[str, Callable[[torch.Tensor], Any]] = {
    "chain": lambda x: x.sin().cos().exp().sum(),
    "wide in the middle": lambda x: (x.outer(x).sin() + 1).sum(0),
    "per-sample gradient": per_sample_gradient,
    "several outputs": lambda x: (x.outer(x), x.sin(), WEIGHT.exp() @ x[:100]),
    "transposed": lambda x: x.outer(x.cos()).t(),
    "half": lambda x: x.half().outer(x.half()).float().sum(1),
    "in place": lambda x: (
        torch.zeros(200, 200, dtype=x.dtype).index_put_((torch.arange(200),), x.outer(x)).mul_(2)
    ),
    "softmax": lambda x: x.outer(x).softmax(-1) @ x,
}


@pytest.mark.parametrize("reduce", [None, "sum", (torch.add, None)])
@pytest.mark.parametrize("chunk_size", [1, 5, "auto", None])
@pytest.mark.parametrize("name", MEASURED)
def test_the_measured_peak_is_within_the_predicted(name: str, chunk_size: Any, reduce: Any) -> None:
    """And the prediction is not far above what is measured: an upper bound that means something."""
    batch = batch_of(37, 200)
    plan = shardmap.plan(MEASURED[name], chunk_size=chunk_size, reduce=reduce)(batch)
    plan.run()  # checked, compiled
    with Peak() as measured:
        out = plan.run()
    predicted = plan.lanes[0].peak_bytes
    slack = 4096  # scalars, indices, empties
    assert measured.peak <= predicted + slack, f"{measured.peak} measured, {predicted} predicted"
    # A total that one chunk gives needs no more memory; where there might be several, the bound
    # holds one beside the last chunk's.
    totals = 2 * out.nbytes if reduce is not None and isinstance(out, torch.Tensor) else 0
    assert predicted <= 2.5 * measured.peak + totals + 16 * 1024
    del out


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("chunk_size", [5, None])
def test_the_measured_peak_with_autograd_is_within_the_predicted(
    remat: bool, chunk_size: Any
) -> None:
    batch = batch_of(37, 200).requires_grad_()
    plan = shardmap.plan(
        lambda x: (x.outer(x).sin().exp() @ WEIGHT).sum(), chunk_size=chunk_size, remat=remat
    )(batch)
    plan.run()
    with Peak() as measured:
        out = plan.run()
    assert measured.peak <= plan.lanes[0].peak_bytes + 4096
    del out


# ----------------------------------------------------------------------------------------------
# plans


def test_a_plan_does_not_run_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function runs once, on one sample; no chunk is computed.

    Printing and explaining run nothing either.
    """
    calls: list[torch.Tensor] = []
    computed: list[Any] = []
    original = lanes.Lane.compute
    monkeypatch.setattr(
        lanes.Lane,
        "compute",
        lambda self, ready, chunk: computed.append(chunk) or original(self, ready, chunk),
    )

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return x.sin().sum()

    batch = batch_of(101, 7)
    before = batch.clone()
    plan = shardmap.plan(function, chunk_size=10)(batch)
    assert len(calls) == 2, "the first and the last sample"
    assert calls[0] == (7,)
    assert "101 samples" in str(plan)
    assert plan.explain()
    assert not computed
    assert torch.equal(batch, before)
    oracle.assert_same(plan.run(), batch.sin().sum(1), "output")
    assert len(calls) == 2
    assert sum(c.size for c in computed) == 101


def test_a_plan_of_writes_does_not_write() -> None:
    batch = batch_of(13, 3)
    expected = batch.clone()
    plan = shardmap.plan(lambda x: x.mul_(2).sum(), chunk_size=4)(batch)
    assert torch.equal(batch, expected)
    got = plan.run()
    want = oracle.loop(lambda x: x.mul_(2).sum())(expected)
    oracle.assert_same(got, want, "output")
    oracle.assert_same(batch, expected, "the batch")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 4},
        {"chunk_size": None},
        {"devices": ["cpu"] * 3},
        {"reduce": "mean"},
        {"out_dims": -1},
        {"memory_budget": "1GiB"},
        {"remat": True},
        {"trace": "once"},
        {"chunk_size": {"cpu": 3}},
        {"reduce": (torch.add, None), "chunk_size": 2},
    ],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
@pytest.mark.parametrize("samples", [0, 1, 3, 13])
@pytest.mark.parametrize("grad", [False, True])
def test_a_plan_run_equals_the_map(options: dict[str, Any], samples: int, grad: bool) -> None:
    """Twice, and with gradients."""
    batch = batch_of(samples, 3).requires_grad_(grad)
    if samples == 0 and isinstance(options.get("reduce"), tuple):
        with pytest.raises(errors.EmptyBatchError):
            shardmap.plan(lambda x: x.sin() * x, **options)(batch)
        return
    plan = shardmap.plan(lambda x: x.sin() * x, **options)(batch)
    want = shardmap.vmap(lambda x: x.sin() * x, **options)(batch)
    assert plan.samples == samples
    assert sum(lane.rows for lane in plan.lanes) == samples
    for _ in range(2):
        got = plan.run()
        oracle.assert_same(got, want, "output")
        assert got.requires_grad == want.requires_grad
        if grad and want.requires_grad:
            oracle.assert_same(
                *(torch.autograd.grad(t.sum(), batch, retain_graph=True)[0] for t in (got, want)),
                "gradient",
            )


def test_a_plan_that_draws_runs_with_the_seed_that_it_drew() -> None:
    batch = batch_of(13, 3)
    torch.manual_seed(3)
    want = shardmap.vmap(torch.rand_like, randomness="different")(batch)
    torch.manual_seed(3)
    plan = shardmap.plan(torch.rand_like, randomness="different", chunk_size=4)(batch)
    torch.rand(5)
    assert torch.equal(plan.run(), want)
