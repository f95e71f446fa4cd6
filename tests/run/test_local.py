"""The local executor equals the loop, whatever the devices, the chunks and the dimensions.

Values, dtypes, layout and gradients.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings

import shardmap
from shardmap.run.base import ChunkDone, RunStarted, listen
from tests import oracle
from tests.run.subjects import CHUNKS, DEVICES, SUBJECTS, calls, setting, values

PATIENT = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))


@PATIENT
@given(calls())
def test_a_map_equals_the_loop(call: dict[str, Any]) -> None:
    """Values, dtypes, structure, memory of its own, and contiguous as torch.stack makes it."""
    verdict = oracle.compare(
        setting(call, False), shardmap.vmap, oracle.Checks(gradient=False, refusals=())
    )
    assert verdict.kind == "right", verdict.detail
    built = setting(call, False)()
    assert all(t.is_contiguous() for t in torch.utils._pytree.tree_leaves(built.run(shardmap.vmap)))


@PATIENT
@given(calls(gradients=True))
def test_gradients_from_outside_equal_the_loops(call: dict[str, Any]) -> None:
    """The first and the second order, kept or computed again in backward."""
    second = SUBJECTS[call["name"]].order > 1
    checks = oracle.Checks(second_order=second, refusals=(), precision=call["dtype"])
    verdict = oracle.compare(setting(call, True), shardmap.vmap, checks)
    assert verdict.kind == "right", verdict.detail


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize(
    "name", ["captured_weight", "gradient_inside", "conv_weight_gradient", "unchanged_by_samples"]
)
def test_twice_differentiated_through_recomputed_chunks(name: str, chunk_size: Any) -> None:
    call = {
        "name": name, "dtype": torch.float64, "samples": 7, "in_dims": (0,) *
        len(SUBJECTS[name].shapes), "out_dim": 0, "devices": "auto", "chunk_size": chunk_size,
        "output_device": None, "remat": True, "trace": "each",
    }  # fmt: skip
    verdict = oracle.compare(
        setting(call, True), shardmap.vmap, oracle.Checks(second_order=True, refusals=())
    )
    assert (verdict.kind, verdict.gradient) == ("right", "second"), verdict.detail


# ----------------------------------------------------------------------------------------------
# writes


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("samples", [1, 13])
def test_a_write_to_an_input_reaches_the_caller_once(
    devices: Any, chunk_size: Any, in_dim: int, samples: int
) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        before = x.clone()
        x[1:].mul_(3)
        x.add_(1)
        return before - x

    shape = (samples, 4) if in_dim == 0 else (4, samples)
    batch, expected = values(1, *shape, dtype=torch.float64), values(1, *shape, dtype=torch.float64)
    got = shardmap.vmap(function, in_dim, devices=devices, chunk_size=chunk_size)(batch)
    want = oracle.loop(function, in_dim)(expected)
    oracle.assert_same(got, want, "output")
    oracle.assert_same(batch, expected, "the caller's batch")


@pytest.mark.parametrize("chunk_size", ["auto", None, 1, 5])
def test_a_write_to_a_large_input_reaches_the_caller_once(chunk_size: Any) -> None:
    """Large enough to be watched before it runs: trying a chunk out must not write."""
    batch = values(1, 13, 200_000, dtype=torch.float32)
    expected = batch.clone()
    got = shardmap.vmap(lambda x: x.mul_(2).sum(), chunk_size=chunk_size)(batch)
    want = oracle.loop(lambda x: x.mul_(2).sum())(expected)
    oracle.assert_same(batch, expected, "the caller's batch")
    oracle.assert_same(got, want, "output", slack=want + 1e-2)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_a_write_that_outer_autograd_records_reaches_the_caller_once(chunk_size: Any) -> None:
    def build() -> oracle.Setting:
        leaf = values(1, 7, 3, dtype=torch.float64).requires_grad_()

        def run(vmap: oracle.Subject) -> Any:
            batch = leaf * 1
            out = vmap(lambda x: x.mul_(x.detach()).sum(), chunk_size=chunk_size)(batch)
            return out, batch * 2

        return oracle.Setting(run, [leaf])

    verdict = oracle.compare(build, shardmap.vmap, oracle.Checks(second_order=True, refusals=()))
    assert verdict.kind == "right", verdict.detail


# ----------------------------------------------------------------------------------------------
# large results

LARGE = {
    "elementwise": lambda x: x * 2 + 1,
    "transposed": lambda x: (x + x).t(),
    "outer": lambda x: x[0].outer(x[1])[:300],
    "input": lambda x: x,
    "zeros": lambda x: torch.zeros(300, 400, dtype=x.dtype).index_add_(0, torch.arange(300), x),
    "pair": lambda x: (x[1:], x * 2),
    "view of another": lambda x: (lambda y: (y, y.t(), y[0]))(x * 3),
}


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.bool],
)
@pytest.mark.parametrize("function", LARGE)
@pytest.mark.parametrize(
    ("chunk_size", "out_dim", "devices"),
    [("auto", 0, "cpu"), (None, 1, "cpu"), (5, -1, "auto"), (3, 0, ["cpu"] * 3)],
)
def test_results_on_huge_pages(
    dtype: torch.dtype, function: str, chunk_size: Any, out_dim: int, devices: Any
) -> None:
    """Results of more than 4 MiB have memory of another kind, and the same values, dtype and
    layout."""
    samples = {8: 7, 4: 11, 2: 19, 1: 37}[dtype.itemsize]
    batch = values(1, samples, 300, 400, dtype=dtype)
    mapped = LARGE[function]
    if dtype == torch.bool and function in ("elementwise", "pair", "view of another", "outer"):
        mapped = LARGE["input"]
    got = shardmap.vmap(mapped, 0, out_dim, chunk_size=chunk_size, devices=devices)(batch)
    want = oracle.loop(mapped, 0, out_dim)(batch)
    for i, (g, w) in enumerate(
        zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True)
    ):
        oracle.assert_same(g, w, f"output {i}")
        assert g.is_contiguous()
        assert g.data_ptr() % g.element_size() == 0


def test_a_large_result_is_freed_with_its_last_reference() -> None:
    result = shardmap.vmap(lambda x: x * 2, chunk_size=3)(
        values(1, 11, 300, 400, dtype=torch.float32)
    )
    seen = weakref.ref(result)
    storage = weakref.ref(result.untyped_storage())
    del result
    gc.collect()
    assert seen() is None
    assert storage() is None


# ----------------------------------------------------------------------------------------------
# draws


def gradient_of_dropout(x: torch.Tensor) -> torch.Tensor:
    """The gradient of a random loss: both passes use one draw."""
    return torch.autograd.grad(F.dropout(x.square(), 0.5).sum(), x)[0]


DRAWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "normal": lambda x: torch.randn(3, dtype=x.dtype) + x.sum(),
    "uniform and integers": lambda x: (torch.rand_like(x), torch.randint(0, 100, (5,))),
    "permutation": lambda x: x[torch.randperm(5)],
    "bernoulli in place": lambda x: torch.empty(4).bernoulli_(0.5) * x.sum(),
    "gradient": lambda x: gradient_of_dropout(x.detach().requires_grad_()),
    "matmul": lambda x: torch.randn(5, 5, dtype=x.dtype) @ x,
}


@pytest.mark.parametrize("reduce", [None, "max"])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_do_not_depend_on_how_the_map_is_computed(name: str, reduce: Any) -> None:
    """Bit for bit the same for any chunks, devices and lanes of any speed."""
    batch = values(1, 13, 5, dtype=torch.float32)
    results = []
    for devices in DEVICES:
        for chunk_size in CHUNKS:
            torch.manual_seed(5)
            mapped = shardmap.vmap(
                DRAWS[name],
                randomness="different",
                devices=devices,
                chunk_size=chunk_size,
                reduce=reduce,
            )
            results.append(torch.utils._pytree.tree_leaves(mapped(batch)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    if reduce is None:
        assert all((t[0] != t[1]).any() for t in results[0]), "samples draw numbers of their own"


def test_one_call_draws_one_seed_whatever_its_chunks() -> None:
    """Draws after the map do not depend on how it was computed."""
    after = set()
    for chunk_size in CHUNKS:
        torch.manual_seed(5)
        shardmap.vmap(torch.rand_like, randomness="different", chunk_size=chunk_size)(
            torch.ones(7, 2)
        )
        after.add(float(torch.rand(())))
    assert len(after) == 1


# ----------------------------------------------------------------------------------------------
# events


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("samples", [0, 1, 13])
def test_every_sample_is_computed_once(devices: Any, chunk_size: Any, samples: int) -> None:
    """Chunks partition the batch, none larger than requested."""
    events: list[Any] = []
    with listen(events.append):
        shardmap.vmap(torch.sin, devices=devices, chunk_size=chunk_size)(torch.zeros(samples))
    done = [e for e in events if isinstance(e, ChunkDone)]
    assert sorted(i for e in done for i in range(e.start, e.stop)) == list(range(samples))
    most = {"cpu": 2}["cpu"] if isinstance(chunk_size, dict) else chunk_size
    if isinstance(most, int):
        assert max(e.stop - e.start for e in done) <= most
    assert [e.samples for e in events if isinstance(e, RunStarted)] == [samples]


def test_a_large_map_inside_another_is_part_of_it() -> None:
    """It is not planned.

    The memory that planning looks at is not there while the outer function is recorded.
    """
    table = torch.randn(700, 1100)  # its recording exceeds what is worth planning

    def outer(x: torch.Tensor) -> torch.Tensor:
        return shardmap.vmap(lambda row: (row * x).sin().exp())(table).sum(0)

    x = torch.randn(3, 1100)
    found = shardmap.vmap(outer)(x)
    expected = torch.stack([(table * row).sin().exp().sum(0) for row in x])
    torch.testing.assert_close(found, expected)
