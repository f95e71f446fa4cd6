"""Numbers between two ends that differ by sample: values, and neither gradients nor tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import shardmap
from shardmap import errors
from tests.rules.against_loop import check, real
from tests.same import assert_same

Tensor = torch.Tensor
DTYPE = torch.float64

SPACED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "both": lambda x, y: torch.linspace(x, y, 5, dtype=DTYPE),
    "from a number": lambda x, y: torch.linspace(1, y, 4, dtype=DTYPE) + x,
    "to a number": lambda x, y: torch.linspace(x, 2.5, 4, dtype=DTYPE) * y,
    "of the default dtype": lambda x, y: torch.linspace(0, y, 4) + x.float(),
    "integers": lambda x, y: torch.linspace(1, 3 * y, 4, dtype=torch.int32) + x,
    "integers between both": lambda x, y: torch.linspace(9 * x, 9 * y, 4, dtype=torch.int64),
    "one": lambda x, y: torch.linspace(x, 3, 1, dtype=DTYPE) + y,
    "none": lambda x, y: torch.linspace(x, y, 0),
    "powers": lambda x, y: torch.logspace(x, y, 4, dtype=DTYPE),
    "powers of three": lambda x, y: torch.logspace(0.0, y, 4, base=3, dtype=DTYPE) * x,
    "powers from a tensor": lambda x, y: torch.logspace(x, 1, 3, dtype=DTYPE) * y,
}  # fmt: skip


@pytest.mark.parametrize("name", SPACED)
def test_values(name: str) -> None:
    rounding = 1e-6 if "default" in name else 1e-9
    check(SPACED[name], real(), real(), gradient=False, tolerance=rounding)
    check(lambda x, y: SPACED[name](x, y) * x * y, real(), real(), tolerance=rounding)


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor | None]:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos())))
        return out.primal, out.tangent


OPTIONS = [{}, {"chunk_size": 2}, {"trace": "once"}, {"trace": "each"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", [name for name in SPACED if name != "none"])
def test_no_tangent(name: str, options: dict) -> None:
    def alone(x: Tensor) -> Tensor:
        return SPACED[name](x[0].sin(), x[1] * 2)

    def scaled(x: Tensor) -> Tensor:
        return SPACED[name](x[0], x[1]) * x[1]

    for function in (alone, scaled):
        mapped = shardmap.vmap(function, **options)
        for number in range(4):
            x = torch.randn(5, 2, generator=torch.Generator().manual_seed(number), dtype=DTYPE)
            found = dual(mapped, x)
            expected = dual(lambda x, f=function: torch.stack([f(r) for r in x]), x)
            assert_same(found[0], expected[0], "the values")
            assert (found[1] is None) == (expected[1] is None)
            if found[1] is not None and expected[1] is not None:
                assert_same(found[1], expected[1], "the tangent")


def filled(value: Any) -> Tensor:
    return torch.full((2,), value)


def test_a_sample_as_a_number_under_forward_mode_is_refused() -> None:
    """Torch takes a tensor for a number where it requires no grad, and reads its value."""
    x = torch.randn(4, 2, dtype=DTYPE)
    with pytest.raises(errors.TransformError, match=r"pass tensor\.detach\(\)"):
        dual(shardmap.vmap(lambda r: filled(r[1]) * r), x)

    def remedy(r: Tensor) -> Tensor:
        return filled(r[1].detach()) * r

    found = dual(shardmap.vmap(remedy), x)
    expected = dual(lambda x: torch.stack([filled(r[1]) * r for r in x]), x)
    for a, b, what in zip(found, expected, ("the values", "the tangent"), strict=True):
        assert a is not None
        assert b is not None
        assert_same(a, b, what)
