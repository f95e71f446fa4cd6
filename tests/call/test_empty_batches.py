"""Batches of no samples: what one sample would show of results, and gradients of zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import shardmap

W = torch.randn(4, 4, requires_grad=True)
B = torch.randn((), requires_grad=True)
C = torch.randn(4, 4, dtype=torch.complex64, requires_grad=True)
CAPTURED = [W, B, C]
WEIGHTS = torch.rand(4)


class Square(torch.autograd.Function):
    """A Function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * g


def asks(x: torch.Tensor) -> torch.Tensor:
    return (x @ W).sin() if x.sum() > 0 else (x @ W).cos()


def without_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x @ W
    return y * B


def writes(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    view = x[1:]
    x[0] = B
    return view * 1.0 + x[0]


def writes_its_argument(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2).cos()


def gradient_inside(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((x @ W).sin().sum(), (W,), create_graph=True)


def inner(x: torch.Tensor) -> torch.Tensor:
    rows = x.expand(3, 4) * torch.ones(3, 1)
    return shardmap.vmap(lambda r: torch.fft.rfft(r * W[0]).abs())(rows)


def inner_of_none(x: torch.Tensor) -> torch.Tensor:
    return shardmap.vmap(lambda r: torch.fft.rfft(r * W[0]).abs())(x[None][:0])


FUNCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "spectrum": lambda x: torch.fft.fft(x) @ C,
    "shuffle": lambda x: F.pixel_shuffle(x.view(4, 1, 1), 2),
    "weighted loss": lambda x: F.cross_entropy(x @ W, (x[0] > 0).long(), weight=WEIGHTS),
    "block_diag": lambda x: torch.block_diag(x, W),
    "combinations": lambda x: torch.combinations(x * B),
    "lstsq": lambda x: torch.linalg.lstsq(x.view(2, 2) + torch.eye(2), x.view(2, 2)).solution,
    "asks": asks,
    "asks what is captured": lambda x: x * W.sum().item(),
    "takes a number": lambda x: x * x.sum().item() + W[0],
    "gradient inside": gradient_inside,
    "own backward": lambda x: Square.apply(x @ W),
    "writes": writes,
    "without grad": without_grad,
    "detached": lambda x: (x @ W).detach() * B,
    "leaf made inside": lambda x: torch.ones(3, requires_grad=True) * 2,
    "requires grad from here": lambda x: x.detach().clone().requires_grad_(),
    "same for all": lambda x: (W.sum(), W, torch.arange(3)),
    "of many kinds": lambda x: {"at": (x @ W).argmax(), "is": x > 0, "x": x, "half": x.half()},
    "map inside": inner,
    "map of none inside": inner_of_none,
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"chunk_size": 2},
    "lanes": {"devices": ["cpu", "cpu"]},
    "planned": {"memory_budget": 1 << 30},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
    "remat": {"remat": True},
    "sum": {"reduce": "sum"},
    "mean": {"reduce": "mean"},
    "last": {"out_dims": -1},
}
MEANS = {"same for all", "of many kinds"}
"""Functions with results that have no mean."""


@pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_form_and_gradients_are_those_of_samples(name: str, way: str) -> None:
    """Shape, dtype and history, in several calls among others; gradients are of zeros."""
    options = WAYS[way]
    mapped = shardmap.vmap(FUNCTIONS[name], **options)
    if way == "mean" and name in MEANS:
        for n in (3, 0):  # refused for samples and for none
            with pytest.raises(shardmap.errors.OptionError, match="mean"):
                mapped(torch.randn(n, 4))
        return
    for requires_grad in (False, True, False, True):
        x, none = (torch.randn(n, 4).requires_grad_(requires_grad) for n in (3, 0))
        want, found = (pytree.tree_leaves(mapped(t)) for t in (x, none))
        for a, b in zip(found, want, strict=True):
            shape = list(b.shape)
            if "reduce" not in options:
                shape[options.get("out_dims", 0)] = 0
            assert (list(a.shape), a.dtype, a.requires_grad) == (shape, b.dtype, b.requires_grad)
            assert way != "sum" or not a.any()
            assert way != "mean" or bool(a.isnan().all())
            if a.requires_grad:
                assert_gradients(a, [none, *CAPTURED], b, [x, *CAPTURED])


