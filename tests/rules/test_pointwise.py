"""The pointwise family against the loop.

Every operator of the table, promotion, broadcasting, in-place forms, layouts.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch

import shardmap
from shardmap.lower import cache as engine
from shardmap.rules import pointwise, registry
from tests.rules.against_loop import check, real

aten = torch.ops.aten

INTEGERS = {"gcd", "gcd_", "lcm", "lcm_"} | {
    f"{a}{b}{c}"
    for a in ("bitwise_", "__", "__i")
    for b in ("and", "or", "xor", "not", "left_shift", "right_shift", "lshift", "rshift")
    for c in ("", "_", "__")
}
SCALARS = {"int": 2, "float": 0.5, "float?": 0.25, "number": 2, "number?": 2, "Scalar": 2}


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values at which every function of the table is defined and smooth enough."""
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    if not dtype.is_floating_point:
        return torch.randint(1, 5, shape, dtype=dtype)
    return 0.2 + 0.6 * torch.rand(shape, dtype=torch.float64).to(dtype)


def arguments(
    op: Any, shapes: list[tuple[int, ...]]
) -> tuple[list[Any], dict[str, Any], list[int]]:
    """Arguments of `op` with tensors of these shapes in turn, and the positions of the tensors."""
    name = op._schema.name.partition("::")[2]
    dtype = torch.int64 if name in INTEGERS else torch.float64
    args: list[Any] = []
    named: dict[str, Any] = {}
    tensors: list[int] = []
    for a in op._schema.arguments:
        kind = str(a.type)
        if kind in ("Tensor", "Optional[Tensor]"):
            value: Any = numbers(
                shapes[len(tensors) % len(shapes)], torch.bool if a.name == "mask" else dtype
            )
            tensors.append(len(args))
        elif a.name in ("rounding_mode",):
            value = "floor"
        elif a.name == "is_result":
            value = False
        elif name in ("clamp", "clamp_") and kind == "Optional[number]":
            value = 0.5
        elif a.has_default_value():
            continue
        else:
            value = 2 if dtype == torch.int64 or "number" in kind or kind == "int" else 0.5
        if a.kwarg_only:
            named[a.name] = value
        else:
            args.append(value)
    return args, named, tensors


def compare(
    op: Any,
    args: list[Any],
    named: dict[str, Any],
    tensors: list[int],
    chosen: tuple[int, ...],
    size: int,
) -> None:
    """The operator mapped over the chosen tensors, against the loop."""
    batches = {i: torch.stack([_shuffled(args[i], k) for k in range(size)]) for i in chosen}
    in_place = op._schema.is_mutable

    def one(*rows: torch.Tensor) -> Any:
        full = list(args)
        for i, row in zip(chosen, rows, strict=True):
            full[i] = row
        if in_place:
            full[0] = full[0].clone()
        return op(*full, **named)

    rows = [batches[i] for i in chosen]
    shardmap.clear_caches()
    got = shardmap.vmap(one)(*rows)
    for low in engine.lowerings():
        assert not low.fixes.tiers, low.fixes
    results = [one(*[r[k] for r in rows]) for k in range(size)]
    got, results = (got, results) if isinstance(got, tuple) else ((got,), [(r,) for r in results])
    for g, want in zip(got, map(torch.stack, zip(*results, strict=True)), strict=True):
        torch.testing.assert_close(g, want, equal_nan=True, rtol=1e-12, atol=1e-12)


def _shuffled(t: torch.Tensor, k: int) -> torch.Tensor:
    torch.manual_seed(k)
    return numbers(tuple(t.shape), t.dtype)


@pytest.mark.parametrize(
    "op",
    [
        op
        for op, entry in registry._rules.items()
        if entry.rule in (pointwise.pointwise, pointwise.unpromoted)
    ],
    ids=str,
)
def test_every_operator(op: Any) -> None:
    """Each choice of mapped operands, equal ranks."""
    args, named, tensors = arguments(op, [(2, 3)])
    for count in range(1, len(tensors) + 1):
        for chosen in itertools.combinations(tensors, count):
            if op._schema.is_mutable and 0 not in chosen:
                continue
            compare(op, args, named, tensors, chosen, 2)


