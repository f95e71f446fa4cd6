"""The loop over the samples of one operator: it gives what the plain loop gives, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.rules import operator_loop, registry

pytestmark = pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
SIZES = (0, 1, 3, 7)


@torch.library.custom_op("looptest::scaled", mutates_args=())
def scaled(x: torch.Tensor, y: torch.Tensor, by: float) -> torch.Tensor:
    return x * by + y


@torch.library.custom_op("looptest::several", mutates_args=())
def several(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x * 2, (x > 0).sum(), x[..., :1].to(torch.float64)


@torch.library.custom_op("looptest::listed", mutates_args=())
def listed(x: torch.Tensor, parts: int) -> list[torch.Tensor]:
    return [x + i for i in range(parts)]


@torch.library.custom_op("looptest::write", mutates_args=("x",))
def write(x: torch.Tensor, by: torch.Tensor) -> None:
    x.mul_(by)


@torch.library.custom_op("looptest::write_and_return", mutates_args=("x",))
def write_and_return(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x.sum()


@torch.library.custom_op("looptest::positive", mutates_args=())
def positive(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


@torch.library.custom_op("looptest::kind", mutates_args=())
def kind(x: torch.Tensor) -> torch.Tensor:
    return x.clone() if x.sum() > 0 else x.to(torch.float64)


@torch.library.custom_op("looptest::cubed", mutates_args=())
def cubed(x: torch.Tensor) -> torch.Tensor:
    return x**3


def _keep(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _cubed_backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    (x,) = ctx.saved_tensors
    return grad * x * x * 3


cubed.register_autograd(_cubed_backward, setup_context=_keep)


def written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    own = x.clone()
    write(own, y)
    return own


def written_and_returned(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    own = x.clone() + y
    total = write_and_return(own[1:])
    return own, total


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "one": lambda x, y: scaled(x, y, 0.5),
    "several of unequal dtypes": lambda x, y: several(x + y),
    "one of several": lambda x, y: several(x + y)[1],
    "a list": lambda x, y: tuple(listed(x * y, 3)),
    "written": written,
    "written and returned": written_and_returned,
    "a number": lambda x, y: several(x)[1] * 2,
    "an operator of torch": lambda x, y: torch.histc(x + y, 5, -3.0, 3.0),
}


def flat(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)


def by_loop(function: Callable[..., Any], *columns: list[torch.Tensor]) -> list[torch.Tensor]:
    """The plain loop; the rows of each argument are given."""
    rows = [flat(function(*row)) for row in zip(*columns, strict=True)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def batch(size: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(got: Any, want: list[torch.Tensor]) -> None:
    for mine, theirs in zip(flat(got), want, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert torch.equal(mine, theirs)


@pytest.fixture(params=[None, 1, 60], ids=["whole", "each", "blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of all samples, of one, and of two samples of seven numbers."""
    if request.param is not None:
        monkeypatch.setattr(operator_loop, "BLOCK_BYTES", request.param)
    shardmap.clear_caches()
    yield
    shardmap.clear_caches()


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_sample_is_what_the_loop_gives(name: str, options: dict[str, Any]) -> None:
    function = FUNCTIONS[name]
    mapped = shardmap.vmap(function, in_dims=(0, 1), trace="once", **options)
    for size in SIZES:
        x, y = batch(size, 7), batch(7, size, seed=1)
        before = x.clone(), y.clone()
        if not size:
            shapes = [t[:0] for t in by_loop(function, [batch(1, 7)[0]], [batch(7, 1)[:, 0]])]
            assert_equal(mapped(x, y), shapes)
            continue
        want = by_loop(function, list(x), list(y.unbind(1)))
        for _ in range(2):
            assert_equal(mapped(x, y), want)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("which", [(0, None), (None, 0)])