def assert_gradients(
    none: torch.Tensor, by: list[torch.Tensor], some: torch.Tensor, some_by: list[torch.Tensor]
) -> None:
    """Gradients reach the tensors that those of samples reach, and are of zeros."""
    grads = []
    for out, tensors in ((none, by), (some, some_by)):
        wanted = [t if t.requires_grad else W for t in tensors]
        total = out.abs().nan_to_num().sum()
        grads.append(torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True))
    for a, b, t in zip(*grads, by, strict=True):
        assert (a is None) == (b is None)
        if a is not None and t.requires_grad:
            assert (a.shape, a.dtype) == (t.shape, t.dtype)
            assert not a.any()


def test_a_written_argument_stays_as_it_is() -> None:
    x = torch.randn(0, 4)
    assert shardmap.vmap(writes_its_argument)(x).shape == (0, 4)


def test_gradients_of_gradients() -> None:
    """A penalty on gradients of an empty batch can be differentiated, as that of samples can."""
    x = torch.randn(0, 4, requires_grad=True)
    loss = shardmap.vmap(lambda r: (r @ W).sin())(x).sum()
    by_x, by_w = torch.autograd.grad(loss, (x, W), create_graph=True)
    (second,) = torch.autograd.grad(by_x.sum() + by_w.sum(), W)
    assert second.shape == W.shape
    assert not second.any()


def test_what_a_captured_tensor_has_answered_is_asked_again() -> None:
    """A recording whose shape depends on a captured number does not serve another one."""
    count = [torch.tensor(2)]
    mapped = shardmap.vmap(lambda x: x.repeat(int(count[0])))
    for number in (2, 2, 2, 3, 3, 2):
        count[0] = torch.tensor(number)
        assert mapped(torch.zeros(0, 4)).shape == (0, 4 * number)


def test_an_output_without_the_mapped_dimension_is_computed() -> None:
    mapped = shardmap.vmap(lambda x: (x.sin(), W.sum() * 2), out_dims=(0, None))
    for _ in range(4):
        found, total = mapped(torch.zeros(0, 4))
        assert found.shape == (0, 4)
        torch.testing.assert_close(total, W.sum() * 2)


