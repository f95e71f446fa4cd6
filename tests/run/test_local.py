"""The local executor equals the loop, whatever the devices, the chunks and the dimensions.

Values, dtypes, layout and gradients.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardmap
from shardmap.run.base import ChunkDone, RunStarted, listen
from tests import oracle

FLOATS = (torch.float64, torch.float32, torch.bfloat16)
SIZES = (0, 1, 2, 3, 7, 13)
DEVICES: tuple[Any, ...] = ("auto", "cpu", ["cpu", "cpu"], ["cpu"] * 3)
CHUNKS: tuple[Any, ...] = ("auto", None, 1, 2, 5, 1000, {"cpu": 2})


def values(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Different values everywhere, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 5, shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class Subject:
    """A function of one sample, and what it takes."""

    make: Callable[[torch.dtype], tuple[Callable[..., Any], list[torch.Tensor]]]
    """For a dtype: the function, and the tensors that it captures."""
    shapes: tuple[tuple[int, ...], ...]
    """One sample of each argument."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    argument: torch.dtype | None = None
    """Of the arguments, if not the dtype."""
    outputs: int = 1
    order: int = 2
    """How often it can be differentiated."""


SUBJECTS: dict[str, Subject] = {}


def differentiable(t: torch.Tensor) -> torch.Tensor:
    """`t`, or where nobody outside asks for its gradient, a leaf of the function's own."""
    return t if t.requires_grad else t.detach().requires_grad_()


def subject(*shapes: tuple[int, ...], **how: Any) -> Callable[[Any], Any]:
    """Register a subject under its maker's name."""

    def register(make: Any) -> Any:
        SUBJECTS[make.__name__] = Subject(make, shapes, **how)
        return make

    return register


@subject((4,), dtypes=(*FLOATS, torch.complex64))
def elementwise(dtype: torch.dtype) -> Any:
    return lambda x: (x * 2 + 1) * x, []


@subject((4,), dtypes=(torch.int64, torch.int32, torch.bool))
def whole_numbers(dtype: torch.dtype) -> Any:
    return lambda x: x.flip(0) | x, []


@subject((3, 2), dtypes=(*FLOATS, torch.complex64))
def captured_weight(dtype: torch.dtype) -> Any:
    w = values(1, 2, 5, dtype=dtype)
    return lambda x: (x @ w) @ w.t(), [w]


@subject((3,), (3,))
def gradient_inside(dtype: torch.dtype) -> Any:
    w = values(2, 3, 2, dtype=dtype)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = differentiable(x)
        loss = ((x @ w).sin() * (y @ w)).sum()
        return torch.autograd.grad(loss, x, create_graph=w.requires_grad)[0]

    return function, [w]


@subject((4,), (4,), outputs=3)
def tree_of_outputs(dtype: torch.dtype) -> Any:
    return lambda x, y: {"a": (x + y, x.dot(y)), "b": [y.outer(x)]}, []


@subject((2, 3), outputs=2)
def unchanged_by_samples(dtype: torch.dtype) -> Any:
    w = values(3, 3, 2, dtype=dtype)
    return lambda x: (w.exp() * 2, x @ w), [w]


@subject((2, 3), dtypes=(*FLOATS, torch.complex64, torch.int64))
def transposed(dtype: torch.dtype) -> Any:
    return lambda x: (x * 2).t(), []


@subject((2, 3), outputs=3, dtypes=(*FLOATS, torch.int64, torch.bool))
def an_input_itself(dtype: torch.dtype) -> Any:
    return lambda x: (x, x.t(), x[0]), []


