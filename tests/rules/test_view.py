"""View rules against the loop."""

from __future__ import annotations

import pytest
import torch

import shardmap
from shardmap import errors
from tests.rules.against_loop import check, real
from tests.rules.everywhere import everywhere

aten = torch.ops.aten

VIEWS = {
    "view": (lambda x: x.reshape(6) * 2, real(2, 3)),
    "view of a scalar": (lambda x: x.view(1, 1) * 2, real()),
    "view to a scalar": (lambda x: x.clone().view(()) * 2, real(1, 1)),
    "view of nothing": (lambda x: x.clone().view(2, 0) * 2, real(0, 3)),
    "views of views": (
        lambda x: x.clone().view(6).view(3, 2).view(1, 6).view(2, 3) + 1,
        real(2, 3),
    ),
    "view of a transpose": (
        lambda x: x.clone().transpose(0, 1).view(3, 2, 1).squeeze(-1).t() + 1,
        real(2, 3),
    ),
    "unsqueeze": (lambda x: x.unsqueeze(0) + x.unsqueeze(-1) + x.unsqueeze(1), real(3)),
    "unsqueeze scalar": (lambda x: x.unsqueeze(-1) * 2, real()),
    "squeeze": (lambda x: x.squeeze() * 2, real(1, 3, 1)),
    "squeeze to a scalar": (lambda x: x.squeeze() * 2, real(1, 1)),
    "squeeze.dim": (lambda x: x.squeeze(-1).squeeze(0) * 2, real(3, 1)),
    "squeeze.dims": (lambda x: x.squeeze((0, -1)) * 2, real(1, 3, 1)),
    "squeeze of a scalar": (lambda x: x.squeeze(0) * 2, real()),
    "t": (lambda x: x.t() * torch.arange(2.0), real(2, 3)),
    "t of a vector": (lambda x: x.t() * 2, real(3)),
    "t twice": (lambda x: x.t().t() * 2, real(2, 3)),
    "transpose": (lambda x: x.transpose(0, -1) * 2, real(2, 3, 4)),
    "transpose of a scalar": (lambda x: x.transpose(0, -1) * 2, real()),
    "permute": (lambda x: x.permute(2, 0, -2) * 2, real(2, 3, 4)),
    "permute and back": (lambda x: x.permute(2, 0, 1).permute(1, 2, 0) * 2, real(2, 3, 4)),
    "ones and order": (
        lambda x: x.unsqueeze(1).permute(2, 1, 0).squeeze(1).unsqueeze(0).transpose(0, 2) * 2,
        real(2, 3),
    ),
    "movedim": (lambda x: x.movedim(0, 2) * 2, real(2, 3, 4)),
    "expand": (lambda x: x.expand(2, 3, 4) * 2, real(3, 1)),
    "expand a scalar": (lambda x: x.expand(2, 2) * 2, real()),
    "select": (lambda x: x[1] + x[:, -1].sum(), real(2, 3)),
    "slice": (lambda x: x[1:, ::2] * 2, real(3, 4)),
    "slice of nothing": (lambda x: x[3:] * 2, real(3, 4)),
    "narrow": (lambda x: x.narrow(-1, 1, 2) * 2, real(3, 4)),
    "narrow_copy": (lambda x: x.narrow_copy(-1, 1, 2) * 2, real(3, 4)),
    "split": (lambda x: tuple(p * 2 for p in x.split(2, -1)), real(3, 5)),
    "split one": (lambda x: x.split(2)[1] * 2, real(5)),
    "split_with_sizes": (lambda x: tuple(p * 2 for p in x.split([2, 3], 1)), real(3, 5)),
    "chunk": (lambda x: tuple(p * 2 for p in x.chunk(2)), real(5, 2)),
    "unbind": (lambda x: tuple(p * 2 for p in x.unbind(-1)), real(3, 2)),
    "unsafe_split": (lambda x: tuple(p * 2 for p in torch.unsafe_split(x, 2, -1)), real(3, 5)),
    "tensor_split": (lambda x: tuple(p * 2 for p in x.tensor_split((1, 2), 1)), real(2, 4)),
    "diagonal": (lambda x: x.diagonal(1, -1, 0) * 2, real(3, 2, 3)),
    "unfold": (lambda x: x.unfold(-1, 2, 1) * 2, real(2, 4)),
    "unfold of a scalar": (lambda x: x.unfold(0, 1, 1) * 2, real()),
    "as_strided": (lambda x: x.clone().as_strided((2, 2), (1, 2)) * 2, real(2, 3)),
    "as_strided_copy": (
        lambda x: torch.as_strided_copy(x.sin()[1], (2, 2), (1, 1), 3).mul_(2) + x.sin()[:, :2],
        real(2, 4),
    ),
    "as_strided with offset": (lambda x: x.clone()[1].as_strided((2,), (1,), 1) * 2, real(2, 3)),
    "view_as_real": (lambda x: torch.view_as_real(torch.complex(x, x * 2)) * 3, real(2, 2)),
    "view_as_complex": (lambda x: torch.view_as_complex(x.clone()).abs(), real(3, 2)),
    "imag of conj": (lambda x: torch.complex(x, x * 2).conj().imag, real(3)),
    "real": (lambda x: torch.complex(x, x).real * 2, real(3)),
}