BINARY = (
    "add.Tensor sub.Tensor mul.Tensor div.Tensor atan2 maximum lt.Tensor eq.Tensor "
    "pow.Tensor_Tensor logical_and where.self"
)
DTYPES = [
    torch.bool,
    torch.int8,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


@pytest.mark.parametrize("name", BINARY.split())
def test_promotion(name: str) -> None:
    """Operands without dimensions take part in promotion as the sample's did.

    All dtypes, all choices of mapped operands.
    """
    (op,) = registry.overloads(name)
    compared = 0
    condition = torch.tensor([True, False, True])
    for left, right, shapes in itertools.product(
        DTYPES, DTYPES, [((), (3,)), ((3,), ()), ((), ())]
    ):
        torch.manual_seed(0)
        args = [(100 * torch.rand(s)).to(d) for s, d in zip(shapes, (left, right), strict=True)]
        full = (lambda a, b: op(condition, a, b)) if name == "where.self" else op
        try:
            full(*args)
        except RuntimeError:
            continue
        for mapped in ((0,), (1,), (0, 1)):
            rows = [
                (100 * torch.rand(2, *a.shape)).to(a.dtype) if i in mapped else a
                for i, a in enumerate(args)
            ]
            dims = tuple(0 if i in mapped else None for i in range(2))
            want = torch.stack(
                [full(*[r[k] if i in mapped else r for i, r in enumerate(rows)]) for k in range(2)]
            )
            got = shardmap.vmap(full, dims)(*rows)
            case = f"{left} {right} {shapes} {mapped}: "
            torch.testing.assert_close(got, want, equal_nan=True, msg=case.__add__)
            compared += 1
    assert compared > 100, "the operator is defined for most pairs of dtypes"


@pytest.mark.parametrize(
    ("left", "right"),
    [(torch.float32, torch.float64), (torch.int8, torch.int64), (torch.bool, torch.bool)],
)
@pytest.mark.parametrize("name", ["add_", "mul_", "clamp_min_", "eq_", "logical_or_"])
def test_promotion_in_place(name: str, left: torch.dtype, right: torch.dtype) -> None:
    """A tensor without dimensions is written to in the dtype that both operands promote to."""
    x, y = (
        torch.tensor([1.3, 7.9, -3.0]).to(left),
        torch.tensor([300.7, 1.1, 2.0], dtype=torch.float64).to(right),
    )
    for mapped in ((0,), (1,), (0, 1)):
        args = [t if i in mapped else t[0] for i, t in enumerate((x, y))]

        def write(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            out = a.clone()
            getattr(out, name)(b)
            return out

        try:
            want = torch.stack(
                [write(*[a[k] if i in mapped else a for i, a in enumerate(args)]) for k in range(3)]
            )
        except (RuntimeError, NotImplementedError) as refusal:
            with pytest.raises(type(refusal)):  # what the loop refuses has no result to make up
                shardmap.vmap(write, tuple(0 if i in mapped else None for i in range(2)))(*args)
            continue
        got = shardmap.vmap(write, tuple(0 if i in mapped else None for i in range(2)))(*args)
        assert torch.equal(got, want), (mapped, got, want)


def test_integers_are_divided_in_the_real_dtype() -> None:
    """An int64 without dimensions does not pass through the int8 of the other operand."""
    x, y = torch.tensor([1, 2, 3], dtype=torch.int8), torch.tensor([300, 7])
    got = shardmap.vmap(lambda s: s / x)(y)
    assert torch.equal(got, torch.stack([s / x for s in y]))


CASES = {
    "broadcast": (lambda x, y: x + y, real(2, 3), real(3)),
    "column": (lambda x, y: x * y, real(2, 1), real(3)),
    "scalar": (lambda x, y: x * y + y, real(4), real()),
    "scalars": (lambda x, y: x / (1 + y * y), real(), real()),
    "empty": (lambda x, y: x + y, real(0, 3), real(3)),
    "three": (lambda x, y, z: torch.addcmul(x, y, z, value=2), real(2, 3), real(3), real()),
    "lerp": (lambda x, y, z: torch.lerp(x, y, z), real(2, 3), real(3), real()),
    "where": (lambda x, y: torch.where(x > 0, x, y), real(2, 3), real()),
    "where_scalar": (lambda x: torch.where(x > 0, x, 0.5), real(2, 3)),
    "clamp": (lambda x, lo: torch.clamp(x, min=lo, max=lo + 1), real(2, 3), real(3)),
    "masked_fill": (lambda x, v: x.masked_fill(x > 0, v), real(2, 3), real()),
    "masked_fill_number": (lambda x, y: x.masked_fill(y > 0, -1.0), real(3), real(2, 3)),
    "masked_fill_": (lambda x, v: (x * 1).masked_fill_(x > 0, v), real(2, 3), real()),
    "in_place": (
        lambda x, y: (x * 1).add_(y, alpha=3).mul_(y).clamp_(-1, 1).exp_(),
        real(2, 3),
        real(3),
    ),
    "in_place_view": (lambda x, y: _write_a_row(x, y), real(2, 3), real(3)),
    "fill_": (lambda x, y: _fill_a_row(x, y), real(2, 3), real()),
    "unmapped_target": (lambda x: _fill_a_row(torch.zeros(2, 3, dtype=torch.float64), x), real()),
    "rounding": (lambda x, y: torch.div(x, y, rounding_mode="floor") + x, real(2, 3), real(3)),
    "log_sigmoid": (lambda x: torch.nn.functional.logsigmoid(x), real(2, 3)),
    "glu": (lambda x: torch.nn.functional.glu(x, 0), real(4, 3)),
    "prelu": (lambda x, w: torch.nn.functional.prelu(x, w), real(2, 3, 2), real(3)),
    "celu": (lambda x: torch.celu(x, 2.0), real(2, 3)),
    "gelu_tanh": (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), real(2, 3)),
    "inner_gradient": (
        lambda x, y: torch.autograd.grad(
            (x.requires_grad_().tanh() * y).sin().sum(), x, create_graph=True
        )[0],
        real(2, 3),
        real(3),
    ),
}
ACTIVATIONS = (
    "relu relu6 silu mish gelu elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus "
    "softshrink hardshrink softsign"
)


def _write_a_row(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = x * 1
    out[0].mul_(y)
    out.t()[1].copy_(y[:2])
    return out


def _fill_a_row(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = x * 1
    out[1].fill_(y)
    out[0].zero_()
    return out


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    """Broadcasting, in-place writes and gates, with outer gradients."""
    func, *makers = CASES[name]
    check(func, *makers, gradient="inner" not in name)


@pytest.mark.parametrize("name", ACTIVATIONS.split())
def test_activations(name: str) -> None:
    """Forward and backward inside the function agree, with the cotangent mapped or not."""
    function = getattr(torch.nn.functional, name)
    check(
        lambda x, g: torch.autograd.grad(function(x.requires_grad_() if x.is_leaf else x), x, g)[0],
        real(2, 3),
        real(2, 3),
        gradient=False,
    )
    check(function, real(2, 3), gradient=True)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.preserve_format, torch.channels_last]
)
def test_copies_have_the_strides_of_the_sample(memory_format: torch.memory_format) -> None:
    """A view recorded after the copy depends on them."""

    def func(x: torch.Tensor) -> torch.Tensor:
        y = x.clone(memory_format=memory_format)
        z = x.to(torch.float32, memory_format=memory_format, copy=True)
        shape = (2, 3, 4, 5)
        assert y.shape == shape
        return y.as_strided((120,), (1,)) + z.as_strided((120,), (1,))

    check(func, real(2, 3, 4, 5), gradient=False, tolerance=1e-6)


def test_one_call_for_one_call() -> None:
    """Equal ranks and dtypes: exactly the recorded call is emitted."""
    shardmap.clear_caches()
    w = torch.randn(3, 4)
    shardmap.vmap(lambda x, y: (x * y + w).tanh())(torch.randn(5, 3, 4), torch.randn(5, 3, 4))
    (low,) = engine.lowerings()
    names = [getattr(c.target, "__name__", "") for c in low.batched.chunk]
    assert len(low.batched.chunk) == 4, names  # the three calls, and the output made contiguous


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("weight", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", ["none", "start", "end"])
def test_lerp_of_integers_by_a_weight_of_each_sample(number, weight, dtype):
    """The kernel takes numbers of another dtype, which in a batch are tensors."""
    start, end = torch.arange(-6, 9).view(5, 3).to(dtype), torch.arange(15).view(5, 3).to(dtype)
    weights = torch.tensor([0.1, 0.5, 1.0, -2.0, 3.25], dtype=weight)

    def function(a, b, w):
        return torch.lerp(a[0] if number == "start" else a, b[0] if number == "end" else b, w)

    want = torch.stack([function(*row) for row in zip(start, end, weights, strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", shardmap.SlowLoopWarning)
        for options in ({"strict": True}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}):
            got = shardmap.vmap(function, **options)(start, end, weights)
            torch.testing.assert_close(got, want)
