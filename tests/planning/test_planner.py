"""Plans: memory predicted and solved for, batches cut among devices, budgets kept."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import shardmap
from shardmap import errors
from shardmap.lower import cache as engine
from shardmap.planning import split as splits
from shardmap.planning.cost import Learned
from shardmap.planning.memory import (
    GIB,
    KIB,
    MIB,
    NOTHING,
    Level,
    MemoryModel,
    envelope,
    format_bytes,
    parse_bytes,
)
from shardmap.planning.observe import Observation, OpCost
from shardmap.planning.split import Site, split
from shardmap.run import lanes
from shardmap.trace.recording import flat_tensors
from tests import oracle

QUICK = settings(deadline=None, max_examples=300)
counts = st.integers(0, 1 << 34)
levels = st.builds(Level, counts, st.integers(0, 1 << 26))
models = st.builds(
    MemoryModel,
    counts,
    st.lists(levels, min_size=1, max_size=5).map(envelope),
    st.one_of(st.just(1.0), st.floats(0.75, 4.0)),
)


@pytest.fixture(autouse=True)
def _nothing_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test teaches about a program is not for the next."""
    for name in ("_cache", "_notes", "_by_identity"):
        monkeypatch.setattr(engine, name, type(getattr(engine, name))())


def batch_of(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(
        dtype
    )


# ---------------------------------------------------------------------------------------------- the
# memory model


@QUICK
@given(models, counts, st.integers(0, 10**6))
def test_the_largest_chunk_is_the_inverse_of_the_chunks_bytes(
    model: MemoryModel, limit: int, most: int
) -> None:
    """It fits, and one sample more does not."""
    largest = model.largest_chunk(limit, most)
    assert 0 <= largest <= most
    if largest:
        assert model.chunk_bytes(largest) <= limit
    if largest < most:
        assert model.chunk_bytes(largest + 1) > limit


@QUICK
@given(models, st.integers(0, 10**6), st.integers(0, 10**3))
def test_more_samples_need_no_less(model: MemoryModel, samples: int, more: int) -> None:
    assert model.chunk_bytes(samples) <= model.chunk_bytes(samples + more)
    needed = model.resident_bytes + model.chunk_bytes(samples)
    assert model.peak_bytes(samples) == needed + min(32 << 20, needed // 25)
    assert model.chunk_bytes(0) == 0


@QUICK
@given(st.lists(levels, max_size=8), st.integers(0, 10**6))
def test_an_envelope_is_as_high_as_all_levels(given: list[Level], samples: int) -> None:
    """At every number of samples, with no level in it that is nowhere the highest."""
    found = envelope(given)
    assert max(v.at(samples) for v in found) == max((v.at(samples) for v in given), default=0)
    assert set(found) <= set(given) or not given
    assert [v.sample_bytes for v in found] == sorted({v.sample_bytes for v in found}, reverse=True)
    assert [v.fixed_bytes for v in found] == sorted({v.fixed_bytes for v in found})


def test_levels_are_lines() -> None:
    assert Level(3, 5).at(7) == 38
    assert Level(1, 2) + Level(10, 20) == Level(11, 22)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6GiB", 6 * GIB), ("512 MB", 512 * 10**6), ("1048576", 1 << 20), ("1e3", 1000), (" 2.5 "
            "gib ", int(2.5 * GIB)), ("1TiB", 1 << 40),
        ("3kb", 3000), ("3 KiB", 3 * KIB), ("7b", 7), ("0.5MiB", MIB // 2), ("1.5TB", 15 * 10**11),
    ],
)  # fmt: skip
def test_bytes_are_read_from_text(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "6 parsecs",
        "-1",
        "-1GiB",
        "0",
        "inf",
        "nan",
        "1e400",
        "6GiB GiB",
        "six",
        "0x10",
        "0.5",
        "6 Gi B",
    ],
)
def test_what_is_no_number_of_bytes(text: str) -> None:
    assert parse_bytes(text) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB, "1.0 MiB"),
        (int(9.1 * GIB), "9.1 GiB"),
        (5000 * GIB, "5000.0 GiB"),
    ],
)
def test_bytes_are_written_as_text(count: int, text: str) -> None:
    assert format_bytes(count) == text