COPIES = {
    "flip": (lambda x: x.flip(0, -1), real(2, 3)),
    "flip of a scalar": (lambda x: x.flip(0), real()),
    "roll": (lambda x: x.roll((1, -1), (0, -1)), real(2, 3)),
    "roll flat": (lambda x: x.roll(1), real(2, 3)),
    "roll of a scalar": (lambda x: x.roll(1), real()),
    "repeat": (lambda x: x.repeat(2, 1, 2), real(2, 3)),
    "repeat of a scalar": (lambda x: x.repeat(3), real()),
    "pad": (lambda x: torch.nn.functional.pad(x, (1, 0, -1, 2), value=3.0), real(3, 3)),
    "tril, triu": (lambda x: x.tril(-1) + x.triu(1), real(3, 3)),
    "diag_embed": (lambda x: x.diag_embed(1, 0, -1), real(2, 3)),
    "select_backward": (lambda x: aten.select_backward(x, [2, 3], -2, 1), real(3)),
    "select_backward of a scalar": (lambda x: aten.select_backward(x, [3], 0, 1), real()),
    "slice_backward": (lambda x: aten.slice_backward(x, [2, 5], -1, 1, 5, 2), real(2, 2)),
    "diagonal_backward": (lambda x: aten.diagonal_backward(x, [3, 3], 1, 0, -1), real(2)),
    "unfold_backward": (lambda x: aten.unfold_backward(x, [4], -1, 2, 1), real(3, 2)),
}

SEVERAL = {
    "cat": (lambda x, y: torch.cat([x, y, x], -1), real(2, 3), real(2, 1)),
    "cat with nothing": (lambda x, y: torch.cat([x, y], 0), real(2, 3), real(0)),
    "cat of vectors": (lambda x, y: torch.cat([x, y]), real(0), real(2)),
    "stack": (lambda x, y: torch.stack([x, y], -1), real(2, 3), real(2, 3)),
    "stack of scalars": (lambda x, y: torch.stack([x, y]), real(), real()),
    "slice_scatter": (lambda x, y: torch.slice_scatter(x, y, -1, 1, 3), real(2, 4), real(2, 2)),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y, -1, 1), real(2, 4), real(2)),
    "diagonal_scatter": (lambda x, y: torch.diagonal_scatter(x, y, 1), real(3, 3), real(2)),
}

WRITES = {
    "through a view": lambda x: _after(
        x.clone(), lambda y: y.view(6)[1:].unsqueeze(0).squeeze(0).mul_(2)
    ),
    "through a transpose": lambda x: _after(x.clone(), lambda y: y.t().t().t()[0].add_(1)),
    "to the base": lambda x: _view_of_written(x.clone()),
    "t_": lambda x: x.clone().t_() * 2,
    "unsqueeze_, t_, squeeze_": lambda x: x.clone().t_().unsqueeze_(0).squeeze_() * 2,
    "t_ and write": lambda x: _transposed_and_written(x.clone()),
}


