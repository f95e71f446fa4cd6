"""Numbers (0-dimensional tensors) of another dtype than that of the tensor beside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

import shardmap
from shardmap.rules.precision import Operand, Slot, computation_dtype
from tests.rules.against_loop import assert_close

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
)
NUMBERS = (70000.7, 1e-6, -2.1, 1 / 3, 2049.0, 300.0)
"""Not in float16, bfloat16 or int8, or not exactly."""

BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": lambda a, b: torch.sub(a, b, alpha=2),
    "mul": torch.mul,
    "div": torch.div,
    "floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "remainder": torch.remainder,
    "fmod": torch.fmod,
    "pow": torch.pow,
    "atan2": torch.atan2,
    "maximum": torch.maximum,
    "fmin": torch.fmin,
    "hypot": torch.hypot,
    "copysign": torch.copysign,
    "xlogy": torch.xlogy,
    "lt": torch.lt,
    "eq": torch.eq,
    "ge": torch.ge,
    "bitwise_and": torch.bitwise_and,
    "logical_or": torch.logical_or,
    "where": lambda a, b: torch.where(a > 1, a, b),
    "rsub": torch.rsub,
}
WRITING: dict[str, Callable[..., torch.Tensor]] = {
    "add_": lambda a, b: a.clone().add_(b),
    "mul_": lambda a, b: a.clone().mul_(b),
    "div_": lambda a, b: a.clone().div_(b),
    "pow_": lambda a, b: a.clone().pow_(b),
    "lt_": lambda a, b: a.clone().lt_(b),
}
TERNARY: dict[str, Callable[..., torch.Tensor]] = {
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=2),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b),
    "lerp": lambda a, b: torch.lerp(a, a * 2, b),
    "clamp": lambda a, b: torch.clamp(a, min=b),
    "clamp_both": lambda a, b: torch.clamp(a, b, b + 1),
}


def operands(vector: torch.dtype, number: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Six vectors and six numbers."""
    steps = torch.arange(6 * 19, dtype=torch.float64).view(6, 19)
    values = (steps % 23 - 7) * 10.0 ** (steps % 4 - 2)
    numbers = torch.tensor(NUMBERS, dtype=torch.float64)
    if vector in (torch.int8, torch.int64):
        values = (steps % 23) + 1
    if not (number.is_floating_point or number.is_complex):
        numbers = numbers.abs().ceil()
    return values.to(vector), numbers.to(number)


def check(function: Callable[..., torch.Tensor], vector: torch.dtype, number: torch.dtype) -> None:
    """Every choice of mapped operands, in both orders, against the loop."""
    a, b = operands(vector, number)
    orders = [function] if function in WRITING.values() else [function, swapped(function)]
    for f, dims in itertools.product(orders, ((0, 0), (None, 0), (0, None))):
        first, second = (t if d == 0 else t[4] for t, d in zip((a, b), dims, strict=True))
        rows = [
            (a[i] if dims[0] == 0 else first, b[i] if dims[1] == 0 else second) for i in range(6)
        ]
        try:
            want = torch.stack([f(*row) for row in rows])
        except (RuntimeError, ArithmeticError):
            continue
        got = shardmap.vmap(f, dims)(first, second)
        dtype = want.dtype
        units = 4 * torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0
        assert got.dtype == dtype
        for i in range(6):  # each by its own scale: one overflow hides no other
            assert_close(got[i], want[i], units, f"{vector} {number} {dims} sample {i}")


def swapped(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The number first."""
    return lambda a, b: function(b, a)


@pytest.mark.parametrize("name", [*BINARY, *WRITING, *TERNARY])
def test_a_number_in_float32_or_more_beside_a_narrow_vector(name: str) -> None:
    function = (BINARY | WRITING | TERNARY)[name]
    for vector, number in itertools.product(
        (torch.float16, torch.bfloat16, torch.int8), (torch.float32, torch.float64, torch.int64)
    ):
        check(function, vector, number)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BINARY, *WRITING, *TERNARY])
def test_all_pairs_of_dtypes(name: str) -> None:
    function = (BINARY | WRITING | TERNARY)[name]
    for vector, number in itertools.permutations(DTYPES, 2):
        check(function, vector, number)


def test_the_kernel_is_asked() -> None:
    """A kernel that rounds first, one that computes in float32, and one that does neither."""

    def asked(op: torch._ops.OpOverload) -> torch.dtype | None:
        pair = Operand(torch.float16, False), Operand(torch.float32, True)
        return computation_dtype(op, pair, (Slot(0), Slot(1)), (), torch.float16, "cpu")

    x, s = torch.tensor([1e-3] * 8).half(), torch.tensor(1e-6)
    for op in (torch.ops.aten.div.Tensor, torch.ops.aten.atan2.default):
        said = asked(op)
        assert said is not None
        torch.testing.assert_close(op(x.to(said), s.to(said)).half(), op(x, s), rtol=0, atol=0)
    assert asked(torch.ops.aten.div.Tensor) is torch.float32
    assert asked(torch.ops.aten.atan2.default) is torch.float16


def test_gradients_with_a_number_in_float32() -> None:
    """Inside the map, and from outside."""
    h = torch.linspace(0.5, 2.0, 12).view(4, 3).half()
    s = torch.tensor([70000.0, 1e-3, 3.3, 1 / 3])

    def f(h: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        h, s = h.detach().requires_grad_(), s.detach().requires_grad_()
        return torch.cat([t.float().view(-1) for t in torch.autograd.grad((h / s).sum(), (h, s))])

    want = torch.stack([f(a, b) for a, b in zip(h, s, strict=True)])
    torch.testing.assert_close(shardmap.vmap(f)(h, s), want, rtol=2e-3, atol=1e-5)
    s = torch.tensor([70.1, 0.51, 3.3, 1 / 3]).requires_grad_()
    h.requires_grad_()
    rows = zip(h, s, strict=True)
    want = torch.autograd.grad(torch.stack([a / b for a, b in rows]).float().sum(), (h, s))
    got = torch.autograd.grad(shardmap.vmap(torch.div)(h, s).float().sum(), (h, s))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=5e-3, atol=1e-4)