def test_a_gradient_inside_by_what_the_samples_were_computed_from() -> None:
    """The samples of an empty batch have its history."""
    for size in (3, 0, 0, 3):
        features = torch.randn(size, 4) @ W

        def gradient(r: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(r.sin().sum(), W, retain_graph=True)[0]

        found = shardmap.vmap(gradient)(features)
        assert found.shape == (size, 4, 4)


AROUND: dict[str, Callable[[Callable[..., Any], torch.Tensor], Any]] = {
    "map": lambda f, x: shardmap.vmap(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "grad in vmap": lambda f, x: torch.func.vmap(torch.func.grad(lambda t: f(t).abs().sum()))(x),
    "jvp in vmap": lambda f, x: torch.func.vmap(lambda t: torch.func.jvp(f, (t,), (t,)))(x),
    "jacrev": lambda f, x: torch.func.jacrev(lambda t: f(t).abs())(x.flatten(0, 1)),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    "name", ["asks", "real spectrum", "takes a number", "writes", "map inside"]
)
def test_maps_of_none_inside_and_outside(name: str, around: str) -> None:
    """The shapes are those for samples, with a size of zero where there are none."""
    function = FUNCTIONS.get(name, lambda x: torch.fft.rfft(x * WEIGHTS))
    none = {5: 0, 10: 0, 25: 0}  # sizes of the batches, or of both laid one behind the other
    for sizes in ((2, 0), (0, 2), (0, 0)):
        mapped = shardmap.vmap(function)
        found, want = (
            pytree.tree_leaves(AROUND[around](mapped, torch.ones(*[n or size for n in sizes], 4)))
            for size in (0, 5)
        )
        for a, b in zip(found, want, strict=True):
            assert a.dtype == b.dtype
            assert [*a.shape] == [none.get(n, n) for n in b.shape]


@pytest.mark.parametrize("name", ["asks", "asks what is mapped outside", "spectrum"])
def test_none_of_what_all_samples_share(name: str) -> None:
    """A `torch.func.vmap` of none around the map gives its samples a shared tensor."""
    functions: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "asks": lambda r, w: (r @ w).sin() if (r @ w).sum() > 0 else (r @ w).cos(),
        "asks what is mapped outside": lambda r, w: r * w.sum().item(),
        "spectrum": lambda r, w: torch.fft.fft(r @ w).abs(),
    }
    function, x = functions[name], torch.randn(3, 4)

    def mapped(w: torch.Tensor) -> torch.Tensor:
        return shardmap.vmap(lambda r: function(r, w))(x)

    for size in (2, 0, 0):
        w = torch.randn(size, 4, 4)
        assert torch.func.vmap(mapped)(w).shape == (size, 3, 4)
        gradient = torch.func.grad(lambda v: mapped(v).sum())
        assert torch.func.vmap(gradient)(w).shape == w.shape


def test_products_of_none() -> None:
    """`reduce="gram"` of none is `[0, 0]`, with a history where the results have one."""
    for function in (asks, lambda x: x @ W.detach()):
        found = shardmap.vmap(function, reduce="gram")(torch.zeros(0, 4))
        assert found.shape == (0, 0)
        assert found.requires_grad == (function is asks)


def test_stores_and_plans(tmp_path: Path) -> None:
    x = torch.zeros(0, 4)
    for name in ("spectrum", "asks", "takes a number", "shuffle", "lstsq"):
        function = FUNCTIONS[name]
        want = torch.no_grad()(function)(torch.zeros(4))
        with torch.no_grad():
            store = shardmap.vmap(function, out=shardmap.ZarrSink(tmp_path / name))(x)
            found = shardmap.plan(function)(x).run()
        assert store.read(0, 0, 0).shape == found.shape == (0, *want.shape)
        assert found.dtype == want.dtype


def collatz(a: torch.Tensor) -> torch.Tensor:
    """The number of steps to one: never from zero."""
    steps = torch.zeros((), dtype=torch.long)
    while a != 1:
        a = a // 2 if a % 2 == 0 else 3 * a + 1
        steps = steps + 1
    return steps


def halves(a: torch.Tensor) -> torch.Tensor:
    """Doubling until 100: never from zero, whatever exceptions the function stops."""
    while True:
        try:
            if a.float().sum().item() > 100:
                return a
            a = a * 2
        except ValueError as error:
            raise RuntimeError("stopped") from error


@pytest.mark.parametrize("func", [collatz, halves])
@pytest.mark.parametrize("options", [{}, {"trace": "each"}, {"trace": "once"}], ids=str)
@pytest.mark.parametrize("before", [False, True])
def test_a_loop_that_never_ends_on_zeros(
    func: Callable[[torch.Tensor], torch.Tensor], options: dict[str, Any], before: bool
) -> None:
    """It is stopped, also where samples were recorded before; samples are served afterwards."""
    mapped, x = shardmap.vmap(func, **options), torch.tensor([1, 2, 3, 6, 7])
    expected = torch.stack([func(row) for row in x])
    if before:
        assert torch.equal(mapped(x), expected)
    with pytest.raises(shardmap.errors.EmptyBatchError, match="skip the call when there are no"):
        mapped(x[:0])
    with pytest.raises(shardmap.errors.EmptyBatchError):
        shardmap.vmap(shardmap.vmap(func))(x[None][:, :0])
    results = [mapped(part) for part in x.split([2, 3]) if len(part)]  # the remedy
    assert torch.equal(torch.cat(results), expected)


def test_a_long_loop_on_zeros_ends() -> None:
    """Some hundreds of questions are asked, as a solver asks them."""

    def func(a: torch.Tensor) -> torch.Tensor:
        while a.sum() < 400:
            a = a + 1
        return a

    assert shardmap.vmap(func)(torch.zeros(0, 1)).shape == (0, 1)
