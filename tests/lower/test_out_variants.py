"""Writing into memory that is there gives what computing into fresh memory gives."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode

import shardmap
from shardmap.lower import out_variants as outs
from shardmap.rules import registry
from tests import oracle

aten = torch.ops.aten
ROWS = 5


def values(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(
            shape,
            generator=generator,
            dtype=torch.complex128 if dtype.is_complex else torch.float64,
        ).to(dtype)
    return torch.randint(0, 4, shape, generator=generator).to(dtype)


def gradient(x: torch.Tensor) -> Any:
    weight = W.detach().requires_grad_()
    bias = W[0].detach().requires_grad_()
    return torch.autograd.grad(
        (F.linear(x, weight.t(), bias[:3].sum()).tanh() ** 2).sum(), (weight, bias)
    )


def written_later(x: torch.Tensor) -> Any:
    y = x * 2
    z = y + 1
    y.add_(z)
    return y, z


def a_view_written_later(x: torch.Tensor) -> Any:
    y = x * 2
    head = y[:1]
    out = y.t()
    head.mul_(-1)
    return out, head, y


def zeros_filled(x: torch.Tensor) -> Any:
    out = torch.zeros(4, 3, dtype=x.dtype)
    out[0] = x[0]
    out[1:3] += x[:, :3]
    return out, out[0]


def input_written(x: torch.Tensor) -> Any:
    before = x * 1
    x.add_(1)
    return before, x, x.sum()


def duplicate(x: torch.Tensor) -> Any:
    y = x.sin()
    return y, y, y, x, x


def written_between(x: torch.Tensor) -> Any:
    y = x.exp()
    kept = y.clone()
    y.zero_()
    y[0] = kept[1]
    return kept, y


def swapped(x: torch.Tensor) -> Any:
    a, b = x.exp(), x.cos()
    return (a + b).t(), b.t(), a


W = values(3, 3, seed=2)
PROGRAMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "elementwise": lambda x: x.sin() * 2,
    "transposed": lambda x: (x * 2).t(),
    "transposed input": lambda x: x.t(),
    "permuted in the middle": lambda x: (x * 2).t().exp(),
    "duplicates": duplicate,
    "written later": written_later,
    "a view written later": a_view_written_later,
    "written between": written_between,
    "zeros filled": zeros_filled,
    "input written": input_written,
    "views of each other": lambda x: (lambda y: (y[0], y, y[:, 1:], y.view(-1), y.t()))(x + 1),
    "swapped": swapped,
    "no dimensions": lambda x: (x.sum(), x[0, 0], x.max(), x.sum() * 2),
    "empty": lambda x: (x[:0] * 2, x.new_zeros(0), x.sum()),
    "empty input": lambda x: x[:, :0],
    "matmul": lambda x: (x @ W, W @ x.t(), x.t() @ x),
    "outer": lambda x: x[0].outer(x[1]),
    "whole numbers": lambda x: (x > 0, x.argmax(), x.long(), (x > 0) & (x < 1), x.sort(-1).indices),
    "several results": lambda x: (*x.max(-1), *x.sort(-1), *x.split(1)),
    "reductions": lambda x: (
        x.sum(0),
        x.mean(1),
        x.amax(0, keepdim=True),
        x.var(1),
        x.logsumexp(0),
        x.norm(),
        x.prod(),
        x.cumsum(0),
    ),
    "unchanged by samples": lambda x: (W.exp(), x * 2, W, W.exp() + 1),
    "where": lambda x: torch.where(x > 0, x, -x),
    "cat and stack": lambda x: (torch.cat([x, x]), torch.stack([x, x * 2], 1)),
    "gradient": gradient,
    "softmax": lambda x: (x.softmax(-1), x.log_softmax(0), F.gelu(x), F.layer_norm(x, (3,))),
    "conv": lambda x: F.conv1d(x[None], W[:, :2, None].reshape(3, 2, 1)),
    "embedding": lambda x: F.embedding(x[0].long().abs() % 3, W),
    "gather and scatter": lambda x: (
        x.gather(0, x.long().abs() % 2),
        torch.zeros(2, 3, dtype=x.dtype).scatter_add(0, x.long().abs() % 2, x),
    ),
    "index": lambda x: (
        x[:, [2, 0]],
        x[[0, 1, 0]],
        x.index_select(1, torch.tensor([1, 1])),
        x.flip(0),
        x.roll(1, 1),
    ),
    "casts": lambda x: (x.to(torch.float32), x.half(), x.bfloat16(), x.to(torch.complex128)),
    "half steps": lambda x: (x.half() * 2).exp(),
    "promotion": lambda x: (
        x.float() * torch.tensor(2.0, dtype=torch.float64),
        x.long() * 0.5,
        x.sum().float() + x,
    ),
    "complex": lambda x: (
        torch.complex(x, x + 1),
        torch.fft.fft(x),
        torch.complex(x, x).conj(),
        torch.complex(x, x).imag,
    ),
    "expanded": lambda x: (x[0].expand(4, 3), x[:1].expand(4, 3) + 0),
    "nothing happens": lambda x: x,
    "linear algebra": lambda x: (
        torch.linalg.qr(x.t())[0],
        torch.linalg.svdvals(x),
        (x @ x.t()).det(),
    ),
    "bmm": lambda x: x[None].expand(2, 2, 3) @ W,
}


def chunks(
    function: Callable[..., Any], batch: torch.Tensor, stop: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """A chunk's mapped outputs into fresh memory, the same into slices filled with other values, and what
    was returned for those."""
    plan = shardmap.plan(function, randomness="different")(batch)
    job = plan._job
    ready = plan._on.on("cpu", True)
    replay = ready.low.replay
    arguments = (stop, 0, torch.device("cpu"), job.seed, job.recording.scalars, ready.fixed)
    with torch.no_grad():
        fresh = replay.chunk(*arguments, [oracle.twin(batch)[:stop]])
        slices = []
        for out in job.outputs:
            if out.mapped:
                whole = torch.empty((stop + 4, *out.shape), dtype=out.dtype)
                whole.view(torch.uint8).fill_(
                    1 if out.dtype == torch.bool else 0xAB
                ) if whole.numel() else None
                slices.append(whole[2 : stop + 2])
        before = [s._base.clone() if s._base is not None else s.clone() for s in slices]
        there = replay.chunk_into(*arguments, [oracle.twin(batch)[:stop]], slices)
    mapped = [k for k, out in enumerate(job.outputs) if out.mapped]
    for s, b in zip(slices, before, strict=True):  # nothing beside the slice has been written
        whole = s._base if s._base is not None else s
        bits = [
            t.contiguous().view(torch.uint8)
            for t in (whole[:2], b[:2], whole[stop + 2 :], b[stop + 2 :])
        ]
        assert torch.equal(bits[0], bits[1])
        assert torch.equal(bits[2], bits[3])
    for k, s in zip(mapped, slices, strict=True):
        assert there[k].data_ptr() == s.data_ptr()
        assert there[k].shape == s.shape
    for k, out in enumerate(job.outputs):
        if not out.mapped:
            oracle.assert_same(there[k], fresh[k], f"output {k}, the same for all samples")
    return [fresh[k] for k in mapped], slices, [there[k] for k in mapped]


@pytest.mark.parametrize("stop", [1, 3, ROWS])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_chunk_into_slices_equals_a_chunk(name: str, stop: int) -> None:
    """Values, and nothing beside the slices."""
    batch = values(ROWS, 2, 3)
    fresh, slices, _ = chunks(PROGRAMS[name], batch, stop)
    for i, (f, s) in enumerate(zip(fresh, slices, strict=True)):
        oracle.assert_same(s, f, f"{name}, output {i}")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.int64]
)
@pytest.mark.parametrize(
    "name",
    [
        "elementwise",
        "transposed",
        "duplicates",
        "written later",
        "zeros filled",
        "views of each other",
        "reductions",
        "cat and stack",
    ],
)
def test_a_chunk_into_slices_equals_a_chunk_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    function = PROGRAMS[name]
    if name == "reductions":
        function = {
            torch.complex64: lambda x: (x.sum(0), x.mean(1), x.prod(), x.cumsum(0)),
            torch.int64: lambda x: (x.sum(0), x.amax(0), x.prod(), x.cumsum(0)),
        }.get(dtype, function)
    batch = values(ROWS, 2, 3, dtype=dtype)
    fresh, slices, _ = chunks(function, batch, 3)
    for i, (f, s) in enumerate(zip(fresh, slices, strict=True)):
        oracle.assert_same(s, f, f"{name}, output {i}")


@pytest.mark.parametrize("name", PROGRAMS)
def test_chunks_into_slices_equal_the_loop(name: str) -> None:
    """The public way there: chunks of two, one result."""
    batch, expected = values(ROWS, 2, 3), values(ROWS, 2, 3)
    got = torch.utils._pytree.tree_leaves(shardmap.vmap(PROGRAMS[name], chunk_size=2)(batch))
    want = torch.utils._pytree.tree_leaves(oracle.loop(PROGRAMS[name])(expected))
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        oracle.assert_same(
            g, w, f"{name}, output {i}", precision=torch.float16 if name == "half steps" else None
        )
        assert g.is_contiguous()
    oracle.assert_same(batch, expected, "the batch")
    oracle.assert_own_memory(got, [batch, W])


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("elementwise", 0),
        ("outer", 0),
        ("softmax", 1),
        ("gradient", 1),
        ("duplicates", 4),
        ("transposed input", 1),
    ],
)
def test_results_are_written_without_a_copy(name: str, copies: int) -> None:
    """The last call of an output writes into its slice if it can.

    Few are copied into their slices.
    """
    function = {
        "elementwise": lambda x: x.sin() * 2,
        "softmax": lambda x: (x.softmax(-1), x.exp()),
    }.get(name, PROGRAMS[name])
    batch = values(ROWS, 2, 3)
    plan = shardmap.plan(function)(batch)
    ready = plan._on.on("cpu", True)
    slices = [torch.empty(ROWS, *out.shape, dtype=out.dtype) for out in plan._job.outputs]
    with torch.no_grad(), Operators() as mode:
        ready.low.replay.chunk_into(
            ROWS,
            0,
            torch.device("cpu"),
            0,
            plan._job.recording.scalars,
            ready.fixed,
            [batch],
            slices,
        )
    assert mode.seen["aten::copy_"] <= copies, mode.seen


# ---------------------------------------------------------------------------------------------- the
# operators' own variants

x, y, w, i = (
    values(4, 2, 3),
    values(4, 2, 3, seed=5),
    values(4, 3, 2, seed=6),
    values(4, 2, 3, dtype=torch.int64),
)
positive = x.abs() + 0.1
TABLE: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    *[(op.default, (x,), {}) for op in (aten.sin, aten.cos, aten.exp, aten.tanh, aten.sigmoid,
    aten.neg, aten.abs, aten.sign, aten.erf)], *[(op.default, (positive,), {}) for op in (aten.log,
    aten.sqrt, aten.rsqrt, aten.reciprocal, aten.log1p, aten.lgamma, aten.silu)], *[(op.Tensor, (x,
    y), {}) for op in (aten.add, aten.sub, aten.mul, aten.div, aten.lt, aten.ge, aten.eq, aten.ne,
    aten.remainder)], *[(op.default, (x, y), {}) for op in (aten.maximum, aten.minimum, aten.atan2,
    aten.logaddexp, aten.hypot)], *[(op.Scalar, (x, 0.3), {}) for op in (aten.add, aten.mul,
    aten.sub, aten.div, aten.lt, aten.gt, aten.eq)], (aten.add.Tensor, (x, y), {"alpha": 2}),
    (aten.pow.Tensor_Scalar, (x, 2), {}), (aten.pow.Tensor_Tensor, (positive, y), {}),
    (aten.bmm.default, (x, w), {}), (aten.baddbmm.default, (values(4, 2, 2), x, w), {}),
    (aten.mm.default, (x[0], w[0]), {}), (aten.addmm.default, (values(2, 2), x[0], w[0]), {}),
    (aten.sum.dim_IntList, (x, [1]), {}), (aten.sum.dim_IntList, (x, [-1], True), {}),
    (aten.sum.dim_IntList, (i, [1, 2]), {"dtype": torch.float64}), (aten.mean.dim, (x, [1, 2]), {}),
    (aten.amax.default, (x, [1]), {}), (aten.amin.default, (x, [2], True), {}), (aten.prod.dim_int,
    (x, 1), {}), (aten.any.dim, (i, 1), {}), (aten.all.dim, (i, 2), {}), (aten.argmax.default, (x,
    1), {}), (aten.argmin.default, (x, 2, True), {}), (aten.cumsum.default, (x, 1), {}),
    (aten.cumprod.default, (x, 2), {}), (aten.logsumexp.default, (x, [1]), {}),
    (aten.linalg_vector_norm.default, (x, 2, [1]), {}), (aten._softmax.default, (x, 2, False), {}),
    (aten._log_softmax.default, (x, 1, False), {}), (aten.gelu.default, (x,), {}), (aten.where.self,
    (x > 0, x, y), {}), (aten.clamp.default, (x, -0.5, 0.5), {}), (aten.clamp_min.default, (x, 0.1),
    {}), (aten.cat.default, ([x, y], 1), {}), (aten.stack.default, ([x, y], 1), {}),
    (aten.gather.default, (x, 1, i.clamp(0, 1)), {}), (aten.scatter_add.default, (x, 1, i.clamp(0,
    1), y), {}), (aten.index_select.default, (x, 1, torch.tensor([1, 0, 1])), {}),
    (aten.index.Tensor, (x, [None, torch.tensor([1, 0])]), {}), (aten.flip.default, (x, [1]), {}),
    (aten.roll.default, (x, [1], [2]), {}), (aten.tril.default, (x,), {}), (aten.triu.default, (x,
    1), {}), (aten.logical_not.default, (i,), {}), (aten.bitwise_and.Tensor, (i, i), {}),
    (aten.embedding.default, (values(5, 3), i[:, 0]), {}), (aten.threshold_backward.default, (x, y,
    0), {}), (aten.sigmoid_backward.default, (x, y), {}), (aten.tanh_backward.default, (x, y), {}),
    (aten._softmax_backward_data.default, (x, y, 2, torch.float64), {}), (aten.clone.default, (x,),
    {}), (aten._to_copy.default, (x,), {}), (aten.repeat.default, (x, [1, 2, 1]), {}),
    (aten.constant_pad_nd.default, (x, [1, 1]), {}), (aten.masked_fill.Scalar, (x, x > 0, 2), {}),
    (aten.convolution.default, (x, values(3, 2, 2), None, [1], [0], [1], False, [0], 1), {}),
    (aten._adaptive_avg_pool2d.default, (x[:, None], [1, 2]), {}), (aten.avg_pool2d.default, (x[:,
    None], [2, 2]), {}), (aten.addcmul.default, (x, x, y), {"value": 0.5}), (aten.lerp.Scalar, (x,
    y, 0.3), {}), (aten.zeros_like.default, (x,), {}), (aten.full_like.default, (x, 3.0), {}),
    (aten.linalg_cross.default, (x, y), {"dim": 2}), (aten.mse_loss.default, (x, y, 0), {}),
    (aten.select_backward.default, (x[:, 0], [4, 2, 3], 1, 0), {}), (aten.slice_backward.default,
    (x[:, :1], [4, 2, 3], 1, 0, 1, 1), {}), (aten.embedding_dense_backward.default, (x, i[:, :, 0],
    5, -1, False), {}), (aten.index_add.default, (x, 1, torch.tensor([0, 1]), y), {}),
]  # fmt: skip


def check_variant(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Compares the variant with `out` to the functional call; whether there is one."""
    variant = outs._overload(op)
    if variant is None:
        return False
    want = op(*args, **kwargs)
    if (
        want.layout is not torch.strided or not want.dim()
    ):  # a mapped result has a dimension of samples; losses swap a scalar's memory
        return False
    for garbage in (0x00, 0xAB):
        out = torch.empty(want.shape, dtype=want.dtype)
        if out.numel():
            out.view(-1).view(torch.uint8).fill_(
                garbage if out.dtype != torch.bool else garbage & 1
            )
        place = out.data_ptr()
        returned = variant._op(*args, **kwargs, out=out)
        assert out.data_ptr() == place, f"{op}: resized"
        oracle.assert_same(out, want, f"{op} with out=")
        assert returned.data_ptr() == place
    return True


