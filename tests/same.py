"""Tensors that must agree: values, dtypes, structure, and memory of their own."""

from __future__ import annotations

import torch

# rtol, and atol relative to the largest magnitude: batched kernels sum in another order
TOLERANCES = {
    torch.float64: (1e-8, 1e-9),
    torch.complex128: (1e-8, 1e-9),
    torch.float32: (2e-4, 2e-5),
    torch.complex64: (2e-4, 2e-5),
    torch.float16: (1e-2, 4e-3),
    torch.bfloat16: (5e-2, 3e-2),
}


class Mismatch(AssertionError):
    """The subject's result differs from the loop's."""


def assert_same(
    got: torch.Tensor,
    want: torch.Tensor,
    what: str,
    precision: torch.dtype | None = None,
    slack: torch.Tensor | None = None,
    entered: float = 0.0,
) -> None:
    """Raises `Mismatch` unless shape, dtype, device and values (to rounding, NaN equal) agree.

    Args:
        got: the subject's tensor.
        want: the loop's.
        what: names it in errors.
        precision: the least precise dtype computed in, where it is not that of `want`.
        slack: the loop's tensor from inputs changed by rounding: its distance from `want` is
            allowed, tenfold.
        entered: the largest magnitude that entered the computation; where everything cancels, what
            is left is a few units of rounding of that.
    """
    if not isinstance(got, torch.Tensor):
        raise Mismatch(f"{what}: {type(got).__name__} instead of a tensor")
    for name in ("shape", "dtype", "device", "layout"):
        if getattr(got, name) != getattr(want, name):
            raise Mismatch(
                f"{what}: {name} {getattr(got, name)}, the loop has {getattr(want, name)}"
            )
    got, want = got.detach(), want.detach()
    if got.layout != torch.strided:
        got, want = got.to_dense(), want.to_dense()
    if got.numel() == 0:
        return
    if not (want.is_floating_point() or want.is_complex()):
        wrong = got != want
        if slack is not None:
            wrong &= slack == want
    else:
        rtol, relative_atol = max(
            TOLERANCES.get(want.dtype, (1e-1, 1e-1)),
            TOLERANCES.get(precision or want.dtype, (0.0, 0.0)),
        )
        dtype = want.dtype
        wide = torch.complex128 if want.is_complex() else torch.float64
        got, want = got.to(wide), want.to(wide)
        magnitude = want.abs()
        finite = magnitude[magnitude.isfinite()]
        scale = max(float(finite.max()) if finite.numel() else 0.0, 1e-3)
        bound = rtol * magnitude + relative_atol * scale
        if slack is not None:
            bound = bound + 10 * (slack.detach().to(wide) - want).abs().nan_to_num(float("inf"))
            rounding = (
                max(torch.finfo(d).eps for d in (dtype, precision) if d is not None)
                if entered
                else 0.0
            )
            bound = bound + 16 * rounding * entered
        wrong = ~((got - want).abs() <= bound) & ~((got == want) | (got.isnan() & want.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        count = int(wrong.sum())
        raise Mismatch(
            f"{what}: {count} of {wrong.numel()} values differ, first at {at}: {got[at].item()!r}, "
            f"the loop has {want[at].item()!r}"
        )


def offsets(tensor: torch.Tensor) -> set[int]:
    """The element addresses that a small dense tensor covers."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return set()
    addresses = torch.tensor(tensor.data_ptr())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        addresses = addresses.unsqueeze(-1) + torch.arange(size) * stride * tensor.element_size()
    return set(addresses.flatten().tolist())


def assert_own_memory(outputs: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """Raise `Mismatch` if an output shares memory with an input, a captured tensor, an output."""
    taken: dict[int, str] = {}
    for i, other in enumerate(others):
        if other.layout == torch.strided and other.numel():
            taken[other.untyped_storage().data_ptr()] = f"input or captured tensor {i}"
    seen: set[int] = set()
    for i, output in enumerate(outputs):
        if output.layout != torch.strided or not output.numel():
            continue
        if (owner := taken.get(output.untyped_storage().data_ptr())) is not None:
            raise Mismatch(f"output {i} shares memory with {owner}")
        mine = offsets(output)
        if len(mine) != output.numel():
            raise Mismatch(
                f"output {i} repeats its own memory (strides {output.stride()}, shape "
                f"{tuple(output.shape)})"
            )
        if mine & seen:
            raise Mismatch(f"output {i} shares memory with another output")
        seen |= mine
