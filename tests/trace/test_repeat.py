"""A function that is recorded at each call, against what was recorded of it the last time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from shardmap.trace import repeat as follow
from tests import oracle

x = torch.arange(6.0).view(3, 2) + 1
VARIANTS: dict[str, tuple[Callable[[torch.Tensor, Any], torch.Tensor], list[Any]]] = {}
"""A function of a sample and of something that changes from call to call, and what it changes
to."""


def variant(*values: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function with the values that it is called with in turn."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        VARIANTS[function.__name__] = function, list(values)
        return function

    return register


@variant(True, False)
def branch(r: torch.Tensor, flag: bool) -> torch.Tensor:
    return (r * 2).sin() if flag else r + 1


@variant(True, False)
def branch_in_the_middle(r: torch.Tensor, flag: bool) -> torch.Tensor:
    h = r * 2
    h = h.exp() if flag else h.sin()
    return h + r


@variant(0, 1, 3, 2)
def number_of_layers(r: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        r = (r * 0.5).tanh()
    return r + 0


@variant((2,), (1, 2), (2, 1))
def shapes(r: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return r.reshape(shape) + torch.ones(2, 1)


@variant(0.5, 2.0, 0.0, -0.0, 1, 1.0, True, float("inf"))
def open_scalar(r: torch.Tensor, c: Any) -> torch.Tensor:
    return 1 / (r.long() * c + 0.0)


@variant(0.0, -0.0, 1.0, 1)
def filled_in_place(r: torch.Tensor, c: Any) -> torch.Tensor:
    return 1 / r.clone().fill_(c)


@variant(0.0, -0.0, 1.0, 1)
def filled(r: torch.Tensor, c: Any) -> torch.Tensor:
    return r / torch.full((2,), c)


@variant(True, 1, 1.0, 1 + 0j)
def filled_by_kind(r: torch.Tensor, c: Any) -> torch.Tensor:
    return torch.full((2,), c)


@variant(1.0, 1, 2, 2.0)
def clamped(r: torch.Tensor, c: Any) -> torch.Tensor:
    return r.long().clamp(min=c)


@variant(0.0, -0.0)
def padded(r: torch.Tensor, c: float) -> torch.Tensor:
    return 1 / torch.nn.functional.pad(r, (1, 1), value=c)


@variant(0, 1, -1)
def dims(r: torch.Tensor, d: int) -> torch.Tensor:
    return (r.view(2, 1) * torch.ones(2, 2)).cumsum(d)


@variant("sum", "mean", "prod", "amax")
def operator(r: torch.Tensor, name: str) -> torch.Tensor:
    return getattr(r, name)() + r


@variant(
    torch.tensor([1.0, 2.0]),
    torch.tensor(3.0),
    torch.ones(2, 2),
    torch.tensor([1, 2]),
    torch.tensor([2.0, 1.0], requires_grad=True),
)
def captured(r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return r * w + w


W = torch.tensor([3.0, 4.0])
V = torch.tensor([5.0, 6.0])


@variant((W, W), (W, V), (V, W), (V, V))
def captured_twice(r: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return r * pair[0] + pair[1]


@variant(0, 1)
def in_place_write(r: torch.Tensor, i: int) -> torch.Tensor:
    out = torch.zeros(2)
    out[i] = r[i] * 2
    return out


@variant("add_", "mul_", "copy_")
def in_place_operator(r: torch.Tensor, name: str) -> torch.Tensor:
    out = torch.ones(2)
    view = out[:1]
    getattr(view, name)(r[:1])
    return out


@variant(True, False)
def detached(r: torch.Tensor, flag: bool) -> torch.Tensor:
    h = r * W.requires_grad_(False)
    return (h.detach() if flag else h) * r


@variant(True, False)
def grad_mode(r: torch.Tensor, flag: bool) -> torch.Tensor:
    with torch.set_grad_enabled(flag):
        h = r * 2
    return h * r


@variant(True, False)
def inner_gradient(r: torch.Tensor, flag: bool) -> torch.Tensor:
    s = r.detach().requires_grad_(flag)
    y = (s * s).sum()
    return torch.autograd.grad(y, s)[0] * r if flag else y * r


@variant(torch.float32, torch.float64, torch.int64)
def dtypes(r: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return r.to(dtype) + torch.zeros(2, dtype=dtype)


@variant(1, 2)
def output(r: torch.Tensor, n: int) -> torch.Tensor:
    parts = [r * 2, r * 3]
    return parts[n - 1]


@variant(False, True)
def strides(r: torch.Tensor, flag: bool) -> torch.Tensor:
    h = r.view(2, 1) * torch.ones(2, 2)
    return (h.t() if flag else h).contiguous().as_strided((3,), (1,))


def _orders(values: list[Any]) -> list[Any]:
    """Every value after every other, some of them twice."""
    return [v for pair in itertools.product(values, repeat=2) for v in pair]


@pytest.mark.parametrize("fresh", [False, True], ids=["one_map", "fresh_maps"])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_loop_in_any_order(name: str, fresh: bool) -> None:
    """Values, signs of zeros, dtypes and gradients.

    Fails if anything of the last recording is taken for this one.
    """
    function, values = VARIANTS[name]
    now: list[Any] = [None]

    def changing(r: torch.Tensor) -> torch.Tensor:
        return function(r, now[0])

    mapped = shardmap.vmap(changing)
    for value in _orders(values):
        now[0] = value
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        got, want = (
            (shardmap.vmap(changing) if fresh else mapped)(ours),
            oracle.loop(changing)(theirs),
        )
        oracle.assert_same(got, want, repr(value))
        assert got.requires_grad == want.requires_grad, value
        if got.is_floating_point():
            assert torch.equal(got.signbit(), want.signbit()), value
        if want.requires_grad:
            weights = torch.rand(want.shape)
            mine, loops = (
                torch.autograd.grad((t * weights).sum().real, s)[0]
                for t, s in ((got, ours), (want, theirs))
            )
            oracle.assert_same(mine, loops, f"gradient for {value!r}")


def test_requires_grad_of_the_batch_alternates() -> None:
    mapped = shardmap.vmap(lambda r: (r * W).sin() * 2)
    for flag in (True, False, True, True, False, False):
        batch = x.clone().requires_grad_(flag)
        assert mapped(batch).requires_grad == flag
        with torch.no_grad():
            assert not mapped(batch).requires_grad


def test_functions_of_one_code_do_not_mix() -> None:
    """Closures made by one `def` share code; each has its own captured tensors."""

    def make(w: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda r: r * w

    maps = [(w, shardmap.vmap(make(w))) for w in (W, V, torch.tensor(2.0), torch.ones(2, 2))]
    for _ in range(2):
        for w, mapped in maps:
            oracle.assert_same(mapped(x), oracle.loop(make(w))(x), "output")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ((1, 2), (1, 2.0)),
        ((0.0,), (-0.0,)),
        (0j, -0j),
        ((1,), (1, 2)),
        (None, 0),
        ((1, (2,)), (1, (True,))),
    ],
)
def test_alike_tells_apart_what_python_calls_equal(a: Any, b: Any) -> None:
    assert not follow.alike(a, b)
    assert follow.alike(a, a)
    assert follow.alike(b, b)


def test_the_same_recording_is_the_same_object() -> None:
    """A function that repeats itself is recognised.

    Its program is the remembered one, and is not described again.
    """

    def function(r: torch.Tensor) -> torch.Tensor:
        return (r * 0.25).sin() + r

    mapped = shardmap.vmap(function)
    mapped(x)
    (first,) = follow.expected(function, [tuple(x.shape[1:])])
    mapped(x + 1)
    assert follow.expected(function, [tuple(x.shape[1:])])[0] is first
