"""Decide from a recorded program if forward mode gives what reverse mode gives, for every sample.

Autograd has two formulas for an operator, and they may differ where the function has no derivative:
at ties (`fmax`), at kinks (`prelu`), and where a derivative is infinite (`sqrt` at zero), which
times a zero is NaN. So operators are listed whose two formulas agree wherever their arguments are
finite, and whose derivatives are finite there. All others are left to reverse mode.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from shardmap.program.analysis import written
from shardmap.program.ir import Equation, Program, Var
from shardmap.program.schema import base_name, by_name, short_name

_VIEWS = """
alias as_strided cat clone constant_pad_nd contiguous copy detach diagonal expand flip index
index_select lift_fresh narrow permute repeat roll select slice split split_with_sizes squeeze
stack t transpose tril triu unbind unfold unsqueeze view where _reshape_alias _to_copy _unsafe_view
"""
"""Operators that move numbers."""
_LINEAR = """
add addbmm addmm addmv addr baddbmm bmm convolution cumsum dot mean mm mul mv neg rsub sub sum
"""
"""Operators that are linear in each argument, or are sums of such."""
_SMOOTH = """
addcmul cos cosh erf exp expm1 gelu gelu_backward sigmoid sigmoid_backward silu sin sinh
softplus softplus_backward square tanh tanh_backward native_layer_norm
"""
_ONE_FORMULA = """
abs hardtanh hardtanh_backward leaky_relu leaky_relu_backward maximum minimum relu sign sgn
threshold_backward
"""
"""Operators with kinks, of which autograd has one formula, for the gradient and for the tangent."""
_CONSTANT = """
_efficientzerotensor _new_zeros_with_same_feature_meta ceil empty empty_like floor full_like fill
new_empty new_empty_strided new_full new_ones new_zeros ones_like round trunc zero zeros_like
"""
"""Operators without a derivative."""
_AGREE = frozenset(" ".join((_VIEWS, _LINEAR, _SMOOTH, _ONE_FORMULA, _CONSTANT)).split())
_BY_NUMBERS = frozenset(("clamp", "clamp_max", "clamp_min"))
"""Operators whose formulas agree at numbers, and not at tensors that reach the same value."""
_HIGHEST_POWER = 64


def disagreement(program: Program, moving: Iterable[Var], given: Iterable[Var]) -> str:
    """Name the first call whose derivative might be another one in reverse mode; "" if none.

    Args:
        program: The program of one tangent of the function, which was run in grad mode.
        moving: The variables that hold the differentiated input and its tangent.
        given: Those that hold the function's arguments, which differ by sample.
    """
    reached = {v.group for v in moving}
    sampled = reached | {v.group for v in given}
    for eq in program.equations:
        read = {v.group for v in eq.inputs()}
        found = (*eq.results(), *written(eq))
        if read & sampled:
            sampled.update(v.group for v in found)
        if not read & reached:
            continue
        reached.update(v.group for v in found)
        # Autograd's checks of what operators would return run on the device "meta".
        numbers = [v for v in found if v.spec.dtype.is_floating_point or v.spec.dtype.is_complex]
        if all(v.spec.device == "meta" for v in numbers):
            continue
        if not eq.grad_mode:
            return f"{short_name(eq.op)} under torch.no_grad() or in an autograd.Function"
        if not _agrees(eq, sampled):
            return f"{short_name(eq.op)}, whose derivatives may differ by mode for some samples"
    return ""


def _agrees(eq: Equation, sampled: Collection[int]) -> bool:
    if eq.op.namespace != "aten":
        return False
    name = base_name(eq.op)
    if name.endswith("_") and not name.startswith("_"):
        name = name[:-1]  # in place
    if name == "div":  # by a sample's zero, the derivative is infinite
        divisor = by_name(eq.op, eq.args, dict(eq.kwargs))["other"]
        return type(divisor) is not Var or divisor.group not in sampled
    if name in _BY_NUMBERS:
        return not any(type(bound) is Var for bound in (*eq.args[1:], *dict(eq.kwargs).values()))
    if name == "pow":
        exponent = by_name(eq.op, eq.args, dict(eq.kwargs))["exponent"]
        return type(exponent) in (int, float) and exponent in range(_HIGHEST_POWER)
    return name in _AGREE