def _after(x, write):
    write(x)
    return x * 1


def _view_of_written(x):
    seen = x.unsqueeze(0).squeeze(0).view(6)
    x.mul_(3)
    return seen + 1, x


def _transposed_and_written(x):
    y = x.detach()
    x.t_()
    x[0].mul_(2)
    return x + 1, y.sum(0)


@pytest.mark.parametrize("name", [*VIEWS, *COPIES])
def test_one(name):
    function, make = {**VIEWS, **COPIES}[name]
    check(function, make)


@pytest.mark.parametrize("name", SEVERAL)
def test_several(name):
    function, *makes = SEVERAL[name]
    check(function, *makes, strided=name != "cat with nothing")


@pytest.mark.parametrize("name", WRITES)
def test_writes(name):
    check(WRITES[name], real(2, 3), rules=False)


def test_no_grad_view_of_a_value_that_requires_grad():
    def function(x):
        y = x * 2
        with torch.no_grad():
            z = y.unsqueeze(0).squeeze(0)
            w = y.t()
        return y * z + y.t().t() * w.t()

    check(function, real(2, 3))


def test_mixed_dtypes():
    x, y = torch.randn(3, 2), torch.randn(3, 2, dtype=torch.float64)
    for function in (
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.stack([a, b]),
        lambda a, b: torch.stack([a[0], b[0]]),
    ):
        for dims in ((0, 0), (0, None), (None, 0)):
            got = shardmap.vmap(function, dims)(
                x if dims[0] == 0 else x[0], y if dims[1] == 0 else y[0]
            )
            want = torch.stack(
                [
                    function(x[i if dims[0] == 0 else 0], y[i if dims[1] == 0 else 0])
                    for i in range(3)
                ]
            )
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.int16])
def test_view_dtype(dtype):
    x = torch.randn(3, 2, 4)
    assert torch.equal(shardmap.vmap(lambda row: row.view(dtype).clone())(x), x.view(dtype))


def test_explicit_offset_on_an_input_is_refused():
    with pytest.raises(errors.EscapeError, match="storage_offset"):
        shardmap.vmap(lambda x: x.as_strided((2,), (1,), 1).clone())(torch.randn(3, 4))
    with pytest.raises(errors.EscapeError, match="as_strided_copy with storage_offset=0"):
        shardmap.vmap(lambda x: torch.as_strided_copy(x, (2,), (1,), 0))(torch.randn(3, 4))


def test_a_part_written_at_other_strides() -> None:
    everywhere(
        lambda x, part: torch.as_strided_scatter(x.sin(), part, (2, 2), (1, 3), 1),
        real(4, 3), real(2, 2), gradient=False,
    )  # fmt: skip
    everywhere(
        lambda x, part: torch.as_strided_scatter(x, part, (2, 2), (1, 3)),
        real(4, 3), real(2, 2), gradient=False, strided=False,
    )  # fmt: skip


def test_an_offset_into_the_memory_of_a_mapped_argument_is_refused_when_written() -> None:
    with pytest.raises(errors.EscapeError, match="as_strided_scatter with storage_offset=1"):
        shardmap.vmap(lambda x, part: torch.as_strided_scatter(x, part, (2,), (1,), 1))(
            torch.randn(3, 4), torch.randn(3, 2)
        )


def test_strides_inside_a_map_of_a_map() -> None:
    x = torch.randn(3, 2, 4)
    mine = shardmap.vmap(shardmap.vmap(lambda r: r.as_strided((2, 2), (1, 2))))(x)
    for i in range(3):
        for k in range(2):
            assert torch.equal(mine[i, k], x[i, k].clone().as_strided((2, 2), (1, 2)))