@subject((3,))
def in_place_on_fresh(dtype: torch.dtype) -> Any:
    def function(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(2, 3, dtype=dtype)
        out[0] = x * 3
        out[1].add_(x.sin())
        return out.mul_(2)

    return function, []


@subject((3,), outputs=3)
def one_memory_three_outputs(dtype: torch.dtype) -> Any:
    def function(x: torch.Tensor) -> Any:
        y = x * 2
        return y, y.view(3, 1), y

    return function, []


@subject((3,), outputs=2)
def written_after_it_was_viewed(dtype: torch.dtype) -> Any:
    def function(x: torch.Tensor) -> Any:
        y = x * 2
        z = y[1:]
        y.add_(1)
        return z, y

    return function, []


@subject((4,), argument=torch.int64, dtypes=(torch.float64, torch.float32), order=1)
def embedding_gradient(dtype: torch.dtype) -> Any:
    table = values(4, 5, 3, dtype=dtype)
    weights = values(5, 4, 3, dtype=dtype)

    def function(index: torch.Tensor) -> torch.Tensor:
        rows = differentiable(table)
        loss = (F.embedding(index, rows) * weights).square().sum()
        return torch.autograd.grad(loss, rows, create_graph=table.requires_grad)[0]

    return function, [table]


@subject((2, 5, 5), dtypes=(torch.float64, torch.float32))
def conv_weight_gradient(dtype: torch.dtype) -> Any:
    weight = values(6, 3, 2, 3, 3, dtype=dtype)

    def function(x: torch.Tensor) -> torch.Tensor:
        kernel = differentiable(weight)
        loss = F.conv2d(x[None], kernel, padding=1).square().sum()
        return torch.autograd.grad(loss, kernel, create_graph=weight.requires_grad)[0]

    return function, [weight]


@subject((1, 2, 5, 5), (3, 2, 3, 3), dtypes=(torch.float64, torch.float32))
def conv_of_mapped_weights(dtype: torch.dtype) -> Any:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inside = differentiable(x)
        loss = F.conv2d(inside, weight, padding=1).square().sum()
        return torch.autograd.grad(loss, inside, create_graph=x.requires_grad)[0]

    return function, []


@subject((), dtypes=(*FLOATS, torch.int64))
def of_no_dimensions(dtype: torch.dtype) -> Any:
    return lambda x: x * 3 + x, []


@subject((0, 3), (2,), outputs=2)
def empty_samples(dtype: torch.dtype) -> Any:
    return lambda x, y: (x * 2, x.sum(0)), []


@st.composite
def calls(draw: Any, gradients: bool = False) -> dict[str, Any]:
    """A call: what is mapped, over what, and how it is computed."""
    name = draw(
        st.sampled_from(
            [n for n, s in SUBJECTS.items() if not gradients or any(map(differentiates, s.dtypes))]
        )
    )
    what = SUBJECTS[name]
    dtype = draw(st.sampled_from([d for d in what.dtypes if not gradients or differentiates(d)]))
    return {
        "name": name,
        "dtype": dtype,
        "samples": draw(st.sampled_from(SIZES)),
        "in_dims": tuple(draw(st.integers(-len(s) - 1, len(s))) for s in what.shapes),
        "out_dim": draw(st.sampled_from([0, 0, 0, -1])),
        "devices": draw(st.sampled_from(DEVICES)),
        "chunk_size": draw(st.sampled_from(CHUNKS)),
        "output_device": draw(st.sampled_from([None, "cpu"])),
        "remat": draw(st.booleans()) if gradients else False,
        "trace": draw(st.sampled_from(["each", "once"])),
    }


def differentiates(dtype: torch.dtype) -> bool:
    """Whether tensors of that dtype have gradients."""
    return dtype.is_floating_point or dtype.is_complex


def setting(call: dict[str, Any], grad: bool) -> Callable[[], oracle.Setting]:
    """The call, made afresh."""
    what = SUBJECTS[call["name"]]
    dtype = what.argument or call["dtype"]

    def build() -> oracle.Setting:
        function, captured = what.make(call["dtype"])
        inputs = []
        for i, (shape, d) in enumerate(zip(what.shapes, call["in_dims"], strict=True)):
            full = list(shape)
            full.insert(d if d >= 0 else len(full) + 1 + d, call["samples"])
            inputs.append(
                values(10 + i, *full, dtype=dtype).requires_grad_(grad and differentiates(dtype))
            )
        captured = [t.requires_grad_(grad and differentiates(t.dtype)) for t in captured]
        options = {k: call[k] for k in ("devices", "chunk_size", "output_device", "remat", "trace")}

        def run(vmap: oracle.Subject) -> Any:
            return vmap(function, call["in_dims"], call["out_dim"], **options)(*inputs)

        return oracle.Setting(run, inputs, captured)

    return build


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
        "name": name, "dtype": torch.float64, "samples": 7, "in_dims": (0,) * len(SUBJECTS[name].shapes), "out_dim": 0, "devices": "auto",
        "chunk_size": chunk_size, "output_device": None, "remat": True, "trace": "each",
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
    """Results of more than 4 MiB have memory of another kind, and the same values, dtype and layout."""
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
    """What is drawn after the map does not depend on how it was computed."""
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
    """Chunks partition the batch, none larger than was asked for."""
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