def test_one_argument_for_all_samples(which: tuple[int | None, int | None]) -> None:
    for function in (FUNCTIONS["one"], FUNCTIONS["written"]):
        args = [batch(5, 7) if d == 0 else batch(1, 7, seed=2)[0] for d in which]
        rows = [list(a) if d == 0 else [a] * 5 for a, d in zip(args, which, strict=True)]
        assert_equal(shardmap.vmap(function, in_dims=which)(*args), by_loop(function, *rows))


@pytest.mark.usefixtures("block_bytes")
def test_large_samples_lie_in_their_rows() -> None:
    """A result of more than a block's bytes for each sample."""
    x = batch(3, 300_000)
    assert_equal(shardmap.vmap(lambda r: scaled(r, r, 2.0))(x), [x * 2 + x])


def test_nothing_returned_for_a_gradient() -> None:
    """Gradients that a kernel does not compute are None in its results."""

    def gradient(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.ops.aten.convolution_backward(
            torch.ones(1, 2, 3), x[None], w, None, [1], [0], [1], False, [0], 1,
            [True, False, False],
        )  # fmt: skip
        return out[0][0]

    x, w = batch(3, 1, 5), batch(3, 2, 1, 3, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardmap.rules.registry.lookup", lambda op: None)
        patch.setattr("shardmap.rules.registry.has_functorch_kernel", lambda op: False)
        shardmap.clear_caches()
        got = shardmap.vmap(gradient)(x, w)
    shardmap.clear_caches()
    assert_equal(got, by_loop(gradient, list(x), list(w)))


def test_outer_gradients_pass() -> None:
    x = batch(5, 4).requires_grad_()
    (got,) = torch.autograd.grad(shardmap.vmap(cubed)(x).square().sum(), x)
    rows = torch.stack([cubed(r) for r in x])
    (want,) = torch.autograd.grad(rows.square().sum(), x)
    assert torch.equal(got, want)


def test_outer_gradients_pass_through_what_is_written() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        own = x * 1
        return torch.ops.aten.pdist(own.view(3, 2).renorm_(2, 0, 1.0))

    x = batch(5, 6).requires_grad_()
    (got,) = torch.autograd.grad(shardmap.vmap(function)(x).square().sum(), x)
    (want,) = torch.autograd.grad(torch.stack([function(r) for r in x]).square().sum(), x)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_inner_gradient_of_each_sample() -> None:
    def gradient(x: torch.Tensor) -> torch.Tensor:
        own = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(cubed(own).sum(), own)
        return found

    x = batch(5, 4)
    assert_equal(shardmap.vmap(gradient)(x), by_loop(gradient, list(x)))


def test_shapes_that_differ_are_not_stacked() -> None:
    """The samples are served one by one, and what cannot be stacked is refused with a sentence."""
    x = torch.tensor([[1.0, 2.0, -1.0], [1.0, 1.0, 1.0], [3.0, -2.0, 4.0]])
    with pytest.raises(errors.ShardmapError, match="shape"):
        shardmap.vmap(positive)(x)
    got = shardmap.vmap(lambda r: positive(r).sum())(x)
    assert torch.equal(got, torch.stack([positive(r).sum() for r in x]))


def test_later_samples_of_another_shape_are_not_written_over_others() -> None:
    """The samples of the trial agree, one between them does not."""
    x = torch.tensor([[1.0, 2.0, -1.0], [1.0, 1.0, 1.0], [3.0, -2.0, 4.0]])
    mapped = shardmap.vmap(lambda r: positive(r).sum(), trace="once")
    mapped(x[[0, 2, 2, 0]])
    for rows in (x[[0, 1, 2]], x[[2, 0, 0, 1, 2]], x):
        assert torch.equal(mapped(rows), torch.stack([positive(r).sum() for r in rows]))


def test_dtypes_that_differ_are_not_cast() -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, -1.0], [3.0, 4.0]])
    got = shardmap.vmap(lambda r: kind(r).sum().float(), trace="once")(x)
    assert torch.equal(got, torch.stack([kind(r).sum().float() for r in x]))


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[int]]]:
    """Loops may share out any call; the threads that computed blocks of each loop."""
    threads: list[set[int]] = []
    compute, share = operator_loop._Blocks._compute, operator_loop._Blocks._share

    def watched(self: Any, size: int, start: int, stop: int) -> None:
        if threads:
            threads[-1].add(threading.get_ident())
        compute(self, size, start, stop)

    def shares(self: Any, *args: int) -> None:
        threads.append(set())
        share(self, *args)

    monkeypatch.setattr(operator_loop._Blocks, "_compute", watched)
    monkeypatch.setattr(operator_loop._Blocks, "_share", shares)
    for name in ("LONG_CALL_SECONDS", "LONG_REST_SECONDS"):
        monkeypatch.setattr(operator_loop, name, 0.0)
    monkeypatch.setattr(operator_loop, "BUSY", 1e9)
    lookup, looped = (
        registry.lookup,
        (torch.ops.aten.histc.default, torch.ops.aten.bincount.default),
    )
    monkeypatch.setattr(registry, "lookup", lambda op: None if op in looped else lookup(op))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    shardmap.clear_caches()
    yield threads
    torch.set_num_threads(before)
    shardmap.clear_caches()