@QUICK
@given(st.integers(1, 1 << 45))
def test_bytes_come_back_from_their_text(count: int) -> None:
    back = parse_bytes(format_bytes(count))
    assert back is not None
    assert abs(back - count) <= 0.051 * max(KIB, 1 << (count.bit_length() - 1) // 10 * 10)


# ---------------------------------------------------------------------------------------------- the
# split


def site(
    name: str,
    speed: float,
    budget: int | None = None,
    memory: MemoryModel = NOTHING,
    observed: bool = False,
) -> Site:
    """A device of a known speed, in samples per second."""
    seen = (
        Observation((Level(0, 0),), Level(0, 0), (OpCost("aten::add", 1, 1.0, 8.0),))
        if observed
        else None
    )
    return Site(
        name,
        memory,
        budget,
        Learned(seconds=1e9 / speed, samples=10**9),
        whole=False,
        observation=seen,
    )


@QUICK
@given(
    st.integers(0, 10**6),
    st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=9),
    st.sampled_from(["auto", None, 1, 3, 1000, {"cpu": 2}, {"cuda": 5}]),
    st.booleans(),
)
def test_shares_make_up_the_batch(
    samples: int, speeds: list[float], chunk_size: Any, uniform: bool
) -> None:
    """Their sum is the batch, none is negative, and a chunk has a sample at least."""
    cut = split(samples, [site(f"cuda:{i}", s) for i, s in enumerate(speeds)], chunk_size, uniform)
    rows = [lane.rows for lane in cut.lanes]
    assert sum(rows) == samples
    assert min(rows) >= 0
    assert all(lane.chunk >= 1 for lane in cut.lanes)
    assert all(lane.chunks == -(-lane.rows // lane.chunk) for lane in cut.lanes)
    if uniform:
        assert len({lane.chunk for lane in cut.lanes}) == 1
    for row, speed in zip(rows, speeds, strict=True):
        assert abs(row - samples * speed / sum(speeds)) <= len(speeds) + 1e-6 * samples


@pytest.mark.parametrize("samples", [0, 1, 3, 7, 8, 13, 101])
def test_equal_devices_take_equal_shares(samples: int) -> None:
    """To one sample, also where there are fewer samples than devices."""
    rows = [
        lane.rows
        for lane in split(samples, [site(f"cuda:{i}", 5.0) for i in range(8)], "auto").lanes
    ]
    assert sum(rows) == samples
    assert max(rows) - min(rows) <= 1


def test_a_faster_device_takes_more() -> None:
    rows = [
        lane.rows for lane in split(1000, [site("cuda:0", 1.0), site("cuda:1", 9.0)], "auto").lanes
    ]
    assert rows == [100, 900]


def test_sizes_by_device() -> None:
    """A device's own entry, else its kind's, else "auto"."""
    sites = [site(name, 1.0) for name in ("cuda:0", "cuda:1", "cpu")]
    sizes = [lane.chunk for lane in split(300, sites, {"cuda:1": 7, "cuda": 11, "cpu": None}).lanes]
    assert sizes == [11, 7, 100]
    assert [lane.name for lane in split(3, [site("cpu", 1.0)] * 3, None).lanes] == [
        "cpu#1",
        "cpu#2",
        "cpu#3",
    ]


@QUICK
@given(models, st.integers(1, 10**5), counts, st.sampled_from(["cpu", "cuda:0"]), st.integers(1, 3))
def test_auto_chunks_fit_the_budget_or_nothing_does(
    model: MemoryModel, samples: int, budget: int, name: str, devices: int
) -> None:
    cut = split(samples, [site(name, 1e6, budget, model, observed=True)] * devices, "auto")
    for lane in cut.lanes:
        assert lane.fits or lane.chunk == 1 or model.peak_bytes(1) > budget
        assert lane.fits == (lane.rows == 0 or lane.peak_bytes <= budget)
    assert (cut.refusal() is None) == cut.fits == all(lane.fits for lane in cut.lanes)


def test_chunks_are_no_larger_than_what_memory_ran_out_with() -> None:
    learned = Learned(seconds=1.0, samples=1000, ceiling=5)
    lane = split(
        100, [Site("cpu", NOTHING, None, learned, whole=False, observation=None)], "auto"
    ).lanes[0]
    assert lane.chunk == 5


# ----------------------------------------------------------------------------------------------
# predictions


def levels_of(function: Callable[..., Any], *batch: torch.Tensor, **options: Any) -> MemoryModel:
    return shardmap.plan(function, **options)(*batch).lanes[0].memory


def test_the_levels_of_a_chain_are_those_counted_by_hand() -> None:
    """sin makes 8,000 bytes a sample, cos 8,000 more, then sin's die.

    The sum goes to its place, 8 bytes of the result.
    """
    for samples in (3, 7, 13):
        model = levels_of(lambda x: x.sin().cos().sum(), batch_of(samples, 1000))
        assert model.chunk == (Level(0, 16_000),)
        assert model.resident_bytes == 8 * samples
        assert model.chunk_bytes(5) == 80_000


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
    assert 13 * 8000 <= kept.resident_bytes <= 13 * 24_100
    assert again.resident_bytes <= 13 * 16
    assert again.chunk_bytes(3) >= 3 * 8000


class Peak(TorchDispatchMode):
    """The most bytes that operators had made and not freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata for t in flat_tensors((*args, *(kwargs or {}).values()))
        }
        out = func(*args, **(kwargs or {}))
        for t in flat_tensors(out if isinstance(out, tuple | list) else (out,)):
            storage = t.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


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
        calls.append(x)
        return x.sin().sum()

    batch = batch_of(101, 7)
    before = batch.clone()
    plan = shardmap.plan(function, chunk_size=10)(batch)
    assert len(calls) == 1
    assert calls[0].shape == (7,)
    assert "101 samples" in str(plan)
    assert plan.explain()
    assert not computed
    assert torch.equal(batch, before)
    oracle.assert_same(plan.run(), batch.sin().sum(1), "output")
    assert len(calls) == 1
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
        {}, {"chunk_size": 4}, {"chunk_size": None}, {"devices": ["cpu"] * 3}, {"reduce": "mean"}, {"out_dims": -1},
        {"memory_budget": "1GiB"},
        {"remat": True}, {"trace": "once"}, {"chunk_size": {"cpu": 3}}, {"reduce": (torch.add, None), "chunk_size": 2},
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


# ----------------------------------------------------------------------------------------------
# budgets


def outer(x: torch.Tensor) -> torch.Tensor:
    return x.outer(x).sin().sum(0)


@pytest.mark.parametrize("budget", ["300KiB", "1MiB", "3MiB", "40MiB"])
@pytest.mark.parametrize("devices", ["cpu", ["cpu", "cpu"]])
def test_chunks_respect_the_budget(budget: str, devices: Any) -> None:
    """Predicted and measured; with more memory, chunks are no smaller."""
    batch = batch_of(101, 100)
    limit = parse_bytes(budget)
    assert limit is not None
    plan = shardmap.plan(outer, memory_budget=budget, devices=devices)(batch)
    assert plan.fits
    for lane in plan.lanes:
        assert lane.budget_bytes == limit
        assert lane.peak_bytes <= limit
    plan.run()
    with Peak() as measured:
        got = plan.run()
    assert measured.peak <= limit + 4096
    oracle.assert_same(got, oracle.loop(outer)(batch), "output")


def test_more_memory_gives_chunks_that_are_no_smaller() -> None:
    batch = batch_of(101, 100)
    sizes = [
        shardmap.plan(outer, memory_budget=b)(batch).lanes[0].chunk
        for b in ("300KiB", "500KiB", "1MiB", "2MiB")
    ]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2


@pytest.mark.parametrize("chunk_size", [50, None])
@pytest.mark.parametrize("size", [100, 400])
def test_a_chunk_over_the_budget_is_refused(
    chunk_size: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vmap and by plan.run(), before anything is computed: with the numbers and the remedy.

    The plan itself is returned, marked.
    """
    computed: list[Any] = []
    monkeypatch.setattr(lanes.Lane, "compute", lambda self, ready, chunk: computed.append(chunk))
    batch = batch_of(101, size)
    budget = 8 * size * size * 8
    options = {"chunk_size": chunk_size, "memory_budget": budget}
    plan = shardmap.plan(outer, **options)(batch)
    assert not plan.fits
    assert "OVER BUDGET" in str(plan)
    assert "over budget" in repr(plan)
    texts = []
    for call in (lambda: shardmap.vmap(outer, **options)(batch), plan.run):
        with pytest.raises(errors.OverBudget) as caught:
            call()
        texts.append(str(caught.value))
        assert isinstance(caught.value, MemoryError)
    assert texts[0].startswith(
        f"shardmap.vmap(outer, in_dims=0): a chunk of {plan.lanes[0].chunk} needs "
    )
    assert texts[1].startswith("shardmap.plan(outer, in_dims=0): ")
    largest = plan.lanes[0].memory.largest_chunk(budget - plan.lanes[0].memory.resident_bytes, 101)
    for text in texts:
        assert f"budget {format_bytes(budget)}" in text
        assert format_bytes(plan.lanes[0].peak_bytes) in text
        assert text.endswith(f"pass chunk_size='auto', or at most {largest}")
    assert 0 < largest < 50
    assert not computed
    monkeypatch.undo()
    assert shardmap.vmap(outer, chunk_size=largest, memory_budget=budget)(batch).shape == (
        101,
        size,
    )
    with pytest.raises(errors.OverBudget):
        shardmap.vmap(outer, chunk_size=largest + 1, memory_budget=budget)(batch)


@pytest.mark.parametrize("samples", [7, 101])
def test_not_even_one_sample_within_the_budget(samples: int) -> None:
    """Also where the map is small."""
    batch = batch_of(samples, 100)
    with pytest.raises(
        errors.OverBudget,
        match=r"not even one sample fits: allow more with memory_budget=, or use a device",
    ):
        shardmap.vmap(outer, memory_budget="20KiB")(batch)


def test_a_result_over_the_budget() -> None:
    """What stays is the problem, not the chunk; reduced it fits."""
    batch = batch_of(1009, 100)
    with pytest.raises(
        errors.OverBudget,
        match=r"what stays during the whole run does not fit: keep less of the result with reduce=",
    ):
        shardmap.vmap(outer, memory_budget="400KiB")(batch)
    assert shardmap.vmap(outer, memory_budget="400KiB", reduce="sum")(batch).shape == (100,)


def test_a_fraction_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is the budget where none is given."""
    monkeypatch.setattr(splits.devices, "free_bytes", lambda device: 1_000_000)
    plan = shardmap.plan(outer, memory_fraction=0.5)(batch_of(101, 100))
    assert plan.lanes[0].budget_bytes == 500_000
    assert plan.lanes[0].peak_bytes <= 500_000
    assert math.isfinite(plan.seconds)
