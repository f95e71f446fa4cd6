"""Tolerances for comparing results: kernels for batches round differently."""

from __future__ import annotations

import math

import torch

from shardmap._torch import FakeTensor
from shardmap.trace.batch import without_class

OUTPUT_TOLERANCE = {
    torch.float64: 1e-7,
    torch.complex128: 1e-7,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Tolerances as part of the largest entry of an output. They are wide, because rounding adds up
along a program; where outputs differ by more, the operators are compared one by one before a rule
is called wrong."""

OPERATOR_TOLERANCE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
"""Tolerances as part of the largest entry of one operator's result, from equal operands."""

ROUNDINGS = 100
"""Tolerance as a multiple of the rounding error of the largest operand: for results in which
everything cancels."""


THIN_FROM = 1 << 16
"""Number of elements above which a sample of them is compared, where memory is compared and not
rounding."""


def has_values(t: torch.Tensor) -> bool:
    """True if a tensor holds numbers; fake tensors, and those on the meta device, hold none."""
    return t.device.type != "meta" and not isinstance(t, FakeTensor)


def largest(tensor: torch.Tensor) -> float:
    """The largest finite magnitude in a floating-point tensor; 0 for any other."""
    if not has_values(tensor) or tensor.numel() == 0:
        return 0.0
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    plain = _computable(tensor.detach().resolve_conj().resolve_neg())
    found = _maximum(plain)
    if math.isfinite(found):
        return found
    magnitudes = plain.abs()
    return float(magnitudes.where(magnitudes.isfinite(), 0).max())


def _computable(t: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype that all kernels of a comparison support: complex halves have few.

    It is of no subclass that hands its class on: torch compares no tensors of unrelated ones.
    """
    t = without_class(t)
    if t.dtype is torch.complex32:
        return t.to(torch.complex64)
    if t.is_floating_point() and t.dtype not in OUTPUT_TOLERANCE:
        return t.float()
    return t


def _maximum(t: torch.Tensor) -> float:
    """The largest magnitude, in one pass and without a copy; NaN or infinite if an entry is.

    Of 5 million floats in 3 ms, where `torch.linalg.vector_norm` takes 15.
    """
    if t.is_complex():
        return float(torch.linalg.vector_norm(t, math.inf))
    least, most = torch.aminmax(t)
    return max(-float(least), float(most))


def thinned(t: torch.Tensor) -> torch.Tensor:
    """Some of the elements of a large tensor, evenly spread over it.

    They suffice to see that memory holds other data altogether, at a small part of the cost.
    """
    if t.numel() <= THIN_FROM:
        return t
    return t.reshape(-1)[:: t.numel() // THIN_FROM + 1]


def close(
    a: torch.Tensor,
    b: torch.Tensor,
    entered: float,
    tolerances: dict[torch.dtype, float] = OUTPUT_TOLERANCE,
    precision: torch.dtype | None = None,
) -> bool:
    """True if two results of one shape and dtype agree.

    Args:
        a: The result that is known to be right.
        b: The other result.
        entered: The largest magnitude of the operands. Where everything cancels (the gradient of a
            bias before a normalisation), what is left is rounding of the magnitudes that entered,
            not of the result.
        tolerances: By dtype, as part of the largest entry of `a`.
        precision: The least precise dtype on the way to the results, if it is not theirs.
    """
    if not (has_values(a) and has_values(b)):
        return True
    tolerance = 2e-2 if a.dtype is torch.complex32 else tolerances.get(a.dtype, 0.1)
    a, b = (_computable(t.detach().resolve_conj().resolve_neg()) for t in (a, b))
    if not a.numel() or torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    eps = torch.finfo(a.dtype).eps
    if precision is not None:
        eps = max(eps, torch.finfo(precision).eps)
        tolerance = max(tolerance, tolerances[precision])
    if a.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        a, b = a.float(), b.float()
    magnitude, difference = _maximum(a), _maximum(a - b)
    if not (math.isfinite(magnitude) and math.isfinite(difference)):
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)) or not torch.equal(a.isnan(), b.isnan()):
            return False
        a, b = torch.where(finite, a, 0), torch.where(finite, b, 0)
        magnitude, difference = _maximum(a), _maximum(a - b)
    return difference <= tolerance * magnitude + ROUNDINGS * eps * entered