@pytest.mark.parametrize("number", range(len(TABLE)), ids=lambda n: TABLE[n][0].name())
def test_the_variant_with_out_gives_the_same(number: int) -> None:
    op, args, kwargs = TABLE[number]
    check_variant(op, args, kwargs)


def test_most_of_the_table_has_a_variant() -> None:
    """Or the tests above compare nothing."""
    assert sum(outs._overload(op) is not None for op, _, _ in TABLE) > 70


def test_what_returns_views_or_draws_has_no_variant() -> None:
    for op in (
        aten.view.default,
        aten.t.default,
        aten.select.int,
        aten.add_.Tensor,
        aten.randn.default,
        aten.bernoulli.default,
        aten.reshape.default,
    ):
        assert outs._overload(op) is None, op
    for op in (aten.max.dim, aten.sort.default, aten.split.Tensor, aten.linalg_qr.default):
        assert outs._overload(op) is None, f"{op}: several results"


class Variants(TorchDispatchMode):
    """Compares every call of an operator with a rule to its variant with `out`."""

    def __init__(self) -> None:
        super().__init__()
        self.compared: set[str] = set()
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            func in registry._rules
            and isinstance(result, torch.Tensor)
            and not any(o.alias_info for o in func._schema.returns)
        ):
            if check_variant(func, args, kwargs or {}):
                self.compared.add(func.name())
        return result


@pytest.mark.rotating
@pytest.mark.parametrize("part", range(8))
def test_variants_of_the_operator_database_give_the_same(part: int) -> None:
    """Every operator that a rule serves, in the samples of PyTorch's own tests."""
    seen: set[str] = set()
    for info in op_db[part::8]:
        if torch.float64 not in info.dtypes:
            continue
        for sample in list(info.sample_inputs("cpu", torch.float64))[:6]:
            try:
                info(sample.input, *sample.args, **sample.kwargs)
            except Exception:
                continue
            with torch.no_grad(), Variants() as mode:
                state = torch.get_rng_state()
                info(sample.input, *sample.args, **sample.kwargs)
                torch.set_rng_state(state)
            seen |= mode.compared
    assert len(seen) > 20