def test_threads_give_the_same_bits(shared: list[set[int]]) -> None:
    before = threading.active_count()
    x = batch(61, 4000)
    mapped = shardmap.vmap(lambda r: torch.histc(r, 50, -3.0, 3.0), trace="once", chunk_size=None)
    want = torch.stack([torch.histc(r, 50, -3.0, 3.0) for r in x])
    for _ in range(20):
        assert torch.equal(mapped(x), want)
    # Some versions of torch put python functions in the place of kernels, which need its lock.
    alone = operator_loop.runs_python(torch.ops.aten.histc.default)
    assert any(len(used) == 2 for used in shared) != alone
    assert threading.active_count() == before


def test_the_error_of_the_earliest_sample_is_raised(shared: list[set[int]]) -> None:
    before = threading.active_count()
    x = torch.randint(0, 5, (40, 50), generator=torch.Generator().manual_seed(0))
    mapped = shardmap.vmap(lambda r: torch.bincount(r, minlength=5), trace="once")
    assert torch.equal(mapped(x), torch.stack([torch.bincount(r, minlength=5) for r in x]))
    shared.clear()
    x[20] = -1
    with pytest.raises(RuntimeError, match="negative"):
        mapped(x)
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["one", "written", "written and returned", "a list"])
def test_python_and_writes_stay_in_one_thread(name: str, shared: list[set[int]]) -> None:
    x, y = batch(40, 50), batch(40, 50, seed=1)
    function = FUNCTIONS[name]
    assert_equal(shardmap.vmap(function)(x, y), by_loop(function, list(x), list(y)))
    assert shared == []


def test_kernels_in_python_stay_in_one_thread(shared: list[set[int]]) -> None:
    library = torch.library.Library("aten", "IMPL")
    order: list[int] = []

    def histc(x: torch.Tensor, bins: int = 100, low: float = 0, high: float = 0) -> torch.Tensor:
        order.append(int(x[0]))
        return x[:bins] + low

    library.impl("histc", histc, "CPU")
    try:
        x = torch.arange(40.0)[:, None].expand(40, 7).contiguous()
        got = shardmap.vmap(lambda r: torch.histc(r, 5, -3.0, 3.0))(x)
        assert torch.equal(got, x[:, :5] - 3)
        assert order[-40:] == list(range(40))
        assert shared == []
    finally:
        library._destroy()


def test_busy_cores_are_left_alone(monkeypatch: pytest.MonkeyPatch, shared: list[set[int]]) -> None:
    monkeypatch.setattr(operator_loop, "BUSY", 0.0)
    x = batch(20, 100)
    got = shardmap.vmap(lambda r: torch.histc(r, 5, -3.0, 3.0))(x)
    assert torch.equal(got, torch.stack([torch.histc(r, 5, -3.0, 3.0) for r in x]))
    assert shared == []
